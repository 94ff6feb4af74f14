"""One line per event, JSON or plain text, the same for our code and the libraries', without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def set_up(**settings: Any) -> None:
    set_up_logs(Settings(_env_file=None, **settings))


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_our_lines_and_the_libraries_have_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    set_up()
    structlog.stdlib.get_logger("ncr.worker").info("job_ended", task_id="t1", seconds=3)
    logging.getLogger("uvicorn.error").warning("port %d", 8001)
    ours, theirs = lines(capsys)
    assert (ours["event"], ours["task_id"], ours["seconds"], ours["logger"]) == ("job_ended", "t1", 3, "ncr.worker")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("port 8001", "warning", "uvicorn.error")
    assert ours["timestamp"].endswith("Z")


def test_a_trace_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    set_up()
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.stdlib.get_logger().exception("broke")
        logging.getLogger("celery.worker").exception("broke")
    assert all("ValueError: odd" in line["exception"] for line in lines(capsys))


def test_text_has_no_colour_codes_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(log_format="text")
    structlog.stdlib.get_logger().info("job_ended", task_id="t1")
    written = capsys.readouterr().err
    assert "task_id=t1" in written
    assert "\x1b" not in written


def test_text_carries_no_commands_of_strangers_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(log_format="text")
    structlog.stdlib.get_logger().info("request", path="/\x1b]0;owned\x07")
    logging.getLogger("celery").warning("the server says \x1b[2J %s", "\x9b1m")
    try:
        raise ValueError("odd \x1b[31m")
    except ValueError:
        structlog.stdlib.get_logger().exception("broke")
    written = capsys.readouterr().err
    assert not any(character in written for character in "\x1b\x07\x9b")
    assert "path=/\\x1b]0;owned\\x07" in written
    assert "Traceback (most recent call last):\n" in written


def test_a_trace_in_text_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    password = "s3cr3t-" * 20
    set_up(log_format="text", sftp_password=SecretStr(password))
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.stdlib.get_logger().exception("broke")
    written = capsys.readouterr().err
    assert "ValueError: odd" in written
    assert "s3cr3t" not in written.replace(__file__, "").replace('"s3cr3t-" * 20', "")


def test_below_the_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(log_level="WARNING")
    structlog.stdlib.get_logger().info("quiet")
    logging.getLogger("celery").info("quiet")
    assert lines(capsys) == []


def test_uvicorns_own_request_lines_are_off(capsys: pytest.CaptureFixture[str]) -> None:
    set_up()
    logging.getLogger("uvicorn.access").info("GET /jobs?secret=1")
    assert lines(capsys) == []


def test_no_secret_of_the_settings_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(
        sftp_password=SecretStr("s3cr&t/pw"),
        redis_password=SecretStr("red&s-pw"),
        validator_api_key=SecretStr('quote"pw'),
        database_url=SecretStr("postgresql+psycopg://ann:db%2Fpw-1@db/ncr"),
    )
    log = structlog.stdlib.get_logger()
    log.info("login", password="s3cr&t/pw", url="redis://:red%26s-pw@localhost/0")
    log.info("connect to postgresql+psycopg://ann:db%2Fpw-1@db/ncr")
    log.info("login refused for db/pw-1")
    log.info('sent quote"pw')
    written = capsys.readouterr().err
    assert written.count("***") == 5
    assert "pw" not in written.replace("password", "")


def test_the_password_of_a_database_url_is_hidden_as_the_driver_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(database_url=SecretStr("postgresql+psycopg://ann:db/pw-1@db/ncr"))
    structlog.stdlib.get_logger().info("connect to postgresql+psycopg://ann:db/pw-1@db/ncr")
    assert "pw" not in capsys.readouterr().err
