"""A made-up product of the kind the studio delivers: models in four formats, materials, textures, renders.

The same seed gives the same bytes. Object keys are such that the layout's rules place every file.
"""

from __future__ import annotations

import math
import random
import struct
import uuid
from array import array
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from ncr_upload.entrypoints.embedded import glb, textures

Number = TypeVar("Number", int, float)

_TEXTURE_SIDE = 512
_SEGMENTS, _RINGS = 72, 64
_REFERENCE_PICTURE = "source_photo.jpg"


@dataclass(frozen=True, slots=True)
class Product:
    """`files` are object keys with their content. `targets` says where in the delivery each belongs; the one that is not
    in it is a reference picture, which is not delivered. `material_id` is the UUID in the material's file names."""

    sku: str
    material_id: str
    files: dict[str, bytes]
    targets: dict[str, str]

    @property
    def main_model(self) -> str:
        """The main model's object key."""
        return next(key for key, target in self.targets.items() if target == f"{self.sku}/{self.sku}.glb")

    @property
    def delivered(self) -> dict[str, bytes]:
        """The delivery's files by their paths in it."""
        return {target: self.files[key] for key, target in self.targets.items()}


def make_product(folder: str, sku: str, seed: int = 1) -> Product:
    """A vase with the object keys below ``{folder}/{sku}/``."""
    numbers = random.Random(seed)
    material_id = str(uuid.UUID(int=numbers.getrandbits(128), version=4))
    maps = _draw_maps(seed)
    material = glb.Material("glazed_ceramic", maps["baseColor"], maps["normal"], maps["occlusionRoughnessMetallic"])
    mesh = glb.lathe(_vase_outline(numbers), _SEGMENTS, _RINGS)
    ball = glb.lathe(_sphere_outline, 32, 16)
    placed = [
        (f"GLB_files/{sku}.glb", f"{sku}.glb", glb.write_glb(sku, mesh, material)),
        (f"Materials/{material_id}.glb", f"materials/{material_id}.glb", glb.write_glb(material.name, ball, material)),
        (f"{sku}.blend", f"sources/{sku}.blend", write_blend(sku, mesh)),
        (f"OBJ/{sku}.obj", f"obj/{sku}.obj", write_obj(sku, mesh)),
        (f"OBJ/{sku}.mtl", f"obj/{sku}.mtl", write_mtl(material_id)),
        (f"FBX/{sku}.fbx", f"fbx/{sku}.fbx", write_fbx(sku, mesh)),
    ]
    for name, data in maps.items():
        placed.append((f"Materials/{material_id}_{name}.png", f"materials/{material_id}_{name}.png", data))
    for name, data in _draw_source_textures(seed).items():
        placed.append((f"Materials/Sources/{material_id}_{name}", f"materials/sources/{material_id}_{name}", data))
    for name, data in _draw_renders(seed).items():
        placed.append((f"Renders/{sku}_{name}.jpg", f"renders/{sku}_{name}.jpg", data))
    place = f"{folder}/{sku}"
    files = {f"{place}/{source}": data for source, _, data in placed}
    targets = {f"{place}/{source}": f"{sku}/{target}" for source, target, _ in placed}
    picture = textures.encode(Image.new("RGB", (64, 64), (200, 190, 180)), "JPEG")
    return Product(sku, material_id, files | {f"{place}/{_REFERENCE_PICTURE}": picture}, targets)


def break_model(product: Product) -> Product:
    """The same product with a main model that only a real validator sees through: a whole GLB container around a mesh
    whose first triangle uses a vertex that does not exist."""
    document, binary = glb.unpack_glb(product.files[product.main_model])
    primitive = document["meshes"][0]["primitives"][0]
    view = document["bufferViews"][document["accessors"][primitive["indices"]]["bufferView"]]
    vertex_count = document["accessors"][primitive["attributes"]["POSITION"]]["count"]
    damaged = bytearray(binary)
    struct.pack_into("<H", damaged, view["byteOffset"], vertex_count + 7)
    files = product.files | {product.main_model: glb.pack_glb(document, bytes(damaged))}
    return replace(product, files=files)


def _vase_outline(numbers: random.Random) -> glb.Profile:
    belly, waist, height = numbers.uniform(0.08, 0.12), numbers.uniform(0.015, 0.03), numbers.uniform(0.25, 0.4)

    def outline(share: float) -> tuple[float, float]:
        return belly + waist * math.sin(2 * math.pi * share) - 0.03 * share, height * share

    return outline


def _sphere_outline(share: float) -> tuple[float, float]:
    # Not from pole to pole: at a pole the triangles would have no area.
    angle = math.pi * (0.02 + 0.96 * share)
    return 0.05 * math.sin(angle), -0.05 * math.cos(angle)


def _draw_maps(seed: int) -> dict[str, bytes]:
    side = _TEXTURE_SIDE
    occlusion = textures.draw_grey(seed + 10, side, 200, 255, cell=64)
    roughness = textures.draw_grey(seed + 11, side, 90, 160)
    metallic = Image.new("L", (side, side), 0)
    return {
        "baseColor": textures.encode(textures.draw_base_color(seed, side, (38, 70, 83), (233, 216, 166)), "PNG"),
        "normal": textures.encode(textures.draw_normal(seed + 12, side), "PNG"),
        "occlusionRoughnessMetallic": textures.encode(textures.pack_orm(occlusion, roughness, metallic), "PNG"),
    }


