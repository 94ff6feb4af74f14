"""What is delivered in the benchmarks: packages of incompressible files, the same bytes in every run.

They are written once into a folder of the system's temporary files (NCR_BENCH_DATA names another) and stay there.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "studio"
MIB = 1024 * 1024
BLOCK_BYTES = 16 * MIB


@dataclass(frozen=True)
class DataSet:
    """Object keys with their sizes in bytes. The files of a `sparse` one are zeros, which take no disk: for memory figures,
    where the content makes no difference (nothing on the way compresses it)."""

    name: str
    files: tuple[tuple[str, int], ...]
    sparse: bool = False

    @property
    def sku(self) -> str:
        """Also the folder of its objects."""
        return self.name.upper()

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.files]


def _package() -> DataSet:
    """A product as studios deliver it: a main model, a material, textures of 1 to 12 MB; 36 files, 268 MB."""
    textures = [1 + 11 * (number % 12) / 11 for number in range(34)]
    scale = (268 - 48 - 12) / sum(textures)
    files = [("PACKAGE/GLB_files/PACKAGE.glb", 48_000_000)]
    files += [("PACKAGE/Materials/6f1f4b52-8a55-4a7c-9a3c-2b1d5c7e9f01.glb", 12_000_000)]
    files += [(f"PACKAGE/material/sources/map_{n:02}.png", int(size * scale * 1e6)) for n, size in enumerate(textures)]
    return DataSet("package", tuple(files))


def _small(name: str, count: int, size: int) -> DataSet:
    sku = name.upper()
    files = [(f"{sku}/GLB_files/{sku}.glb", size)]
    files += [(f"{sku}/material/sources/map_{number:03}.png", size) for number in range(count - 1)]
    return DataSet(name, tuple(files))


def _huge(name: str, size: int, *, sparse: bool = False) -> DataSet:
    return DataSet(name, ((f"{name.upper()}/GLB_files/{name.upper()}.glb", size),), sparse)


def _changed(data: DataSet) -> DataSet:
    """One texture of middling size is another object, with the same place in the package."""
    key, size = data.files[8]
    other = (f"CHANGED/{key.partition('/')[2]}", size)
    return DataSet(data.name, (*data.files[:8], other, *data.files[9:]))


PACKAGE = _package()
MANY_SMALL = _small("many_small", 300, 50_000)
ONE_HUGE = _huge("one_huge", 1024 * MIB)
TINY = _small("tiny", 2, 200_000)
FIVE_GIB = _huge("five_gib", 5 * 1024 * MIB, sparse=True)
ONE_FILE = _huge("one_file", PACKAGE.bytes)
CHANGED = _changed(PACKAGE)
DATA_SETS = (PACKAGE, CHANGED, MANY_SMALL, ONE_HUGE, TINY, ONE_FILE, FIVE_GIB)


def place_data() -> Path:
    """The folder with the bucket in it; writes what is not there yet."""
    root = Path(os.environ.get("NCR_BENCH_DATA", Path(tempfile.gettempdir()) / f"ncr-bench-data-{os.getuid()}"))
    content = None
    for data in DATA_SETS:
        for key, size in data.files:
            path = root / BUCKET / key
            if path.exists() and path.stat().st_size == size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if data.sparse:
                with path.open("wb") as file:
                    file.truncate(size)
                continue
            content = content or memoryview(random.Random("ncr").randbytes(BLOCK_BYTES))
            write(path, key, size, content)
    return root


def write(path: Path, key: str, size: int, content: memoryview) -> None:
    """The block from a place that the key decides, over and over, each time with other first bytes."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for piece in _pieces(key, size, content):
            file.write(piece)
    part.replace(path)


def _pieces(key: str, size: int, content: memoryview) -> Iterator[memoryview | bytes]:
    draw = random.Random(key)
    while size:
        mark = draw.randbytes(min(64, size))
        start = draw.randrange(BLOCK_BYTES // 2)
        piece = content[start : start + min(size - len(mark), BLOCK_BYTES // 2)]
        yield mark
        yield piece
        size -= len(mark) + len(piece)
