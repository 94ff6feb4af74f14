"""Texture images of a made-up material: smooth noise, so that they compress and look like real ones.

The same seed gives the same bytes (with the same Pillow).
"""

from __future__ import annotations

import io
import random

from PIL import Image, ImageChops, ImageFilter, ImageOps

Colour = tuple[int, int, int]


def draw_noise(seed: int, side: int, cell: int) -> Image.Image:
    """Grey noise of `side`×`side` pixels whose grains are about `cell` pixels wide."""
    cells = max(2, side // cell)
    grains = Image.frombytes("L", (cells, cells), random.Random(seed).randbytes(cells * cells))
    return grains.resize((side, side), Image.Resampling.BICUBIC)


def draw_base_color(seed: int, side: int, dark: Colour, light: Colour) -> Image.Image:
    """A stone-like surface between two colours."""
    coarse = draw_noise(seed, side, 64).filter(ImageFilter.GaussianBlur(6))
    return ImageOps.colorize(ImageChops.blend(coarse, draw_noise(seed + 1, side, 8), 0.25), dark, light)


def draw_grey(seed: int, side: int, low: int, high: int, cell: int = 16) -> Image.Image:
    """A one-channel map (roughness, metallic, height …) with values from `low` to `high`."""
    spread = high - low
    return draw_noise(seed, side, cell).point([low + value * spread // 255 for value in range(256)])


def draw_normal(seed: int, side: int, strength: int = 24) -> Image.Image:
    """A tangent-space normal map: mostly (128, 128, 255), with small slopes."""
    height = draw_noise(seed, side, 32)
    slope_x = ImageChops.subtract(height, ImageChops.offset(height, 2, 0), scale=2, offset=128)
    slope_y = ImageChops.subtract(height, ImageChops.offset(height, 0, 2), scale=2, offset=128)
    curve = [max(128 - strength, min(128 + strength, value)) for value in range(256)]
    return Image.merge("RGB", (slope_x.point(curve), slope_y.point(curve), Image.new("L", (side, side), 252)))


def pack_orm(occlusion: Image.Image, roughness: Image.Image, metallic: Image.Image) -> Image.Image:
    """glTF's packing: occlusion in red, roughness in green, metalness in blue."""
    return Image.merge("RGB", (occlusion, roughness, metallic))


def encode(image: Image.Image, kind: str) -> bytes:
    """The image as a file of the kind: 'PNG', 'JPEG' or 'TGA'."""
    options: dict[str, dict[str, int | str]] = {
        "PNG": {"compress_level": 4},
        "JPEG": {"quality": 88},
        "TGA": {"compression": "tga_rle"},
    }
    out = io.BytesIO()
    image.save(out, kind, **options[kind])
    return out.getvalue()
