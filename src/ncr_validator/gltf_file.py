"""A glTF or GLB file taken apart as far as its images and Draco payloads go. Reads only the pieces asked for."""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes

from ncr_validator.formats import KTX2_MAGIC

_MAX_JSON_BYTES = 256 * 1024 * 1024


class Unreadable(Exception):
    """The file, or the piece asked for, is not there or not what it should be; the message says so."""


class GltfFile:
    """`external` maps each external URI to the confined file on disk. Raises `Unreadable`."""

    def __init__(self, path: Path, external: Mapping[str, str]) -> None:
        self._path = path
        self._external = external
        self._binary: tuple[int, int] | None = None  # of the GLB's BIN chunk: start, length
        self.document = self._read_document()

    def objects(self, name: str) -> list[dict[str, Any]]:
        """The top-level array `name`, without what is no object in it."""
        found = self.document.get(name)
        return [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else []

    def uses(self, extension: str) -> bool:
        used = self.document.get("extensionsUsed")
        return isinstance(used, list) and extension in used

    def view(self, index: object) -> bytes:
        """The bytes of a buffer view."""
        view = _pick(self.objects("bufferViews"), index, "bufferView")
        offset, length = _count(view.get("byteOffset", 0)), _count(view.get("byteLength"))
        buffer_index = view.get("buffer")
        buffer = _pick(self.objects("buffers"), buffer_index, "buffer")
        uri = buffer.get("uri")
        if uri is None:
            return self._read_binary(buffer_index, offset, length)
        if isinstance(uri, str) and uri.startswith("data:"):
            return _whole(read_data_uri(uri)[offset : offset + length], length)
        with self._open_external(uri) as file:
            file.seek(offset)
            return _whole(file.read(length), length)

    def image(self, image: Mapping[str, Any]) -> IO[bytes]:
        """The image's bytes."""
        uri = image.get("uri")
        if uri is None:
            return io.BytesIO(self.view(image.get("bufferView")))
        if isinstance(uri, str) and uri.startswith("data:"):
            return io.BytesIO(read_data_uri(uri))
        return self._open_external(uri)

    def file_beside(self, image: Mapping[str, Any]) -> Path | None:
        """The file that the image is, if it is one and the engine found it."""
        found = self._external.get(str(image.get("uri")))
        return Path(found) if found else None

    def _open_external(self, uri: object) -> IO[bytes]:
        if not isinstance(uri, str) or uri not in self._external:
            raise Unreadable(f"{uri!r} is not in the package")
        return Path(self._external[uri]).open("rb")

    def _read_binary(self, buffer_index: object, offset: int, length: int) -> bytes:
        if self._binary is None or buffer_index != 0:
            raise Unreadable("a buffer has neither an address nor a GLB chunk")
        start, available = self._binary
        if offset + length > available:
            raise Unreadable("a bufferView leads out of the GLB")
        with self._path.open("rb") as file:
            file.seek(start + offset)
            return _whole(file.read(length), length)

    def _read_document(self) -> dict[str, Any]:
        with self._path.open("rb") as file:
            head = file.read(12)
            text = self._read_glb_json(file) if head.startswith(b"glTF") else head + file.read(_MAX_JSON_BYTES)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Unreadable("its JSON cannot be read") from error
        if not isinstance(document, dict):
            raise Unreadable("its JSON is no object")
        return document

    def _read_glb_json(self, file: IO[bytes]) -> bytes:
        length, kind = _chunk(file)
        if kind != b"JSON" or length > _MAX_JSON_BYTES:
            raise Unreadable("its first chunk is no JSON")
        text = _whole(file.read(length), length)
        header = file.read(8)
        if len(header) == 8 and header[4:] == b"BIN\0":
            self._binary = (file.tell(), int(struct.unpack("<L", header[:4])[0]))
        return text


def is_ktx2(file: IO[bytes]) -> bool:
    start = file.read(len(KTX2_MAGIC))
    file.seek(0)
    return start == KTX2_MAGIC


def read_data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI. Raises `Unreadable`."""
    head, comma, body = uri.partition(",")
    try:
        return base64.b64decode(unquote_to_bytes(body), validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise Unreadable("a data URI is damaged" if comma else "a data URI has no data") from error


def _chunk(file: IO[bytes]) -> tuple[int, bytes]:
    header = file.read(8)
    if len(header) < 8:
        raise Unreadable("it is cut off")
    return int(struct.unpack("<L", header[:4])[0]), header[4:]


def _pick(objects: list[dict[str, Any]], index: object, what: str) -> dict[str, Any]:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(objects):
        raise Unreadable(f"{what} {index!r} does not exist")
    return objects[index]


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise Unreadable(f"{value!r} is no number of bytes")
    return value


def _whole(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise Unreadable(f"{length} bytes should be there, {len(data)} are")
    return data
