"""Whether a migration only adds, so that the release before can go on beside the next one."""

from __future__ import annotations

import ast
from pathlib import Path

from ncr_upload.migrations.apply import REVISIONS

ADDING = frozenset({"create_table", "create_index", "add_column", "get_bind"})


def pending_revisions(current: str | None) -> list[Path]:
    """The files of the revisions that a database at `current` lacks, in order."""
    return [path for path in sorted(REVISIONS.glob("[0-9]*_*.py")) if path.name.split("_")[0] > (current or "")]


def find_contractions(path: Path) -> list[str]:
    """What `upgrade()` in this file does that the release before might not live with, as 'line: what'."""
    (upgrade,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "upgrade"]
    calls = [node for node in ast.walk(upgrade) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [f"line {call.lineno}: {found}" for call in calls if (found := _contraction(call))]


def _contraction(call: ast.Call) -> str | None:
    assert isinstance(call.func, ast.Attribute)
    if isinstance(call.func.value, ast.Name) and call.func.value.id == "op":
        if call.func.attr not in ADDING:
            return f"op.{call.func.attr} may change what is there"
        if call.func.attr == "add_column" and _is_required(call):
            return "a new column that must be given: the release before does not know it"
        if call.func.attr == "create_index" and any(word.arg == "unique" for word in call.keywords):
            return "a new unique index: the release before may break it"
    return None


def _is_required(add_column: ast.Call) -> bool:
    columns = [node for node in ast.walk(add_column) if isinstance(node, ast.Call) and node is not add_column]
    words = {word.arg: word.value for column in columns for word in column.keywords}
    nullable = words.get("nullable")
    return isinstance(nullable, ast.Constant) and nullable.value is False and "server_default" not in words
