"""A hypervisor without guests: it keeps the door's promises in memory, for tests and for measuring scale."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncssh
import msgspec

from skysail.contract.document import Guest, Volume
from skysail.contract.report import GuestReport

MakeVolume = Callable[[Volume, Path, int, int], Awaitable[Path]]


class SimHypervisor:
    """Guests are entries of a table; :meth:`halt` and :meth:`crash` do what a guest does by itself. ``make_volume`` gives
    each guest that runs its disk, as the real engine does."""

    def __init__(self, make_volume: MakeVolume | None = None) -> None:
        self._make_volume = make_volume
        self._guests: dict[str, GuestReport] = {}
        self._changes: asyncio.Queue[GuestReport] = asyncio.Queue()

    async def ensure(self, guest: Guest) -> GuestReport:
        held = self._guests.get(guest.id)
        if guest.role == "gone":
            self._guests.pop(guest.id, None)
            return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
        if guest.role == "stop":
            report = GuestReport(id=guest.id, state="stopped", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held else ())
        elif held is not None and held.state == "halted" and held.starts >= guest.starts:
            return held
        else:
            if self._make_volume is not None:
                await self._make_volume(guest.volume, Path("/nonexistent"), guest.volume.size_gib << 30, 0)
            report = GuestReport(id=guest.id, state="running", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held and held.host_keys else (_host_key(),))
        self._guests[guest.id] = report
        return report

    async def observe(self) -> list[GuestReport]:
        return list(self._guests.values())

    async def strays(self) -> list[str]:
        return []

    async def changes(self) -> AsyncIterator[GuestReport]:
        while True:
            yield await self._changes.get()

    async def prepare(self, image: str, vcpus: int) -> None:
        return

    async def check(self) -> list[str]:
        return []

    def halt(self, guest_id: str) -> None:
        """The guest powers itself off."""
        self._guests[guest_id] = msgspec.structs.replace(self._guests[guest_id], state="halted")
        self._changes.put_nowait(self._guests[guest_id])

    def crash(self, guest_id: str) -> None:
        """The guest's process dies."""
        self._guests[guest_id] = msgspec.structs.replace(self._guests[guest_id], state="crashed")
        self._changes.put_nowait(self._guests[guest_id])


def _host_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
