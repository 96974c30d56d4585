"""The door to people: notices go out by mail or webhook. A carrier may be asked to send the same notice again."""

from __future__ import annotations

from typing import Protocol

import msgspec

from skysail.kit.errors import SkysailError


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody is told. ``id`` stays the same over attempts, so that a receiver can tell a repetition."""

    id: str
    endpoint: str
    subject: str
    body: str
    at: float


class Undeliverable(SkysailError):
    """Not delivered. ``final``: the receiver does not exist, and asking again is of no use."""

    def __init__(self, what: str, *, final: bool = False) -> None:
        super().__init__(what)
        self.final = final


class Carrier(Protocol):
    """Takes notices to one kind of endpoint. Blocks."""

    def send(self, notice: Notice) -> None:
        """The receiver, or the relay on the way to it, has taken the notice over; raises :class:`Undeliverable`."""
        ...
