"""The background processes: `python start_worker.py worker|beat|flower` (the same as `ncr worker|beat|flower`)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ncr_upload.entrypoints.cli import main

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)  # `.env` and `var/` are here, wherever this is started from
    main(sys.argv[1:] or ["--help"])
