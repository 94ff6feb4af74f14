"""The program: `python -m ncr_validator serve | check | fetch-engine`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError

from ncr_validator.archive import NoRoom
from ncr_validator.bench import Bench, Undecided
from ncr_validator.engine import EngineMissing, engine_folder
from ncr_validator.engine import fetch_engine as install_engine
from ncr_validator.judgement import judge_file, judge_package
from ncr_validator.limits import Limits
from ncr_validator.service import make_app
from ncr_validator.verdicts import Report, Result

INVALID, FAILED = 1, 2

ProfileOption = Annotated[
    Path | None,
    typer.Option(envvar="VALIDATOR_PROFILE", help="Industry limits in the Auditor's rules JSON, instead of those shipped."),
]
SeverityOption = Annotated[
    str | None, typer.Option(envvar="VALIDATOR_PROFILE_SEVERITY", help="What a broken limit is: error, warning or info.")
]

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8010,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "VALIDATOR_API_KEY",
    profile: ProfileOption = None,
    profile_severity: SeverityOption = None,
) -> None:
    """Answer POST /validate/{sku_id} until stopped.

    Callers send the key in X-API-Key. The first line of output is JSON with the address:
    {"url": "http://127.0.0.1:8010/validate"}. Ends with 2 when there is no key or no engine.
    """
    key = os.environ.get(key_env, "")
    if not key:
        raise _stop(f"{key_env} is not set: the validator does not start without an API key.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        limits = _limits(profile, profile_severity)
        tempfile.tempdir = str(limits.work_dir) if limits.work_dir else None  # uploads are spooled there too
        app = make_app(key, limits)
    except (EngineMissing, ValueError) as error:
        raise _stop(str(error)) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise _stop(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
    shown = f"[{host}]" if ":" in host else host
    typer.echo(json.dumps({"url": f"http://{shown}:{listener.getsockname()[1]}/validate"}))
    sys.stdout.flush()
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


@cli.command()
def check(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A .zip, .glb, .gltf, .usdz or image.")],
    sku: Annotated[str | None, typer.Option(help="The product of a .zip.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
    profile: ProfileOption = None,
    profile_severity: SeverityOption = None,
) -> None:
    """Judge one file. Ends with 0 for Valid and Warning, 1 for Invalid, 2 when there is no verdict."""
    try:
        report = _judge(file.absolute(), sku, _limits(profile, profile_severity))
    except (EngineMissing, Undecided, NoRoom, ValueError) as error:
        raise _stop(str(error)) from error
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else _describe(file, report))
    raise typer.Exit(INVALID if report.result is Result.INVALID else 0)


@cli.command("fetch-engine")
def fetch_engine() -> None:
    """Install the Khronos glTF validator by npm, unless it is there already.

    It goes into NCR_VALIDATOR_ENGINE_DIR, else into share/ncr-validator of this Python environment.
    """
    folder = engine_folder()
    try:
        fetched = install_engine(folder)
    except (EngineMissing, OSError) as error:
        raise _stop(str(error)) from error
    typer.echo(f"The Khronos engine {'is now' if fetched else 'was already'} in {folder}.")


def _limits(profile: Path | None, profile_severity: str | None) -> Limits:
    """Raises ValueError for a setting that is none."""
    given = {"profile": profile, "profile_severity": profile_severity}
    try:
        return Limits.model_validate({**Limits().model_dump(), **{name: value for name, value in given.items() if value}})
    except ValidationError as error:
        wrong = (f"VALIDATOR_{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors())
        raise ValueError("; ".join(wrong)) from error


def _judge(file: Path, sku: str | None, limits: Limits) -> Report:
    bench = Bench(limits)
    try:
        if file.suffix.lower() != ".zip":
            return judge_file(file, bench)
        if sku is None:
            raise _stop("A .zip needs --sku: the product whose package it is.")
        with tempfile.TemporaryDirectory(prefix="ncr-validator-", dir=limits.work_dir) as folder, file.open("rb") as archive:
            return judge_package(archive, sku, Path(folder), limits, bench)
    finally:
        bench.close()


def _describe(file: Path, report: Report) -> str:
    lines = [f"{file.name}: {report.result}"]
    for issue in report.issues:
        place = " ".join(part for part in (issue.file, issue.pointer) if part)
        lines.append(f"  {issue.severity.value:8}{issue.code:40}{place}: {issue.message}")
    lines += [f"  {'not looked into':48}{one.file}" for one in report.files if not one.checked]
    return "\n".join(lines)


def _stop(message: str) -> typer.Exit:
    typer.echo(f"ncr_validator: {message}", err=True)
    return typer.Exit(FAILED)


if __name__ == "__main__":
    cli()
