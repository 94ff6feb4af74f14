"""The zip for the validator, made while its files arrive."""

from ncr_upload.adapters.zip_archive.archive import ZipArchiver

__all__ = ["ZipArchiver"]
