"""Delivery over SFTP, on asyncssh: `login` connects, `remote` asks with time-outs, `upload` sends a file,
`package` stages files under a `manifest`, `dropoff` owns the staging folder and publishes, `scratch` tries out what the
login may do."""

from ncr_upload.adapters.sftp_dropoff.allowance import WAIT_SECONDS, Limits
from ncr_upload.adapters.sftp_dropoff.dropoff import SftpDropoff
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin
from ncr_upload.adapters.sftp_dropoff.scratch import COSTS, NEXT_STEPS

__all__ = ["COSTS", "NEXT_STEPS", "WAIT_SECONDS", "Limits", "SftpDropoff", "SftpLogin"]
