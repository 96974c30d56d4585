"""The QEMU engine: the hypervisor door over real processes. One lock per guest; nothing else is shared."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec

from skysail.contract.document import Guest
from skysail.contract.report import GuestReport
from skysail.hypervisor import confinement, personality, process
from skysail.hypervisor.guest import QemuGuest, Record, Workshop
from skysail.hypervisor.qmp import Gone
from skysail.kit.config import GUEST_UIDS
from skysail.kit.errors import ProcessFailed
from skysail.kit.process import run_async

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5


class Qemu:
    """Guests of this host as QEMU processes. ``uid_base`` is the first of the user ids that guests run under."""

    def __init__(self, workshop: Workshop, uid_base: int) -> None:
        self._shop = workshop
        self._uid_base = uid_base
        self._guests: dict[str, QemuGuest] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, str] = {}
        # A template that an earlier agent was booting is worth nothing without that agent.
        confinement.sweep(uid_base)
        for path in sorted(workshop.guests.glob("*/guest.json")):
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            self._guests[record.id] = QemuGuest(workshop, record)

    async def ensure(self, guest: Guest) -> GuestReport:
        """See :class:`skysail.hypervisor.Hypervisor`; raises SkysailError when the guest cannot be brought there."""
        async with self._locks.setdefault(guest.id, asyncio.Lock()):
            if guest.role == "gone":
                held = self._guests.get(guest.id)
                if held is not None:
                    await held.remove()
                    del self._guests[guest.id]
                self._seen.pop(guest.id, None)
                return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
            held = self._guests.get(guest.id) or self._new(guest.id)
            report = await (held.run(guest) if guest.role == "run" else held.stop(guest))
            self._seen[guest.id] = report.state
            return report

    def _new(self, identifier: str) -> QemuGuest:
        taken = {guest.record.uid for guest in self._guests.values()}
        # The first is the templates' own.
        uid = next(uid for uid in range(self._uid_base + 1, self._uid_base + GUEST_UIDS) if uid not in taken)
        made = QemuGuest(self._shop, Record(id=identifier, uid=uid, identity=personality.make()))
        made.save()
        self._guests[identifier] = made
        return made

    async def observe(self) -> list[GuestReport]:
        return [await self._observed(guest) for guest in list(self._guests.values())]

    async def _observed(self, guest: QemuGuest) -> GuestReport:
        try:
            return guest.report(await guest.look())
        except Gone as silent:
            # Its process lives but does not answer now: nobody's reason to restart a server.
            return guest.report("running", silent.what)

    async def changes(self) -> AsyncIterator[GuestReport]:
        """Guests that were running and are not any more. Looked for twice a second: it costs 0.4 ms a guest, and works
        the same for guests that another agent started."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for identifier, guest in list(self._guests.items()):
                lock = self._locks.setdefault(identifier, asyncio.Lock())
                if self._seen.get(identifier) != "running" or lock.locked():
                    continue
                async with lock:
                    report = await self._observed(guest)
                if report.state != "running":
                    log.info("guest %s is %s", identifier, report.state)
                    self._seen[identifier] = report.state
                    yield report

    async def prepare(self, image: str, vcpus: int) -> None:
        found = self._shop.find_image(image)
        if found is not None and found.ours:
            await self._shop.templates.ensure(found, vcpus)

    async def check(self) -> list[str]:
        try:
            await run_async([process.PROGRAM, "--version"])
        except ProcessFailed as missing:
            return [f"{missing.what}; {missing.cure}"]
        return []