def _draw_source_textures(seed: int) -> dict[str, bytes]:
    side = _TEXTURE_SIDE

    def grey(number: int, low: int, high: int) -> Image.Image:
        return textures.draw_grey(seed + number, side, low, high)

    pictures = {
        "baseColor.tga": textures.draw_base_color(seed, side // 2, (38, 70, 83), (233, 216, 166)),
        "normal.tga": textures.draw_normal(seed + 12, side // 2),
        "roughness.png": grey(20, 90, 160),
        "metallic.png": grey(21, 0, 20),
        "ambientOcclusion.png": grey(22, 200, 255),
        "height.png": grey(23, 100, 156),
        "specular.jpg": grey(24, 120, 136),
        "opacity.png": Image.new("L", (side, side), 255),
        "emissive.jpg": Image.new("RGB", (side, side), (0, 0, 0)),
        "clearcoat.jpg": grey(25, 180, 220),
    }
    kinds = {"tga": "TGA", "png": "PNG", "jpg": "JPEG"}
    return {name: textures.encode(picture, kinds[name.rsplit(".", 1)[1]]) for name, picture in pictures.items()}


def _draw_renders(seed: int) -> dict[str, bytes]:
    sides = ("front", "back", "detail")
    return {
        name: textures.encode(
            textures.draw_base_color(seed + 30 + number, _TEXTURE_SIDE, (60, 60, 70), (235, 235, 230)), "JPEG"
        )
        for number, name in enumerate(sides)
    }


def write_obj(name: str, mesh: glb.Mesh) -> bytes:
    """Wavefront OBJ; its material library is the `.mtl` of the same name beside it."""
    lines = [f"mtllib {name}.mtl", f"o {name}"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in _triples(mesh.positions)]
    uvs = mesh.uvs
    lines += [f"vt {uvs[at]:.6f} {1 - uvs[at + 1]:.6f}" for at in range(0, len(uvs), 2)]
    lines += [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in _triples(mesh.normals)]
    lines.append("usemtl glazed_ceramic")
    lines += ["f " + " ".join(f"{corner + 1}/{corner + 1}/{corner + 1}" for corner in face) for face in _triples(mesh.indices)]
    return ("\n".join(lines) + "\n").encode()


def write_mtl(material_id: str) -> bytes:
    """The OBJ's material, its maps beside the package's other textures."""
    folder = "../materials"
    return (
        "newmtl glazed_ceramic\nKa 1 1 1\nKd 1 1 1\nKs 0.2 0.2 0.2\nNs 120\nillum 2\n"
        f"map_Kd {folder}/{material_id}_baseColor.png\nmap_Bump {folder}/{material_id}_normal.png\n"
    ).encode()


def write_fbx(name: str, mesh: glb.Mesh) -> bytes:
    """ASCII FBX 7.4 with one mesh. A face's last corner is written as its complement, as the format wants."""
    vertices = ",".join(f"{number * 100:.4f}" for number in mesh.positions)
    corners = ",".join(f"{a},{b},{~c}" for a, b, c in _triples(mesh.indices))
    return f"""; FBX 7.4.0 project file
FBXHeaderExtension:  {{
\tFBXHeaderVersion: 1003
\tFBXVersion: 7400
\tCreator: "ncr-upload sample product"
}}
GlobalSettings:  {{
\tVersion: 1000
\tProperties70:  {{
\t\tP: "UpAxis", "int", "Integer", "",1
\t\tP: "UnitScaleFactor", "double", "Number", "",1
\t}}
}}
Objects:  {{
\tGeometry: 1000, "Geometry::{name}", "Mesh" {{
\t\tVertices: *{len(mesh.positions)} {{
\t\t\ta: {vertices}
\t\t}}
\t\tPolygonVertexIndex: *{len(mesh.indices)} {{
\t\t\ta: {corners}
\t\t}}
\t\tGeometryVersion: 124
\t}}
\tModel: 2000, "Model::{name}", "Mesh" {{
\t\tVersion: 232
\t}}
}}
Connections:  {{
\tC: "OO",1000,2000
\tC: "OO",2000,0
}}
""".encode()


def write_blend(name: str, mesh: glb.Mesh) -> bytes:
    """A file with a .blend's header and blocks (64-bit, little-endian, 4.2); enough to be recognised as one, not to be
    opened as a scene: the structure table that Blender needs is Blender's own."""

    def block(code: bytes, data: bytes) -> bytes:
        return struct.pack("<4siQii", code, len(data), 0, 0, 1) + data

    data = mesh.positions.tobytes()
    title = f"OB{name}".encode()[:63].ljust(64, b"\0")
    return (
        b"BLENDER-v402"
        + block(b"REND", struct.pack("<ii64s", 1, 250, b"Scene"))
        + block(b"DATA", title + data)
        + block(b"ENDB", b"")
    )


def _triples(numbers: array[Number]) -> list[tuple[Number, Number, Number]]:
    return list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))
