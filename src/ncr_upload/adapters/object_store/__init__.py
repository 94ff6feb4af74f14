"""Object storage over any S3 API, on obstore."""

from ncr_upload.adapters.object_store.store import S3ObjectStore

__all__ = ["S3ObjectStore"]
