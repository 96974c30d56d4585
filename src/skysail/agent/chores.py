"""Chores: brings each thing of one kind to its role, one task per thing, again and again until it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)


class Wanted(Protocol):
    """A thing of the document."""

    @property
    def id(self) -> str: ...
    @property
    def role(self) -> str: ...


class Reported(Protocol):
    """How a thing stands."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...


W = TypeVar("W", bound=Wanted)
R = TypeVar("R", bound=Reported)


class Chores(Generic[W, R]):
    """``converge`` brings one thing to its role and may be repeated; ``failed(thing, failures, reason)`` says how it stands
    after so many failures; ``changed`` is called after each report that is news."""

    def __init__(self, converge: Callable[[W], Awaitable[R]], failed: Callable[[W, int, str], R],
                 changed: Callable[[], Awaitable[None]]) -> None:
        self._converge = converge
        self._failed = failed
        self._changed = changed
        self._wanted: dict[str, W] = {}
        self._reports: dict[str, R] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def take(self, things: Iterable[W]) -> None:
        """What is wanted now. A thing that is missing is left as it is."""
        named = set()
        for thing in things:
            named.add(thing.id)
            if self._wanted.get(thing.id) != thing:
                self._wanted[thing.id] = thing
                former = self._tasks.pop(thing.id, None)
                self._tasks[thing.id] = asyncio.create_task(self._keep(thing, former))
        for identifier in [known for known in self._wanted if known not in named]:
            report = self._reports.get(identifier)
            if report is not None and report.state == "gone":
                # The controller read that it is gone and dropped it: nothing is left to say.
                self._tasks.pop(identifier).cancel()
                del self._wanted[identifier], self._reports[identifier]

    async def _keep(self, thing: W, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            # What nobody wants any more is called off, and has cleaned up before its successor begins.
            former.cancel()
            await asyncio.wait((former,))
        failures = 0
        while True:
            try:
                await self.say(await self._converge(thing))
                return
            except Exception as failure:
                log.exception("%s did not converge", thing.id)
                failures += 1
                await self.say(self._failed(thing, failures, str(failure)[:500]))
            await asyncio.sleep(BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS)) - 1])

    async def say(self, report: R) -> None:
        """Keep the report, and tell of it when it is news."""
        if self._reports.get(report.id) != report:
            self._reports[report.id] = report
            await self._changed()

    def reports(self) -> tuple[R, ...]:
        return tuple(self._reports.values())

    def find(self, identifier: str) -> R | None:
        """How the thing stands, if anything was said of it."""
        return self._reports.get(identifier)

    async def settled(self, identifier: str) -> None:
        """Once the thing, if it is wanted at all, has been brought to its role or has failed to."""
        while identifier in self._wanted and identifier not in self._reports:
            await asyncio.sleep(0.02)
