"""The command line: `ncr --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ncr_upload import __version__

cli = typer.Typer(
    name="ncr",
    help="NCR Upload API: delivers 3D product assets, whole or not at all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
database = typer.Typer(help="The service's own tables.", no_args_is_help=True)
cli.add_typer(database, name="db")

EXIT_USAGE = 2


def main(arguments: list[str] | None = None) -> None:
    """Run a command; `arguments` instead of the process's own."""
    from ncr_upload.entrypoints.settings import SettingsInvalid

    try:
        cli(arguments, prog_name="ncr")
    except SettingsInvalid as invalid:
        typer.echo(f"ncr: {invalid}", err=True)
        sys.exit(EXIT_USAGE)


@cli.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@cli.command()
def api(
    reload: Annotated[bool, typer.Option("--reload", help="Restart when the code changes (development).")] = False,
) -> None:
    """Serve the HTTP API on API_HOST:API_PORT (8001)."""
    from ncr_upload.entrypoints import programs
    from ncr_upload.entrypoints.api_server import serve
    from ncr_upload.entrypoints.logs import set_up_logs
    from ncr_upload.entrypoints.settings import load_settings

    settings = load_settings()
    set_up_logs(settings)
    try:
        programs.require_port(settings.api_host, settings.api_port, "API_PORT")
    except programs.PortRefused as refused:
        _stop(str(refused), code=1)
    serve(settings, reload=reload or settings.api_reload)


@cli.command()
def worker(
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Jobs at once; CELERY_WORKER_CONCURRENCY unless given.")
    ] = None,
) -> None:
    """Run a Celery worker (prefork) that carries out jobs."""
    from ncr_upload.entrypoints import programs
    from ncr_upload.entrypoints.bootstrap import deliveries
    from ncr_upload.entrypoints.settings import load_settings

    settings = load_settings()
    try:
        deliveries.require_worker_settings(settings)
    except deliveries.SettingsMissing as missing:
        _stop(str(missing))
    programs.run_worker(settings, concurrency)


@cli.command()
def beat() -> None:
    """Run the sweeper: rings for waiting jobs, takes over lost ones, releases batches. Two at once are harmless."""
    from ncr_upload.entrypoints import programs
    from ncr_upload.entrypoints.settings import load_settings

    programs.run_beat(load_settings())


@cli.command()
def flower() -> None:
    """Run the Flower dashboard on FLOWER_PORT (5555); on 127.0.0.1 only unless FLOWER_BASIC_AUTH is set."""
    from ncr_upload.entrypoints import programs
    from ncr_upload.entrypoints.settings import load_settings

    try:
        programs.run_flower(load_settings())
    except programs.PortRefused as refused:
        _stop(str(refused), code=1)


@cli.command()
def dev(
    state_dir: Annotated[Path, typer.Option(help="Where the stack keeps its data, logs and secrets.")] = Path("var/dev"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The API's port; 0 takes a free one.")] = 8001,
    database_url: Annotated[
        str | None, typer.Option("--database", metavar="URL", help="A database to use instead of the stack's own SQLite.")
    ] = None,
    endpoints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write addresses, logins and process ids there, as JSON, once ready.")
    ] = None,
) -> None:
    """Run the whole stack on this machine until interrupted: Redis, database, S3, SFTP, validator, API, worker, beat."""
    from ncr_upload.entrypoints.embedded.dev import run_dev

    raise typer.Exit(run_dev(state_dir=state_dir, port=port, database=database_url, endpoints=endpoints))


@cli.command()
def demo(
    state_dir: Annotated[Path, typer.Option(help="Where the stack keeps its data, logs and secrets.")] = Path("var/demo"),
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the tour.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the stack up afterwards, until interrupted.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what was seen there, as an SVG, when all held.")
    ] = None,
) -> None:
    """Deliver one product, and see one refused, on the whole stack; check it all; then stop."""
    from ncr_upload.entrypoints.embedded.demo import run_demo

    raise typer.Exit(run_demo(state_dir=state_dir, json_output=json_output, keep=keep, picture=picture))


@cli.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    before_upgrade: Annotated[
        bool, typer.Option("--before-upgrade", help="`ncr db upgrade` follows: ncr_* tables that lack something are right.")
    ] = False,
) -> None:
    """Try every outside part with the current settings; say what is right, or what is wrong and the next step.

    Exit status 1 when something is wrong. Sends no package, changes nothing, prints no secret."""
    import json

    from ncr_upload.entrypoints.bootstrap.doctor import make_checks
    from ncr_upload.entrypoints.doctor import Finding, State, examine, is_well, render
    from ncr_upload.entrypoints.secrets import make_redactor
    from ncr_upload.entrypoints.settings import SettingsInvalid, load_settings

    try:
        settings = load_settings()
        findings = examine(make_checks(settings, before_upgrade=before_upgrade), redactor=make_redactor(settings))
    except SettingsInvalid as invalid:
        findings = [Finding("settings", State.WRONG, str(invalid), "settings_invalid", "Correct them; nothing else was tried.")]
    well = is_well(findings)
    if json_output:
        typer.echo(json.dumps({"ok": well, "findings": [finding.to_json() for finding in findings]}, indent=2))
    else:
        typer.echo(render(findings))
    raise typer.Exit(0 if well else 1)


