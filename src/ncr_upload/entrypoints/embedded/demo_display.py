"""What the person at the terminal sees of the demo: colours and a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ncr_upload.entrypoints.embedded.demo_picture import Picture
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.entrypoints.embedded.tour import Chapter, DeliveredFile, Json, OnStatus, Rows

_INDENT = "   "
_SHOWN_HASH = 12
_SHOWN_VALUE = 80


class Display:
    """Says everything on standard output; nothing at all when `quiet`. What a stranger wants to see goes to `picture` too."""

    def __init__(self, *, quiet: bool, picture: Picture | None = None) -> None:
        self.quiet = quiet
        self._picture = picture or Picture()
        self._console = Console(file=sys.stdout, highlight=False, quiet=quiet)

    def say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)

    def _head(self, line: str) -> None:
        self._console.print(f"\n[bold]{escape(line)}[/bold]", soft_wrap=True)

    def _good(self, line: str) -> None:
        self._console.print(f"[green]{escape(line)}[/green]", soft_wrap=True)

    def _bad(self, line: str) -> None:
        self._console.print(f"[red]{escape(line)}[/red]", soft_wrap=True)

    def ready(self, line: str) -> None:
        self.say(line)
        self._picture.line(line)

    def product(self, product: Product) -> None:
        size = sum(len(data) for data in product.files.values())
        line = f"{product.sku}: {len(product.files)} files, {size:,} bytes, put into object storage and the studio's tables"
        self._head(line)
        self._picture.line()
        self._picture.line(line, "bold")

    def broken(self, line: str) -> None:
        self.say(f"\n{line}")
        self._picture.line()
        self._picture.line(line, "bold")

    def request(self, line: str, short: str) -> None:
        self.say(line)
        self._picture.line(short)
        self._picture.forget_steps()

    @contextmanager
    def progress(self) -> Iterator[OnStatus]:
        """Takes each status while the job runs."""
        if not self._console.is_terminal:
            yield self._tell_steps()
            return
        draw = self._draw_step
        columns = (TextColumn("{task.fields[stage]:>9}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=self._console) as bar:
            job = bar.add_task("", total=100, stage="queued")

            def show(status: Json) -> None:
                bar.update(job, completed=status["progress"], stage=status["stage"], description=escape(status["message"]))
                draw(status)

            yield show

    def _tell_steps(self) -> OnStatus:
        told: set[tuple[str, str]] = set()

        def show(status: Json) -> None:
            step = (status["status"], status["stage"])
            if step not in told:
                told.add(step)
                self.say(_step_line(status))
            self._draw_step(status)

        return show

    def _draw_step(self, status: Json) -> None:
        self._picture.step(status["status"], status["stage"], _step_line(status))

    def delivered(self, chapter: Chapter, root: Path) -> None:
        self._head(f"delivered to {root}, {sum(file.size for file in chapter.files):,} bytes, in {chapter.took_seconds:.1f} s")
        lines = list(tree_lines(chapter.files))
        for line in lines:
            self.say(f"  {line}")
        self._picture.line(f"delivered {len(chapter.files)} files in {chapter.took_seconds:.1f} s", "bold")
        self._picture.tree(lines)
        self._head(f"the validator's verdict: {chapter.status['verdict']}")
        self._head("database rows that changed")
        self._rows(chapter.rows_before, chapter.rows_after)
        self._timeline(chapter.timeline)

    def refused(self, chapter: Chapter) -> None:
        problem = chapter.status["problem"] or {}
        self._head(f"refused: {chapter.status['status']}, nothing delivered")
        self.say(f"  {problem.get('message', chapter.status['message'])}")
        self.say(f"  {problem.get('next_step', '')}")
        self._picture.line(f"refused: {chapter.status['status']}, nothing delivered", "bold red")
        self._picture.line(f"  {problem.get('next_step', '')}")
        self._head("database rows that changed")
        self._rows(chapter.rows_before, chapter.rows_after)
        self._timeline(chapter.timeline)

    def result(self, failures: list[str], took_seconds: float) -> None:
        self.say("")
        if failures:
            for failure in failures:
                self._bad(f"NOT AS PROMISED: {failure}")
        else:
            first = f"All as promised in {took_seconds:.1f} s: every delivered byte equals the generated one,"
            second = "each row was written once, and nothing of the refused package was delivered."
            self._good(f"{first} {second}")
            self._picture.line()
            self._picture.line(first, "green")
            self._picture.line(second, "green")

    def _rows(self, before: Rows, after: Rows) -> None:
        for table, rows in after.items():
            known = {row["id"]: row for row in before[table]}
            for row in rows:
                former = known.get(row["id"])
                if former is None:
                    self.say(f"  + {table}: {_columns(row)}")
                elif former != row:
                    changes = (
                        f"{name}: {former[name]} → {_short(value)}" for name, value in row.items() if former[name] != value
                    )
                    self.say(f"  ~ {table} {row['id']}: {', '.join(changes)}")

    def _timeline(self, events: list[Json]) -> None:
        self._head("timeline")
        if not events:
            return
        began = _moment(events[0])
        for event in events:
            seconds = _moment(event) - began
            self.say(f"  {seconds:6.2f} s  {event['stage']:<9} {event['kind']:<10} {event['message']}")


def _step_line(status: Json) -> str:
    return f"  {status['progress']:5.1f} %  {status['stage']:<9} {status['message']}"


def tree_lines(files: Sequence[DeliveredFile]) -> Iterator[str]:
    """The files below their folders, each with the start of its SHA-256 and its size in bytes."""
    shown: tuple[str, ...] = ()
    for file in sorted(files, key=lambda file: PurePosixPath(file.path).parts):
        *folders, name = PurePosixPath(file.path).parts
        for depth, folder in enumerate(folders):
            if shown[: depth + 1] != tuple(folders[: depth + 1]):
                yield f"{_INDENT * depth}{folder}/"
        shown = tuple(folders)
        yield f"{_INDENT * len(folders)}{file.sha256[:_SHOWN_HASH]} {file.size:>9,}  {name}"


def _moment(event: Json) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def _columns(row: Json) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in row.items() if value is not None)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}…"
