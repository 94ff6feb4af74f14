"""Delivery over SFTP, on asyncssh: `login` connects, `remote` asks with time-outs, `upload` sends a file,
`package` stages files under a `manifest`, `dropoff` owns the staging folder and publishes."""

from ncr_upload.adapters.sftp_dropoff.allowance import WAIT_SECONDS, Limits
from ncr_upload.adapters.sftp_dropoff.dropoff import SftpDropoff
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin

__all__ = ["WAIT_SECONDS", "Limits", "SftpDropoff", "SftpLogin"]
