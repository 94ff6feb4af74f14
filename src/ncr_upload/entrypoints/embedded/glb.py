"""Writes GLB files (glTF 2.0, Khronos specification section 4.4): a lathed mesh with normals, tangents, texture
coordinates and a metallic-roughness material whose PNG textures are embedded."""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAGIC = b"glTF"
_FLOAT, _UINT16, _UINT32 = 5126, 5123, 5125
_ARRAY_BUFFER, _ELEMENT_ARRAY_BUFFER = 34962, 34963
_WIDTH = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}

Profile = Callable[[float], tuple[float, float]]
"""Radius and height in metres at a share (0 to 1) of the way along the outline. Both parts must be smooth."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """An indexed triangle mesh; vertex data is flat, three, four or two numbers for each vertex."""

    positions: array[float]
    normals: array[float]
    tangents: array[float]
    uvs: array[float]
    indices: array[int]

    @property
    def vertex_count(self) -> int:
        return len(self.positions) // 3


@dataclass(frozen=True, slots=True)
class Material:
    """`base_color`, `normal` and `orm` (occlusion, roughness, metalness) are PNG files."""

    name: str
    base_color: bytes
    normal: bytes
    orm: bytes


def lathe(profile: Profile, segments: int, rings: int) -> Mesh:
    """The surface that the outline sweeps around the vertical axis, facing outwards."""
    mesh = Mesh(array("f"), array("f"), array("f"), array("f"), array("I"))
    step = 1e-4
    for ring in range(rings + 1):
        share = ring / rings
        radius, height = profile(share)
        (radius_before, height_before), (radius_after, height_after) = profile(share - step), profile(share + step)
        outwards, upwards = height_after - height_before, radius_before - radius_after
        length = math.hypot(outwards, upwards) or 1.0
        outwards, upwards = outwards / length, upwards / length
        for segment in range(segments + 1):
            angle = 2 * math.pi * segment / segments
            cosine, sine = math.cos(angle), math.sin(angle)
            mesh.positions.extend((radius * cosine, height, -radius * sine))
            mesh.normals.extend((outwards * cosine, upwards, -outwards * sine))
            mesh.tangents.extend((-sine, 0.0, -cosine, 1.0))
            mesh.uvs.extend((segment / segments, 1 - share))
    row = segments + 1
    for ring in range(rings):
        for segment in range(segments):
            low = ring * row + segment
            mesh.indices.extend((low, low + 1, low + row, low + 1, low + row + 1, low + row))
    return mesh


def write_glb(name: str, mesh: Mesh, material: Material) -> bytes:
    """One node with one mesh with one material."""
    body = _Body()
    indices = array("H", mesh.indices) if mesh.vertex_count <= 0xFFFF else mesh.indices
    primitive = {
        "attributes": {
            "POSITION": body.add_accessor(mesh.positions, "VEC3", bounded=True),
            "NORMAL": body.add_accessor(mesh.normals, "VEC3"),
            "TANGENT": body.add_accessor(mesh.tangents, "VEC4"),
            "TEXCOORD_0": body.add_accessor(mesh.uvs, "VEC2"),
        },
        "indices": body.add_accessor(indices, "SCALAR", target=_ELEMENT_ARRAY_BUFFER),
        "material": 0,
    }
    pictures = {"baseColor": material.base_color, "normal": material.normal, "occlusionRoughnessMetallic": material.orm}
    document = {
        "asset": {"version": "2.0", "generator": "ncr-upload sample product"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [_describe_material(material.name)],
        "samplers": [{"magFilter": 9729, "minFilter": 9987, "wrapS": 10497, "wrapT": 10497}],
        "textures": [{"sampler": 0, "source": number} for number in range(len(pictures))],
        "images": [
            {"name": title, "mimeType": "image/png", "bufferView": body.add_view(data, None)}
            for title, data in pictures.items()
        ],
        "accessors": body.accessors,
        "bufferViews": body.views,
        "buffers": [{"byteLength": len(body.data)}],
    }
    return pack_glb(document, bytes(body.data))


def _describe_material(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "pbrMetallicRoughness": {
            "baseColorTexture": {"index": 0},
            "metallicRoughnessTexture": {"index": 2},
            "metallicFactor": 1.0,
            "roughnessFactor": 1.0,
        },
        "normalTexture": {"index": 1},
        "occlusionTexture": {"index": 2},
        "doubleSided": True,
    }


class _Body:
    """The binary chunk as it grows, with the accessors and views into it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []

    def add_view(self, data: bytes, target: int | None) -> int:
        self.views.append(
            {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)} | ({"target": target} if target else {})
        )
        self.data += data + bytes(-len(data) % 4)
        return len(self.views) - 1

    def add_accessor(
        self, numbers: array[float] | array[int], shape: str, *, target: int = _ARRAY_BUFFER, bounded: bool = False
    ) -> int:
        width = _WIDTH[shape]
        component = {"f": _FLOAT, "H": _UINT16, "I": _UINT32}[numbers.typecode]
        accessor: dict[str, Any] = {
            "bufferView": self.add_view(numbers.tobytes(), target),
            "componentType": component,
            "count": len(numbers) // width,
            "type": shape,
        }
        if bounded:
            accessor |= _bounds(numbers, width)
        self.accessors.append(accessor)
        return len(self.accessors) - 1


def _bounds(numbers: Sequence[float], width: int) -> dict[str, list[float]]:
    columns = [numbers[start::width] for start in range(width)]
    return {"min": [min(column) for column in columns], "max": [max(column) for column in columns]}


def pack_glb(document: dict[str, Any], binary: bytes) -> bytes:
    """The GLB container around a glTF document and its buffer; both are padded to four bytes as the format wants."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary += bytes(-len(binary) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary)
    header = MAGIC + struct.pack("<II", 2, length)
    return header + struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary


def unpack_glb(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The document and buffer of a GLB that `pack_glb` wrote."""
    (text_length,) = struct.unpack_from("<I", data, 12)
    return json.loads(data[20 : 20 + text_length]), data[28 + text_length :]
