"""Object storage over any S3 API, on urllib3."""

from ncr_upload.adapters.object_store.store import S3ObjectStore

__all__ = ["S3ObjectStore"]