@database.command("upgrade")
def upgrade_database() -> None:
    """Bring the service's own tables (ncr_*) to this release. The studio's tables are never touched. Safe to run at once
    with another; a database that a newer release has upgraded is left alone."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    with _told_errors():
        before, after = records.upgrade_database(load_settings())
        typer.echo(f"already at {after}" if before == after else f"upgraded from {before or 'nothing'} to {after}")


@database.command("downgrade")
def downgrade_database(
    revision: Annotated[str, typer.Argument(help="Where to go back to: a revision such as 0001, or base for no tables.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take the service's own tables (ncr_*) back to an older revision; what only the newer one keeps is lost."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    if not yes:
        typer.confirm(f"Take the ncr_* tables back to {revision}, losing what only newer revisions keep?", abort=True)
    with _told_errors():
        try:
            before, after = records.downgrade_database(load_settings(), revision)
        except LookupError:
            _stop(f"this release knows no revision '{revision}'; see `ncr db current`")
        typer.echo(f"already at {after}" if before == after else f"downgraded from {before} to {after or 'nothing'}")


@database.command("current")
def current_revision() -> None:
    """Say at which revision the service's own tables are, and which this release needs."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    with _told_errors():
        current, needed = records.read_revisions(load_settings())
        typer.echo(f"at {current or 'nothing'}; this release needs {needed}")


@database.command("check")
def check_database() -> None:
    """Exit 0 when this release can work on the database: its own tables are there and the studio's have what it needs."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    with _told_errors():
        current, needed = records.read_revisions(load_settings())
        if current is None or current < needed:
            _stop(f"the ncr_* tables are at {current or 'nothing'}, not at {needed}: run `ncr db upgrade`", code=1)
        records.check_database_tables(load_settings())
        typer.echo(f"at {current}, with every table and column that this release needs")


@database.command("plan")
def plan_upgrade() -> None:
    """List the migrations that `ncr db upgrade` would run; exit 1 if one does more than add, which the release that runs beside
    might not live with."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings
    from ncr_upload.migrations.expanding import find_contractions, pending_revisions

    with _told_errors():
        current, needed = records.read_revisions(load_settings())
    pending = pending_revisions(current)
    typer.echo(f"at {current or 'nothing'}; this release needs {needed}; {len(pending)} migrations to run")
    for path in pending:
        typer.echo(f"  {path.stem}")
    found = [f"{path.name}, {contraction}" for path in pending for contraction in find_contractions(path)]
    if found and current is not None:
        _stop(f"not expand-only: {'; '.join(found)}", code=1)


@database.command("backup")
def backup_ledger() -> None:
    """Write the ledger (ncr_*), as it is at one moment, to standard output as gzipped JSON lines. Any kind of database."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    if sys.stdout.isatty():
        _stop("the backup goes to standard output: redirect it, as in `ncr db backup >ledger.jsonl.gz`")
    with _told_errors():
        rows = records.backup_ledger(load_settings(), sys.stdout.buffer)
        sys.stdout.flush()
        typer.echo(f"saved {rows} rows", err=True)


@database.command("restore")
def restore_ledger() -> None:
    """Put back what the ledger has lost of the backup on standard input; what it still has stays as it is, being newer.

    Live tasks of the backup wait to be claimed again; one that was delivered meanwhile is found out by its row in the
    studio's tables, and is not delivered again."""
    from ncr_upload.entrypoints.bootstrap import records
    from ncr_upload.entrypoints.settings import load_settings

    with _told_errors():
        back = records.restore_ledger(load_settings(), sys.stdin.buffer)
        told = f"put back {back.tasks} tasks, {len(back.live)} of them live; {back.kept} were there still"
        typer.echo(told + (f"; {back.superseded} are superseded by newer ones" if back.superseded else ""))


@contextmanager
def _told_errors() -> Iterator[None]:
    """A failure of the database is one line and exit status 1."""
    from ncr_upload.domain.errors import DeliveryError

    try:
        yield
    except DeliveryError as error:
        _stop(str(error), code=1)


def _stop(message: str, code: int = EXIT_USAGE) -> NoReturn:
    typer.echo(f"ncr: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
