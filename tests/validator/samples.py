"""Files for the validator's tests, generated: glTF, images, Draco, KTX2, USDZ and zips, sound and hostile."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import DracoPy
from PIL import Image

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
MATERIAL = "0a1b2c3d-4e5f-4a6b-8c7d-0123456789ab"
POINTS = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]


def picture(format_: str = "PNG", side: int = 64) -> bytes:
    """An image whose body has something to damage."""
    out = io.BytesIO()
    rows = bytes((x * y * 7 + x) % 256 for y in range(side) for x in range(side * 3))
    Image.frombytes("RGB", (side, side), rows).save(out, format_)
    return out.getvalue()


def damaged(data: bytes, at: float = 0.5, length: int = 16) -> bytes:
    """`data` with bytes flipped from the given share of its length on."""
    start = int(len(data) * at)
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start : start + length]) + data[start + length :]


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    header = struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def ktx2() -> bytes:
    """The header of a 4 x 4 texture with one level, and that level."""
    index = struct.pack("<3Q", 104, 16, 16)
    head = struct.pack("<12s9L4L2Q", b"\xabKTX 20\xbb\r\n\x1a\n", 0, 1, 4, 4, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    return head + index + bytes(16)


def triangle() -> bytes:
    return b"".join(struct.pack("<3f", *point) for point in POINTS)


def document(**more: Any) -> dict[str, Any]:
    """A triangle. Its buffer is the first 36 bytes of buffer 0."""
    return {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36, "target": 34962}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        **more,
    }


def glb(content: Mapping[str, Any] | None = None, binary: bytes | None = None) -> bytes:
    content = content if content is not None else document()
    binary = binary if binary is not None else triangle()
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    binary += bytes(-len(binary) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary)
    return (
        struct.pack("<4s2L", b"glTF", 2, length)
        + struct.pack("<L4s", len(text), b"JSON")
        + text
        + struct.pack("<L4s", len(binary), b"BIN\0")
        + binary
    )


def glb_with(image: bytes, mime: str = "image/png", *, basisu: bool = False) -> bytes:
    """A triangle with a texture in it."""
    content = document()
    content["buffers"] = [{"byteLength": 36 + len(image)}]
    content["bufferViews"].append({"buffer": 0, "byteOffset": 36, "byteLength": len(image)})
    content["images"] = [{"mimeType": mime, "bufferView": 1}]
    content["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}} if basisu else {"source": 0}]
    content["materials"] = [{"emissiveTexture": {"index": 0}, "emissiveFactor": [1, 1, 1]}]
    content["accessors"].append({"componentType": 5126, "count": 3, "type": "VEC2"})
    content["meshes"][0]["primitives"][0] |= {"material": 0, "attributes": {"POSITION": 0, "TEXCOORD_0": 1}}
    if basisu:
        content |= {"extensionsUsed": ["KHR_texture_basisu"], "extensionsRequired": ["KHR_texture_basisu"]}
    return glb(content, triangle() + image)


def glb_with_draco(payload: bytes | None = None, *, indices: int = 3) -> bytes:
    """A triangle whose mesh is a Draco payload."""
    payload = payload if payload is not None else draco()
    extension = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    content = document(
        extensionsUsed=["KHR_draco_mesh_compression"],
        extensionsRequired=["KHR_draco_mesh_compression"],
        buffers=[{"byteLength": len(payload)}],
        bufferViews=[{"buffer": 0, "byteLength": len(payload)}],
        accessors=[
            {"componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"componentType": 5125, "count": indices, "type": "SCALAR"},
        ],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "extensions": extension}]}],
    )
    return glb(content, payload)


def draco() -> bytes:
    return bytes(DracoPy.encode(POINTS, faces=[(0, 1, 2)]))


def gltf(folder: Path, uri: str, name: str = "model.gltf") -> Path:
    """A triangle whose buffer is at `uri`."""
    content = document(buffers=[{"byteLength": 36, "uri": uri}])
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def make_zip(path: Path, entries: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, data in entries.items():
            zipped.writestr(name, data)
    return path


def package(path: Path, sku: str = "SKU1", **more: bytes) -> Path:
    """A sound package: main model, material, texture and source. `more` are further entries, or others in their place."""
    entries = {
        f"{sku}/{sku}.glb": glb(),
        f"{sku}/materials/{MATERIAL}.glb": glb(),
        f"{sku}/materials/{MATERIAL}_basecolor.png": picture(),
        f"{sku}/sources/{sku}.blend": b"BLENDER-v402" + bytes(64),
    }
    return make_zip(path, entries | more)


LAYER = b"""#usda 1.0
(
    defaultPrim = "Root"
    metersPerUnit = 1
    upAxis = "Y"
)
def Xform "Root"
{
    def Mesh "Triangle"
    {
        int[] faceVertexCounts = [3]
        int[] faceVertexIndices = [0, 1, 2]
        point3f[] points = [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
        float3[] extent = [(0, 0, 0), (1, 1, 0)]
        uniform token subdivisionScheme = "none"
    }
}
"""


def usdz(path: Path, entries: Mapping[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED, align: int = 64) -> Path:
    """A USDZ, each file's data at a multiple of `align` (plus 1, when that is 1)."""
    entries = entries if entries is not None else {"model.usda": LAYER}
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            start = zipped.start_dir + 30 + len(name.encode())
            gap = (-start - 4) % align if align > 1 else (60 - start) % 64 + 1
            info.extra = struct.pack("<2H", 0x1986, gap) + bytes(gap)
            zipped.writestr(info, data)
    return path
