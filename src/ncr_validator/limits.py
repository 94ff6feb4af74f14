"""Every bound of the validator, read from the environment (`VALIDATOR_*`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import DirectoryPath, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MB = 1024 * 1024


class Limits(BaseSettings):
    """Bounds and choices; `docs/validator.md` lists them for operators."""

    model_config = SettingsConfigDict(env_prefix="VALIDATOR_", env_ignore_empty=True, extra="ignore")

    # The upload and the zip
    max_upload_mb: int = Field(4096, ge=1, description="The multipart body.")
    max_entries: int = Field(10_000, ge=1, description="Entries of a zip.")
    max_entry_mb: int = Field(4096, ge=1, description="One entry, unpacked.")
    max_unpacked_mb: int = Field(8192, ge=1, description="All entries, unpacked.")
    max_ratio: float = Field(100, gt=1, description="Unpacked to packed size, of an entry or a zip that passes ratio_floor_mb.")
    ratio_floor_mb: int = Field(100, ge=0, description="What unpacks to less than this is no bomb, whatever its ratio.")
    work_dir: DirectoryPath | None = Field(
        None, description="Where uploads are kept and unpacked; default: the system's temporary folder."
    )

    # The children that look inside the files
    file_seconds: float = Field(120, gt=0, description="Kill timer of one look at one file.")
    engine_memory_mb: int = Field(4096, ge=768, description="Private memory of the Node child; Node alone takes 500.")
    inspector_memory_mb: int = Field(2048, ge=128, description="Private memory of the Python child (images, Draco, USD).")
    files_per_child: int = Field(500, ge=1, description="A child is replaced after so many files.")
    max_image_pixels: int = Field(134_217_728, ge=1, description="Width x height of an image; more is a bomb. 16384 x 8192.")
    max_issues_per_file: int = Field(
        100_000, ge=1, description="Where the Khronos engine stops; a truncated report is Invalid."
    )

    # The service
    concurrency: int = Field(2, ge=1, le=64, description="Packages judged at once.")
    queue_length: int = Field(8, ge=0, description="Uploads that may wait for their turn; more are told 503.")
    upload_idle_seconds: float = Field(120, gt=0, description="How long an upload may stall before it is told 408.")
    queue_seconds: float = Field(60, gt=0, description="How long an upload waits for its turn before it is told 503.")

    # The rules
    main_model: Literal["required", "any", "optional"] = Field(
        "any", description="Whether {sku}/{sku}.glb must be there: required; any other model will do, with a warning; optional."
    )
    profile: Path | None = Field(None, description="Industry limits in the Auditor's rules JSON; default: the one shipped.")
    profile_severity: Literal["error", "warning", "info"] = "warning"
    usd: bool = Field(True, description="Use usd-core when it is installed.")
