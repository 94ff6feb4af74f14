"""The API for development, restarting when the code changes: `python main.py` (the same as `ncr api --reload`)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ncr_upload.entrypoints.cli import main

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)  # `.env` and `var/` are here, wherever this is started from
    main(["api", "--reload", *sys.argv[1:]])
