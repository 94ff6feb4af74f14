"""Jobs that are ready to run: those that the seed README's commands name.

As a program, it puts them where the settings lead to, and makes the studio's tables there: `python -m …embedded.samples`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import obstore
from obstore.store import S3Store
from sqlalchemy import Engine

from ncr_upload.adapters.sql.engine import translated_errors
from ncr_upload.entrypoints.bootstrap.records import make_engine
from ncr_upload.entrypoints.embedded.endpoints import Bucket
from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.studio import Listed, RowTaken, add_job, create_tables
from ncr_upload.entrypoints.settings import load_settings


@dataclass(frozen=True, slots=True)
class Sample:
    job_id: str
    sku: str
    campaign: str
    row_id: int | None = None


SEED_README_JOBS = (
    Sample("your-job-id", "VASE-1001", "your-campaign", row_id=123),
    Sample("job-1", "VASE-1002", "campaign1"),
    Sample("job-2", "VASE-1003", "campaign2"),
)


def put_objects(bucket: Bucket, objects: Mapping[str, bytes]) -> None:
    """Put every object into the bucket, one after the other: rclone's S3 server may lose one of several in a new folder."""
    store = S3Store(
        bucket["bucket"],
        endpoint=bucket["endpoint"],
        access_key_id=bucket["access_key"],
        secret_access_key=bucket["secret_key"],
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "20s"},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=5)},
    )

    for key, data in objects.items():
        obstore.put(store, key, data)


def place_product(
    bucket: Bucket, engine: Engine, job_id: str, product: Product, *, campaign: str, row_id: int | None = None
) -> int:
    """The product's files in the bucket, and a job for them that awaits upload; returns its `job_details.id`."""
    put_objects(bucket, product.files)
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    return add_job(engine, job_id, product.sku, [Listed(key, now) for key in product.files], campaign=campaign, row_id=row_id)


def arm_seed_readme_jobs(engine: Engine, bucket: Bucket) -> list[str]:
    """Make the seed README's jobs await upload, whatever became of them before; returns what could not be done.

    A row 123 that belongs to someone else's job (with `--database`) is left alone.
    """
    problems = []
    for number, sample in enumerate(SEED_README_JOBS, start=1):
        product = make_product(f"artists/{sample.job_id}", sample.sku, seed=number)
        try:
            place_product(bucket, engine, sample.job_id, product, campaign=sample.campaign, row_id=sample.row_id)
        except RowTaken as taken:
            problems.append(str(taken))
    return problems


def main() -> None:
    settings = load_settings()
    engine = make_engine(settings, pool_size=1)
    with translated_errors(engine):
        create_tables(engine)
    bucket: Bucket = {
        "endpoint": settings.wasabi_endpoint or "",
        "access_key": settings.wasabi_access_key.get_secret_value() if settings.wasabi_access_key else "",
        "secret_key": settings.wasabi_secret_key.get_secret_value() if settings.wasabi_secret_key else "",
        "bucket": settings.bucket_name or "",
    }
    problems = arm_seed_readme_jobs(engine, bucket)
    sys.exit("; ".join(problems) or None)


if __name__ == "__main__":
    main()
