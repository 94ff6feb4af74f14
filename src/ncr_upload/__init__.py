"""NCR Upload API: delivers 3D product assets from S3 to a partner's SFTP server, whole or not at all."""

__version__ = "0.2.0"
