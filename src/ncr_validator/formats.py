"""Which files are looked into, and how. Names and numbers only."""

from __future__ import annotations

GLTF_EXTENSIONS = frozenset({"glb", "gltf"})
IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "tga", "bmp", "gif", "avif", "tif", "tiff", "psd", "dds", "ktx2"})
KTX2_MAGIC = b"\xabKTX 20\xbb\r\n\x1a\n"
