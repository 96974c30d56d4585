"""A workflow: named steps, each beside its undo.

A step is one transaction, or a part of one with steps of other operations. It looks at the rows and either is through
(returns True), has to wait for the world (returns False; it is asked again after the next report), or raises
:class:`StepFailed`. Because a step's effects and the operation's new position commit together, a controller killed between
any two instructions repeats at most a step that left no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping

StepAction = Callable[[Connection, RowMapping, float], bool]
UndoAction = Callable[[Connection, RowMapping, float], None]


class StepFailed(Exception):
    """The step can never succeed: the workflow unwinds, and the operation ends ``Failed`` with this code and message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def nothing_to_undo(connection: Connection, operation: RowMapping, now: float) -> None:
    """The undo of a step without lasting effects."""


@dataclass(frozen=True)
class Step:
    """One step: ``do(connection, operation, now)`` and its ``undo``."""

    name: str
    do: StepAction
    undo: UndoAction = nothing_to_undo


@dataclass(frozen=True)
class Workflow:
    """The steps of one kind of work, in order."""

    name: str
    steps: tuple[Step, ...]
