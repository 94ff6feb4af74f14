"""The checks of `ncr doctor`, on the same adapters the programs use."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from sqlalchemy import Engine

from ncr_upload.adapters.host import MachineHost
from ncr_upload.adapters.redis_status import RedisStatusBoard
from ncr_upload.adapters.sftp_dropoff import COSTS, NEXT_STEPS
from ncr_upload.adapters.sql.catalogue import WORDS_OF_CALLERS
from ncr_upload.adapters.sql.engine import READ_ONLY, describe_server, place_of, translated_errors
from ncr_upload.adapters.sql.own_statements import load_statements, tables_in_use
from ncr_upload.adapters.sql.rows import read_now
from ncr_upload.adapters.sql.schema import check_own_tables
from ncr_upload.adapters.sql.session import find_session_doubts
from ncr_upload.adapters.sql.studio_tables import find_lasting
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable
from ncr_upload.entrypoints.bootstrap import deliveries
from ncr_upload.entrypoints.bootstrap.records import check_studio, make_cache, make_engine
from ncr_upload.entrypoints.doctor import Check, Doubt
from ncr_upload.entrypoints.probes import bounded, probe_store, probe_validator
from ncr_upload.entrypoints.settings import Settings
from ncr_upload.migrations.apply import current_revision, newest_revision

ANSWER_SECONDS = 8.0
DROPOFF_SECONDS = 11.0
"""Some twenty round trips, to a server that may be far away."""

CLOCK_DOUBT_SECONDS = 5.0
CLOCK_WRONG_SECONDS = 300.0
LITTLE_DISK_BYTES = 2 * 1024**3
REFUSED = (401, 403)


def make_checks(settings: Settings, *, before_upgrade: bool = False) -> dict[str, Check]:
    """By part. Each uses connections of its own and closes them."""
    return {
        "settings": lambda: _check_settings(settings),
        "database": lambda: _check_database(settings, before_upgrade),
        "clock": lambda: _check_clock(settings),
        "redis": lambda: _check_redis(settings),
        "s3": lambda: _check_store(settings),
        "validator": lambda: _check_validator(settings),
        "sftp": lambda: _check_dropoff(settings),
        "work_dir": lambda: _check_work_dir(settings),
    }


def _check_settings(settings: Settings) -> Iterator[str | Doubt]:
    try:
        deliveries.require_worker_settings(settings)
    except deliveries.SettingsMissing as missing:
        raise Rejected("settings_missing", str(missing), "Without them no worker starts; the API alone does.") from None
    yield "all that a worker needs is set"
    if settings.api_key is None and settings.api_anonymous == "all":
        yield Doubt("whoever reaches the API may use it", "Set API_KEY, or API_ANONYMOUS=loopback.")


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    engine = make_engine(settings, pool_size=1)
    try:
        yield engine
    finally:
        engine.dispose()


def _check_database(settings: Settings, before_upgrade: bool) -> Iterator[str | Doubt]:
    with _engine(settings) as engine:
        with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
            yield f"{describe_server(connection)} answers at {place_of(engine)}"
        with translated_errors(engine):
            revision, newest = current_revision(engine), newest_revision()
        yield from _check_own_tables(engine, revision, newest, before_upgrade)
        check_studio(engine, settings)
        yield "the studio's tables have every column that is read or written"
        with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
            lasting = find_lasting(connection)
        if lasting:
            yield Doubt(
                f"no transaction of this database covers {', '.join(lasting[:5])}{' and more' if lasting[5:] else ''}",
                "Where the service writes into them, a crash may write twice: ALTER TABLE … ENGINE=InnoDB.",
            )
        with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
            yield from (
                Doubt(*found) for found in find_session_doubts(connection, _words_of_callers(settings), settings.timezone)
            )
        if settings.catalogue_sql is not None:
            yield f"the statements of {settings.catalogue_sql} work on it"


def _words_of_callers(settings: Settings) -> set[str]:
    statements = load_statements(settings.catalogue_sql) if settings.catalogue_sql is not None else {}
    used = tables_in_use(statements)
    return {f"{table}.{column}" for table, columns in WORDS_OF_CALLERS.items() if table in used for column in columns}


def _check_own_tables(engine: Engine, revision: str | None, newest: str, before_upgrade: bool) -> Iterator[str | Doubt]:
    behind = revision is None or revision < newest
    told = f"the ncr_* tables are at {revision or 'nothing'}, not at {newest}"
    if behind and before_upgrade:
        yield f"{told}: the upgrade follows"
        return
    if behind:
        raise Unavailable("database_schema", told, "Run `ncr db upgrade`.")
    if revision != newest:
        yield Doubt(
            f"the ncr_* tables are at {revision}, newer than this release ({newest})",
            "Fine while a newer release is being rolled out; else run that release here too.",
        )
    check_own_tables(engine)
    yield f"the ncr_* tables are at {revision}"


def _check_clock(settings: Settings) -> Iterator[str | Doubt]:
    with (
        _engine(settings) as engine,
        translated_errors(engine),
        engine.connect().execution_options(**READ_ONLY) as connection,
    ):
        read_now(connection)  # connected: now the round trip is short
        before = time.time()
        theirs = read_now(connection)
        after = time.time()
    offset = theirs - (before + after) / 2
    told = f"this machine's clock differs from the database's by {abs(offset):.1f} s"
    step = "Jobs go by the database's clock alone, but logs and S3 signatures do not: keep both machines on NTP."
    if abs(offset) > CLOCK_WRONG_SECONDS:
        raise Unavailable("clock_differs", told, step)
    yield Doubt(told, step) if abs(offset) > CLOCK_DOUBT_SECONDS else told


def _check_redis(settings: Settings) -> Iterator[str | Doubt]:
    place = f"{settings.redis_host}:{settings.redis_port}"
    board = RedisStatusBoard(settings.redis_url(), place, final_seconds=1, answer_seconds=ANSWER_SECONDS / 2)
    facts = board.describe()
    yield f"{facts.version} answers at {place}"
    if facts.eviction == "noeviction" or not facts.max_memory_bytes:
        yield f"it evicts nothing (maxmemory {facts.max_memory_bytes or 'unlimited'}, {facts.eviction})"
    else:
        raise Unavailable(
            "redis_evicts",
            f"it evicts keys when its {facts.max_memory_bytes} bytes are full ({facts.eviction})",
            "Set maxmemory-policy noeviction in its configuration: evicted messages wait for a sweep.",
        )
    if facts.append_only:
        yield "it keeps what it holds over a restart (AOF)"
    else:
        yield Doubt(
            "it forgets what it holds when it restarts (no AOF)", "Set appendonly yes; no job is lost, but all are rung again."
        )


def _check_store(settings: Settings) -> Iterator[str | Doubt]:
    try:
        probe_store(deliveries.make_store(settings), ANSWER_SECONDS)()
    except Rejected as refused:
        if refused.code != "storage_denied":
            raise
        yield Doubt(
            f"{refused.message}: this key cannot tell a missing object from a forbidden one",
            "Allow s3:ListBucket on the bucket and s3:GetObject on its objects to the access key.",
        )
        return
    yield f"bucket {settings.bucket_name!r} answers and takes the access key"


def _check_validator(settings: Settings) -> Iterator[str | Doubt]:
    url = settings.validator_api_url
    if url is None:
        if find_spec("ncr_validator") is None or find_spec("PIL") is None:
            step = "Install ncr-upload[validator], or set VALIDATOR_API_URL."
            raise Unavailable("validator_missing", "VALIDATOR_API_URL is unset, and no bundled validator is installed", step)
        yield "VALIDATOR_API_URL is unset: each worker starts the bundled validator for itself"
        return
    validator = deliveries.make_validator(settings)
    status = probe_validator(url, validator.headers, ANSWER_SECONDS)()
    if status in REFUSED:
        raise Unavailable(
            "validator_key_refused",
            f"the validator at {validator.url} refused the API key ({status})",
            "Correct VALIDATOR_API_KEY and VALIDATOR_API_KEY_HEADER.",
        )
    if status >= 500 or status == 404:
        step = "See its log, and that VALIDATOR_API_URL is the address before /{sku}."
        yield Doubt(f"the validator at {validator.url} answered {status} to a request without a package", step)
        return
    yield f"the validator at {validator.url} answers and did not refuse the key ({status} to a request without a package)"


def _check_dropoff(settings: Settings) -> Iterator[str | Doubt | DeliveryError]:
    patient = settings.model_copy(update={"sftp_timeout_seconds": min(settings.sftp_timeout_seconds, ANSWER_SECONDS)})
    report = bounded("sftp", deliveries.make_dropoff(patient).examine, DROPOFF_SECONDS)()
    place = f"{settings.sftp_host}:{settings.sftp_port}"
    yield f"{place} shows the pinned host key and takes the login of {settings.sftp_username!r}"
    if works := report.works():
        yield f"the login may do below {settings.sftp_base_dir}: {', '.join(works)}"
    for ability in report.failures:
        failure = report.refusal(ability)
        if ability in COSTS:
            yield Doubt(f"{ability.value} is refused ({failure.message}): {COSTS[ability]}", NEXT_STEPS[ability])
        else:
            yield type(failure)(failure.code, f"{ability.value} is refused: {failure.message}", failure.next_step)
    yield f"extensions: {', '.join(report.extensions) or 'none (none is needed)'}"


def _check_work_dir(settings: Settings) -> Iterator[str | Doubt]:
    folder = settings.work_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ncr-doctor-") as file:
            file.write(b"ncr")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Deferred(
            "work_dir_unwritable",
            f"cannot write in WORK_DIR {folder.absolute()}: {error.strerror}",
            "Let this user write there, free space, or point WORK_DIR elsewhere.",
        ) from None
    free = MachineHost().free_disk(folder)
    told = f"{folder.absolute()} can be written, {free / 1024**3:.1f} GiB free"
    step = "Jobs wait for room when a package does not fit: free space or point WORK_DIR at a larger disk."
    cache = make_cache(settings)
    yield Doubt(told, step) if free + cache.held_bytes() < LITTLE_DISK_BYTES else told
    yield str(cache)
