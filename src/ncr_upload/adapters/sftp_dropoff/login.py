"""Connecting to the partner's server: a pinned host key, then one of the logins that were configured, nothing else.

No key, agent, configuration or known_hosts file of the account the worker runs under is used unless a setting says so.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable
from ncr_upload.domain.text import QUOTE, bound_line

KEEPALIVES = 3
CLOSE_SECONDS = 3
CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"  # first choice; measured several times the speed of the rest
HOST_KEYS = "+ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,rsa-sha2-256"
"""Taken after those of the pinned types: a server without such a key shows what it has, and is refused for it by name. With
no type in common, it might hang up before it was heard."""
Pins = tuple[list[asyncssh.SSHKey], list[asyncssh.SSHKey], list[asyncssh.SSHKey]]


@dataclass(frozen=True, slots=True)
class SftpLogin:
    """Where and as whom. `host_key` holds public keys ('ssh-ed25519 AAAA…'), separated by commas or line ends."""

    host: str | None
    port: int = 22
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    private_key: Path | None = None
    passphrase: str | None = field(default=None, repr=False)
    agent: bool = False
    host_key: str | None = None
    known_hosts: Path | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


async def disconnect(connection: asyncssh.SSHClientConnection) -> None:
    connection.close()
    try:
        await asyncio.wait_for(connection.wait_closed(), CLOSE_SECONDS)
    except (TimeoutError, OSError, asyncssh.Error):
        connection.abort()


async def connect(login: SftpLogin, timeout_seconds: float) -> asyncssh.SSHClientConnection:
    """A connection that is logged in. Raises `DestinationParked` (host key, login, settings) or `Unavailable`."""
    _check_set(login)
    watch = _HostKeyWatch()
    pins = await asyncio.to_thread(_load_pins, login)
    key = await asyncio.to_thread(_load_key, login)
    try:
        async with _agent_keys(login, timeout_seconds) as agent_keys:
            return await asyncssh.connect(
                login.host or "",
                login.port,
                client_factory=lambda: watch,
                known_hosts=pins,
                server_host_key_algs=HOST_KEYS,
                username=login.username or "",
                password=login.password,
                client_keys=[*key, *agent_keys] or None,
                agent_path=None,
                gss_host=None,
                config=None,
                preferred_auth="publickey,password,keyboard-interactive",
                encryption_algs=CIPHERS,
                compression_algs=None,
                connect_timeout=timeout_seconds,
                login_timeout=timeout_seconds,
                keepalive_interval=max(1.0, timeout_seconds / KEEPALIVES),
                keepalive_count_max=KEEPALIVES,
                utf8_decode_errors="backslashreplace",
            )
    except (asyncssh.Error, OSError, ValueError) as error:
        raise _class_of(error, login, watch) from None


class _HostKeyWatch(asyncssh.SSHClient):
    """Keeps the key a server offered that is not a pinned one."""

    offered: asyncssh.SSHKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002
        self.offered = key
        return False


def _class_of(error: Exception, login: SftpLogin, watch: _HostKeyWatch) -> DeliveryError:
    """The one table from what goes wrong while connecting to our errors."""
    text = str(error)
    no_such_type = isinstance(error, asyncssh.KeyExchangeFailed) and "host key" in text
    if isinstance(error, asyncssh.HostKeyNotVerifiable) or no_such_type:
        offered = f"{watch.offered.get_algorithm()} {watch.offered.get_fingerprint()}" if watch.offered else "none of its type"
        return DestinationParked(
            "host_key_mismatch",
            f"{login.address} did not show the pinned host key (offered: {offered}); nothing was sent",
            "Ask the partner whether their key changed. Only if they confirm it, put the new key in SFTP_HOST_KEY.",
        )
    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in text.lower():
        return DestinationParked(
            "login_refused",
            f"{login.address} refused the login of {login.username!r} ({_tried(login)})",
            "Correct SFTP_USERNAME and SFTP_PASSWORD, SFTP_PRIVATE_KEY or SFTP_AGENT, or ask the partner to unlock the login.",
        )
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return DestinationParked(
            "no_common_algorithm",
            f"{login.address} and this client share no SSH algorithm: {bound_line(text, QUOTE)}",
            "Ask the partner to offer current algorithms.",
        )
    if isinstance(error, TimeoutError):
        cause = "it did not answer in time"
    elif isinstance(error, OSError):
        cause = error.strerror or type(error).__name__
    else:
        cause = bound_line(re.sub(r"[^ -~]+", " ", text), QUOTE) or type(error).__name__
    return Unavailable(
        "sftp_unreachable",
        f"cannot connect to {login.address}: {cause}",
        "It is tried again; see whether the server is up and SFTP_HOST and SFTP_PORT are right.",
    )


def _tried(login: SftpLogin) -> str:
    ways = {"password": login.password, f"key {login.private_key}": login.private_key, "agent": login.agent}
    return "tried: " + ", ".join(way for way, used in ways.items() if used)


def _check_set(login: SftpLogin) -> None:
    missing = [name for name, value in (("SFTP_HOST", login.host), ("SFTP_USERNAME", login.username)) if not value]
    if not (login.password or login.private_key or login.agent):
        missing.append("SFTP_PASSWORD (or SFTP_PRIVATE_KEY or SFTP_AGENT)")
    if missing:
        raise DestinationParked(
            "sftp_unset", f"the destination is not set up: {', '.join(missing)} unset", "Set it in .env and restart the worker."
        )


def _load_pins(login: SftpLogin) -> Pins:
    """The (trusted, authority, revoked) keys for this host."""
    try:
        if login.host_key:
            lines = [line.strip() for line in re.split(r"[,\n]", login.host_key) if line.strip()]
            pins: Pins = ([asyncssh.import_public_key(line) for line in lines], [], [])
        elif login.known_hosts:
            known = asyncssh.read_known_hosts(str(login.known_hosts))
            found = known.match(login.host or "", "", login.port if login.port != 22 else None)
            pins = (list(found[0]), list(found[1]), list(found[2]))
        else:
            pins = ([], [], [])
    except (OSError, ValueError) as error:
        where = f"SFTP_KNOWN_HOSTS ({login.known_hosts})" if not login.host_key else "SFTP_HOST_KEY"
        reason = error.strerror if isinstance(error, OSError) else "it holds no readable public key"
        raise DestinationParked(
            "host_key_unreadable",
            f"cannot read the pinned host key from {where}: {reason}; nothing was sent",
            "Write it as 'ssh-ed25519 AAAA…', as `ssh-keyscan` prints it after the host.",
        ) from None
    if not (pins[0] or pins[1]):
        raise DestinationParked(
            "host_key_unpinned",
            f"no host key is pinned for {login.address}; nothing was sent",
            "Ask the partner for their public host key and put it in SFTP_HOST_KEY "
            f"(compare: ssh-keyscan -p {login.port} {login.host}).",
        )
    return pins


def _load_key(login: SftpLogin) -> list[asyncssh.SSHKey]:
    if login.private_key is None:
        return []
    try:
        return [asyncssh.read_private_key(str(login.private_key), login.passphrase)]
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
        else:
            reason = "wrong or missing passphrase, or no private key in it"
        raise DestinationParked(
            "login_key_unreadable",
            f"cannot read the private key {login.private_key}: {reason}",
            "Correct SFTP_PRIVATE_KEY and SFTP_PRIVATE_KEY_PASSPHRASE and restart the worker.",
        ) from None


@asynccontextmanager
async def _agent_keys(login: SftpLogin, timeout_seconds: float) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """The agent's keys; none where no agent is asked for. asyncssh would add the account's own keys if it asked itself."""
    if not login.agent:
        yield []
        return
    try:
        async with asyncio.timeout(timeout_seconds):
            agent = await asyncssh.connect_agent()
            keys = list(await agent.get_keys())
    except (OSError, ValueError, asyncssh.Error):
        keys = []
    if not keys:
        raise DestinationParked(
            "agent_empty",
            "no key can be had from an ssh-agent (SFTP_AGENT is on)",
            "Start the worker with SSH_AUTH_SOCK set and the key added by ssh-add, or use SFTP_PRIVATE_KEY.",
        )
    try:
        yield keys
    finally:
        agent.close()
        await agent.wait_closed()
