"""How answers look on a terminal: tables and progress for people, one JSON value for programs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from skysail.kit.errors import SkysailError

# What is shown came from somebody, and is shown as it is: an address like fd53::100:0 holds no emoji (":100:"), a name in
# brackets is no style. A file or a pipe has no width: nothing is broken for it.
_out = Console(width=None if sys.stdout.isatty() else 500, markup=False, emoji=False, highlight=False)
_err = Console(stderr=True, markup=False, emoji=False, highlight=False)


def as_json(value: object) -> None:
    """Print ``value`` as one line of JSON; times become ISO 8601."""
    finish()
    sys.stdout.write(msgspec.json.encode(value, enc_hook=str).decode() + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print ``rows`` as a table of ``columns``."""
    drawn = Table(box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(row.get(column, "")) for column in columns))
    _out.print(drawn)


def status(answer: Mapping[str, Any]) -> None:
    """Print how the cloud stands, a line for each part."""
    for key, value in answer.items():
        if isinstance(value, Mapping):
            told = "healthy" if value["healthy"] else "not healthy" if value["pid"] else "not running"
            value = told + (f" (process {value['pid']})" if value["pid"] else "")
        line(f"{key:<12} {'yes' if value is True else 'no' if value is False else value}")


def pairs(told: Mapping[str, Any]) -> None:
    """Print names and what belongs to each, below each other."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in told.items():
        drawn.add_row(name, Text(str(value)))
    _out.print(drawn)


def findings(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what the doctor found: verdict, subject, what was seen and where; the cure below it."""
    for row in rows:
        line(f"{row['verdict']:<5} {row['subject']:<12} {row['saw']}  [{row['where']}]")
        if row["cure"]:
            line(f"{'':<18} cure: {row['cure']}")


def line(text: str) -> None:
    """Print one plain line."""
    finish()
    _out.print(text, soft_wrap=True)


def console(said: bytes) -> None:
    """Print what a guest said. On a terminal only as text: its escape sequences are not for this one."""
    finish()
    if sys.stdout.isatty():
        said = bytes(octet for octet in said if octet in b"\n\t" or (octet >= 32 and octet != 127))
    sys.stdout.buffer.write(said)


class _Steps:
    """The steps of one verb on standard error: the running one turns, the finished ones keep their time."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._text = ""

    def begin(self, text: str) -> None:
        if not _err.is_terminal:
            _err.print(text, soft_wrap=True)
            return
        if self._progress is None:
            self._progress = Progress(SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}", markup=False),
                                      TimeElapsedColumn(), console=_err)
            self._progress.start()
        else:
            self._progress.update(self._task, total=1, completed=1)
        self._task = self._progress.add_task(text, total=None)
        self._text = text

    def detail(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self._text}: {text}")

    def end(self, well: bool = True) -> None:
        if self._progress is not None:
            if well:
                self._progress.update(self._task, total=1, completed=1)
            self._progress.stop()
            self._progress = None


class _Bars:
    """How far several things are, on standard error: a bar for each, on a terminal alone."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, percents: Mapping[str, int]) -> None:
        if not _err.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                                      TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), console=_err)
            self._progress.start()
        for name, percent in percents.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=100)
            self._progress.update(self._tasks[name], completed=percent)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()


_steps, _bars = _Steps(), _Bars()


def step(text: str) -> None:
    """Say, on standard error, what happens now; the step before it is done."""
    _steps.begin(text)


def detail(text: str) -> None:
    """Say, on a terminal, how far the running step is."""
    _steps.detail(text)


def bars(percents: Mapping[str, int]) -> None:
    """Say, on a terminal, how far each of several things is."""
    _bars.show(percents)


def progress(text: str, done: int, whole: int) -> None:
    """Say, on standard error, what happens now, of so many things."""
    _steps.begin(f"{done + 1} of {whole}: {text}")


def finish(well: bool = True) -> None:
    """The last step is over; with ``well`` it succeeded."""
    _steps.end(well)
    _bars.end()


def exports(values: Mapping[str, str]) -> None:
    """Print shell exports that are safe to eval."""
    for key, value in values.items():
        sys.stdout.write(f"export {key}={shlex.quote(value)}\n")


def failure(error: SkysailError) -> None:
    """Say what failed, and its cure."""
    finish(well=False)
    _err.print(f"skysail: {error.what}", style="red", soft_wrap=True)
    if error.cure:
        _err.print(f"cure: {error.cure}", soft_wrap=True)
