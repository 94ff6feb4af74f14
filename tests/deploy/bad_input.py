"""What deploy.sh refuses: with exit status 2, what is wrong and what next, before anything is touched."""

from __future__ import annotations

import socket
from collections.abc import Callable

from deploy.report import Report
from deploy.site import Site


def refuse_at_first(site: Site, report: Report) -> None:
    """On a host where nothing runs yet."""
    port = site.settings["API_PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        _refuse(site, report, "a taken port", ("deploy",), f"port {port} is taken")
    env = site.folder / ".env"
    whole = env.read_text()
    _refuse(site, report, "no earlier release", ("rollback",), "no earlier release")
    _refuse(site, report, "nothing deployed", ("backup",), "no release is deployed here")
    _refuse(site, report, "no such backup", ("restore", "nowhere"), "no release is deployed here")
    for arguments, words in (
        (("deploy", "a b"), "cannot be a release"),
        (("deploy", "a", "b"), "takes one release"),
        (("deploy", "--bogus"), "does not know --bogus"),
        (("rollback", "r1"), "does not know r1"),
        (("health", "web"), "does not know web"),
        (("monitor", "--twice"), "does not know --twice"),
        (("backup", "there"), "does not know there"),
        (("restore", "--bogus"), "does not know --bogus"),
        (("cleanup", "all"), "does not know all"),
        (("logs", "--bogus"), "does not know --bogus"),
        (("explode",), "there is no command 'explode'"),
    ):
        _refuse(site, report, "input it does not know", arguments, words)
    env.unlink()
    site.deploy("init")
    report.expect(env.stat().st_mode & 0o777 == 0o600, "init writes an .env that others may read")
    for arguments in (("init",), ("init", "--embedded")):
        _refuse(site, report, "an .env in use", arguments, "there is a .env already")
    _refuse(site, report, "an .env without values", ("deploy",), "not set in .env: WASABI_ENDPOINT")
    _begin_with_a_copy(site, report)
    env.write_text(whole)
    report.expect(site.deploy("--help").stdout.startswith("usage:"), "--help shows no usage")
    report.expect(not site.containers("web") and not site.containers("redis"), "a refused deploy started something")


def refuse_while_running(site: Site, report: Report) -> None:
    """What runs must be the same containers afterwards."""
    before = site.everything()
    env = site.folder / ".env"
    whole = env.read_text()

    def without(name: str) -> Callable[[], object]:
        kept = [line for line in whole.splitlines() if not line.startswith(f"{name}=")]
        return lambda: env.write_text("\n".join(kept) + "\n")

    def with_line(line: str) -> Callable[[], object]:
        return lambda: env.write_text(f"{whole}\n{line}\n")

    cases: tuple[tuple[str, Callable[[], object], dict[str, str], str], ...] = (
        ("no engine", lambda: None, {"DOCKER_HOST": "unix:///nowhere.sock"}, "no Docker engine answers"),
        ("a full disk", lambda: None, {"DEPLOY_MIN_FREE_MB": "900000000"}, "MB are free"),
        ("no .env", env.unlink, {}, "there is no .env"),
        ("a setting missing", without("SFTP_HOST"), {}, "not set in .env: SFTP_HOST"),
        ("SQLite", without("DATABASE_URL"), {}, "SQLite cannot be shared"),
        ("too patient a worker", with_line("WORKER_GRACE_SECONDS=900"), {}, "WORKER_GRACE_SECONDS=900"),
        ("a value Compose cannot take", with_line("NCR_WEB_REPLICAS=many"), {}, "do not go together"),
    )
    for name, spoil, environment, words in cases:
        spoil()
        _refuse(site, report, name, ("deploy",), words, **environment)
        env.write_text(whole)
        env.chmod(0o600)
    report.expect(site.everything() == before, "a refused deploy touched what runs")
    pulled = site.deploy("deploy", "nowhere", "--pull", expect=None)
    report.expect(
        pulled.returncode == 1 and "could not be pulled" in pulled.stderr, f"--pull of nothing: {pulled.stderr[-300:]!r}"
    )
    report.expect(site.everything() == before, "an image that cannot be pulled touched what runs")


def _refuse(site: Site, report: Report, name: str, arguments: tuple[str, ...], words: str, **environment: str) -> None:
    done = site.deploy(*arguments, expect=None, **environment)
    told = words in done.stderr and "next: " in done.stderr
    report.expect(done.returncode == 2 and told, f"{name}: ended with {done.returncode}, saying {done.stderr[-300:]!r}")


def _begin_with_a_copy(site: Site, report: Report) -> None:
    """`cp env_sample .env` first, as the README's first words were: `init` fills it in, and keeps what was written there."""
    env, sample = site.folder / ".env", (site.folder / "env_sample").read_text()
    env.write_text(sample)
    told = site.compose("--profile", "embedded", "config", "-q", expect=None)
    report.expect("./deploy.sh init --embedded" in told.stderr, f"compose without secrets says {told.stderr[-300:]!r}")
    site.deploy("init", "--embedded")
    report.expect(
        site.compose("--profile", "embedded", "config", "-q").returncode == 0, "a copy that was filled in does not do"
    )
    env.write_text(sample.replace("SFTP_HOST=", "SFTP_HOST=partner.example"))
    site.deploy("init")
    held = env.read_text()
    report.expect("SFTP_HOST=partner.example\n" in held and "\nAPI_KEY=\n" not in held, "init does not fill in what is there")
