"""What is delivered in a trial: small and larger products, every version of every job different in bytes and in sizes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ncr_upload.entrypoints.embedded.product import Product, break_model, make_product

BASES = 3
LARGE_EXTRA_BYTES = 3_000_000
PADDED = ("obj", "mtl")
IN_SMALL = (".glb", ".blend", ".mtl", "_front.jpg")


@dataclass(frozen=True)
class Version:
    """One upload of the artist: object keys with their bytes, and what the delivery is to hold."""

    number: int
    sku: str
    objects: Mapping[str, bytes]
    delivered: Mapping[str, bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Path below the job's folder → bytes."""
        return {target: len(content) for target, content in self.delivered.items()}

    @property
    def hashes(self) -> dict[str, str]:
        return {target: hashlib.sha256(content).hexdigest() for target, content in self.delivered.items()}


def draw_version(numbers: random.Random, job_id: str, number: int, *, large: bool = False, broken: bool = False) -> Version:
    """A version of the job's product. `broken`: only a real validator sees that it is."""
    sku = f"SKU-{job_id}"
    base = _base(numbers.randrange(BASES), broken)
    wanted = [key for key in base.targets if large or (key.endswith(IN_SMALL) and "/Materials/" not in key)]
    objects, delivered = {}, {}
    for key in wanted:
        content = base.files[key]
        if key.endswith(PADDED):
            most = LARGE_EXTRA_BYTES if large and key.endswith("obj") else 20_000
            content += _remark(numbers, f"{job_id} version {number}", most)
        renamed = key.replace(base.sku, sku).replace("chaos/", f"chaos/{job_id}/v{number}/", 1)
        objects[renamed] = content
        delivered[base.targets[key].replace(base.sku, sku)] = content
    return Version(number, sku, objects, delivered)


@cache
def _base(seed: int, broken: bool) -> Product:
    product = make_product("chaos", "BASE", seed=seed + 1)
    return break_model(product) if broken else product


def _remark(numbers: random.Random, text: str, most: int) -> bytes:
    """Comment lines that do not pack well."""
    lines = [f"# {text}"]
    lines += [f"# {numbers.randbytes(60).hex()}" for _ in range(numbers.randint(1, max(1, most // 123)))]
    return ("\n".join(lines) + "\n").encode()
