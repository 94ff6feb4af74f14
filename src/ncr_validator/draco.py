"""The Draco payloads of a glTF file, by DracoPy. Runs in the inspector's child process only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import DracoPy

from ncr_validator.gltf_file import GltfFile, Unreadable
from ncr_validator.verdicts import Issue, Severity

EXTENSION = "KHR_draco_mesh_compression"
_TRIANGLES = 4


def check_draco(gltf: GltfFile) -> Iterator[Issue]:
    """Decode every Draco payload and hold its triangles against the accessor. Damage to attribute values deep inside a
    payload may decode to other numbers and stay unseen."""
    accessors = gltf.objects("accessors")
    for mesh_at, mesh in enumerate(gltf.objects("meshes")):
        primitives = mesh.get("primitives")
        for at, primitive in enumerate(primitives if isinstance(primitives, list) else ()):
            packed = _payload(primitive)
            if packed is not None:
                pointer = f"/meshes/{mesh_at}/primitives/{at}/extensions/{EXTENSION}"
                yield from _check_payload(gltf, primitive, packed, accessors, pointer)


def _payload(primitive: Any) -> dict[str, Any] | None:
    extensions = primitive.get("extensions") if isinstance(primitive, dict) else None
    packed = extensions.get(EXTENSION) if isinstance(extensions, dict) else None
    return packed if isinstance(packed, dict) else None


def _check_payload(
    gltf: GltfFile, primitive: dict[str, Any], packed: dict[str, Any], accessors: list[dict[str, Any]], pointer: str
) -> Iterator[Issue]:
    try:
        payload = gltf.view(packed.get("bufferView"))
        decoded = DracoPy.decode(payload)
    except MemoryError:
        raise
    except Unreadable as error:
        yield Issue("draco", "DRACO_UNREADABLE", Severity.ERROR, f"The Draco payload cannot be read: {error}.", pointer=pointer)
        return
    except Exception as error:  # noqa: BLE001 - a decoder on hostile bytes raises anything
        text = f"The Draco payload does not decode: {type(error).__name__}."
        yield Issue("draco", "DRACO_CORRUPT", Severity.ERROR, text, pointer=pointer)
        return
    indices = primitive.get("indices")
    if primitive.get("mode", _TRIANGLES) != _TRIANGLES or not isinstance(indices, int) or not 0 <= indices < len(accessors):
        return
    promised, found = accessors[indices].get("count"), 3 * len(getattr(decoded, "faces", ()))
    if promised != found:
        text = f"The Draco payload holds {found} indices; the accessor promises {promised}."
        yield Issue("draco", "DRACO_COUNT_MISMATCH", Severity.ERROR, text, pointer=pointer)
