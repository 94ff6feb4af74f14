"""A worker's program without Celery's loop, with a fault nobody foresaw: `worker_program.py PLACE TASK_ID...`.

PLACE is `module:Class.method`. Tasks are answered one after another as their rings would be; for those with a `!` before
their id the method raises KeyError. Settings come by the environment, logs go to stderr as the worker's do.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.worker import run_job, settings

place, *tasks = sys.argv[1:]
module, _, names = place.partition(":")
owner, _, method = names.partition(".")
kind = getattr(import_module(module), owner)
well = getattr(kind, method)


def raise_key_error(*_: Any, **__: Any) -> Any:
    raise KeyError("password=hunter2")


set_up_logs(settings)
for task in tasks:
    setattr(kind, method, raise_key_error if task.startswith("!") else well)
    run_job(task.lstrip("!"))
