"""A release's migrations only add, so that the release before works on beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncr_upload.entrypoints.cli import main
from ncr_upload.entrypoints.settings import load_settings
from ncr_upload.migrations.apply import REVISIONS
from ncr_upload.migrations.expanding import find_contractions, pending_revisions

ALL = sorted(REVISIONS.glob("[0-9]*_*.py"))


@pytest.mark.parametrize("path", ALL[1:], ids=lambda path: path.stem)
def test_every_migration_only_adds(path: Path) -> None:
    assert find_contractions(path) == []


@pytest.mark.parametrize(
    "statement",
    [
        "op.drop_column('ncr_jobs', 'sku')",
        "op.alter_column('ncr_jobs', 'sku', nullable=False)",
        "op.execute('DROP TABLE ncr_jobs')",
        "op.rename_table('ncr_jobs', 'jobs')",
        "op.add_column('ncr_jobs', sa.Column('colour', sa.String(8), nullable=False))",
        "op.create_index('uq', 'ncr_jobs', ['sku'], unique=True)",
    ],
)
def test_a_migration_that_does_more_is_found(statement: str, tmp_path: Path) -> None:
    path = tmp_path / "0009_more.py"
    path.write_text(f"def upgrade() -> None:\n    {statement}\n")
    assert len(find_contractions(path)) == 1


def test_a_column_with_a_default_of_its_own_only_adds(tmp_path: Path) -> None:
    path = tmp_path / "0009_more.py"
    column = "sa.Column('colour', sa.String(8), nullable=False, server_default='red')"
    path.write_text(f"def upgrade() -> None:\n    op.add_column('ncr_jobs', {column})\n")
    assert find_contractions(path) == []


def test_the_pending_revisions_are_those_after_the_current_one() -> None:
    assert pending_revisions(None) == ALL
    assert pending_revisions("0001") == ALL[1:]


def test_the_plan_names_each_migration_that_would_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'ncr.db'}")
    load_settings.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main(["db", "plan"])
    load_settings.cache_clear()
    assert ended.value.code == 0
    first, *named = capsys.readouterr().out.splitlines()
    assert first.endswith(f"; {len(ALL)} migrations to run")
    assert [name.strip() for name in named] == [path.stem for path in ALL]
