"""The keeper: converges this machine to its document, one task per guest, and reports each change.

A guest that is missing from the document is left as it is; only the role ``gone`` removes one.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable

import msgspec

from skysail.agent.ledger import Ledger
from skysail.contract.document import Guest, HostDocument
from skysail.contract.report import GuestReport, HostReport, ImageReport
from skysail.hypervisor import Hypervisor
from skysail.network import Fabric
from skysail.storage import Pool

log = logging.getLogger(__name__)
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)


class StaleGeneration(Exception):
    """The document is older than the one held."""


class Keeper:
    """Holds one host. ``capacity`` carries what the machine has; its lists of guests and images are filled in here."""

    def __init__(self, capacity: HostReport, hypervisor: Hypervisor, pool: Pool, fabric: Fabric,
                 images: Callable[[], list[ImageReport]], ledger: Ledger) -> None:
        self._hypervisor = hypervisor
        self._pool = pool
        self._fabric = fabric
        self._images = images
        self._ledger = ledger
        self._report = msgspec.structs.replace(capacity, boot=str(uuid.uuid4()), sequence=0, generation=0)
        self._guests: dict[str, GuestReport] = {}
        self._wanted: dict[str, Guest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._news = asyncio.Condition()
        self._network = asyncio.Lock()

    async def start(self) -> None:
        """Adopt what runs, then converge to the last document; call once, before anything else."""
        for report in await self._hypervisor.observe():
            self._guests[report.id] = report
        document = self._ledger.read()
        if document is not None:
            await self._take(document)
        await self._changed()

    async def accept(self, document: HostDocument) -> None:
        """Store the document, then converge to it behind the answer; raises StaleGeneration for an older one."""
        if document.generation < self._report.generation:
            raise StaleGeneration(f"generation {self._report.generation} is held, {document.generation} is older")
        if document.generation > self._report.generation:
            await asyncio.to_thread(self._ledger.write, document)
        await self._take(document)
        await self._changed()

    async def _take(self, document: HostDocument) -> None:
        self._report = msgspec.structs.replace(self._report, generation=document.generation)
        for guest in document.guests:
            known = self._wanted.get(guest.id)
            self._wanted[guest.id] = guest
            if known != guest:
                self._wake.setdefault(guest.id, asyncio.Event()).set()
            if guest.id not in self._tasks or self._tasks[guest.id].done():
                self._tasks[guest.id] = asyncio.create_task(self._keep(guest.id))
        named = {guest.id for guest in document.guests}
        for identifier in [known for known, guest in self._wanted.items() if guest.role == "gone" and known not in named]:
            # The controller read that it is gone and dropped it: nothing is left to say.
            if self._guests.get(identifier, GuestReport(id="", state="gone")).state == "gone":
                self._wanted.pop(identifier)
                self._guests.pop(identifier, None)
                self._tasks.pop(identifier).cancel()
                self._wake.pop(identifier, None)

    async def follow(self) -> None:
        """Wake the task of each guest that changed by itself; runs until cancelled."""
        async for identifier in self._hypervisor.changes():
            if identifier in self._wake:
                self._wake[identifier].set()

    async def _keep(self, identifier: str) -> None:
        failures = 0
        while True:
            wake = self._wake.setdefault(identifier, asyncio.Event())
            wake.clear()
            guest = self._wanted[identifier]
            try:
                report = await self._converge(guest)
                failures = 0
            except Exception as failure:
                log.exception("guest %s did not converge", identifier)
                held = self._guests.get(identifier)
                # A guest that ran before is expected back; one that never did could not be made.
                lived = held is not None and bool(held.host_keys)
                report = GuestReport(id=identifier, state="crashed" if lived else "failed", starts=guest.starts,
                                     reboots=held.reboots if held else 0, reason=str(failure)[:500],
                                     host_keys=held.host_keys if held else ())
                failures += 1
            await self._say(report)
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS)) - 1] if failures else None
            try:
                await asyncio.wait_for(wake.wait(), pause)
            except TimeoutError:
                continue

    async def _converge(self, guest: Guest) -> GuestReport:
        if guest.role == "run":
            await self._apply_network()
        report = await self._hypervisor.ensure(guest)
        if guest.role == "gone" and report.state == "gone":
            await self._pool.remove(guest.volume.id)
            await self._apply_network()
        return report

    async def _apply_network(self) -> None:
        async with self._network:
            await self._fabric.apply([guest.port for guest in self._wanted.values() if guest.role != "gone"])

    async def _say(self, report: GuestReport) -> None:
        if self._guests.get(report.id) != report:
            self._guests[report.id] = report
            await self._changed()

    async def _changed(self) -> None:
        async with self._news:
            self._report = msgspec.structs.replace(
                self._report, sequence=self._report.sequence + 1, guests=tuple(self._guests.values()),
                images=tuple(self._images()))
            self._news.notify_all()

    def report(self) -> HostReport:
        """What this host observes now."""
        return self._report

    async def reports(self, keep_alive_seconds: float = 15.0) -> AsyncIterator[HostReport | None]:
        """The report now, and again at each change; None when nothing changed for ``keep_alive_seconds``."""
        seen = -1
        while True:
            try:
                async with asyncio.timeout(keep_alive_seconds), self._news:
                    while self._report.sequence == seen:
                        await self._news.wait()
            except TimeoutError:
                yield None
                continue
            seen = self._report.sequence
            yield self._report

    async def inventory(self) -> dict[str, list[str]]:
        """What the machine really holds."""
        return {"guests": sorted(report.id for report in await self._hypervisor.observe()),
                "volumes": sorted(await self._pool.observe()), "ports": sorted(await self._fabric.observe())}
