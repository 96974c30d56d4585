"""The entrance of this host: holds those who share its single address to what the document says, in one task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from skysail.contract.document import Entrance, Guest, HostDocument
from skysail.contract.report import EntranceReport
from skysail.ingress import Ingress
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
# How often it is looked whether they run, and how soon one that could not be brought to its state is tried again.
LOOK_SECONDS = 1.0
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0)


class EntranceKeeper:
    """Converges the entrance by its ``engines``. ``network`` makes the place where they listen; ``changed`` is awaited after
    news."""

    def __init__(self, engines: Sequence[Ingress], network: Callable[[], Awaitable[None]],
                 changed: Callable[[], Awaitable[None]]) -> None:
        self._engines = tuple(engines)
        self._network = network
        self._changed = changed
        self._wanted: tuple[Entrance | None, dict[str, Guest]] = (None, {})
        self._applied: tuple[Entrance | None, dict[str, Guest]] | None = None
        self._report: EntranceReport | None = None
        self._told = False
        self._wake = asyncio.Event()

    def take(self, document: HostDocument) -> None:
        """The document's entrance, and the guests that it leads to."""
        named = {one.guest for one in document.entrance.names} if document.entrance else set()
        networks = {number for one in document.entrance.accounts for number in one.networks} if document.entrance else set()
        guests = {guest.id: guest for guest in document.guests
                  if guest.role != "gone" and (guest.id in named or guest.port.network in networks)}
        if (document.entrance, guests) != self._wanted or not self._told:
            self._told = True
            self._wanted = (document.entrance, guests)
            self._report = EntranceReport(state="pending") if document.entrance else None
            self._wake.set()

    def report(self) -> EntranceReport | None:
        return self._report

    async def inventory(self) -> dict[str, str]:
        """The names that lead to guests; none when it cannot be asked."""
        found: dict[str, str] = {}
        for engine in self._engines:
            with contextlib.suppress(SkysailError):
                found |= await engine.observe()
        return found

    async def run(self) -> None:
        """Converge until cancelled."""
        failures = 0
        while True:
            self._wake.clear()
            wanted = self._wanted
            if self._told and (self._applied != wanted or (wanted[0] and not all(one.alive() for one in self._engines))):
                before = self._report
                report = await self._converge(*wanted)
                failures = failures + 1 if report is not None and report.state == "failed" else 0
                self._applied = None if failures else wanted
                if wanted == self._wanted:  # else the document changed meanwhile, and a later look speaks
                    self._report = report
                    if report != before:
                        await self._changed()
            pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1] if failures else LOOK_SECONDS if wanted[0] else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _converge(self, entrance: Entrance | None, guests: dict[str, Guest]) -> EntranceReport | None:
        try:
            if entrance is None:
                for engine in self._engines:
                    await engine.end()
                return None
            await self._network()
            for engine in self._engines:
                await engine.apply(entrance, guests)
        except Exception as failure:
            log.warning("the entrance did not converge: %s", failure)
            return EntranceReport(state="failed", reason=str(failure)[:500])
        return EntranceReport(state="served")
