"""A hypervisor without guests: it keeps the door's promises in memory, for tests and for measuring scale."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncssh
import msgspec

from skysail.contract.document import Guest, Snapshot, Volume
from skysail.contract.report import GuestReport, SnapshotReport
from skysail.storage import Copy, Manifest, Shelf
from skysail.storage.sim import SimShelf

MakeVolume = Callable[[Volume, Path | None, int, int], Awaitable[Path]]
# Long enough to be seen under way.
COPY_SECONDS = 0.3


class SimHypervisor:
    """Guests are entries of a table; :meth:`halt` and :meth:`crash` do what a guest does by itself. ``make_volume`` gives
    each guest that runs its disk, as the real engine does."""

    def __init__(self, make_volume: MakeVolume | None = None, shelf: Shelf | None = None) -> None:
        self._make_volume = make_volume
        self._shelf = shelf or SimShelf()
        self._guests: dict[str, GuestReport] = {}
        self._changes: asyncio.Queue[GuestReport] = asyncio.Queue()

    async def ensure(self, guest: Guest) -> GuestReport:
        held = self._guests.get(guest.id)
        disks = tuple(one.volume.id for one in guest.disks)
        if guest.role == "gone":
            self._guests.pop(guest.id, None)
            return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
        if guest.role == "stop":
            report = GuestReport(id=guest.id, state="stopped", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held else (), disks=disks)
        elif held is not None and held.state == "halted" and held.starts >= guest.starts:
            return held
        else:
            if self._make_volume is not None:
                await self._make_volume(guest.volume, Path("/nonexistent"), guest.volume.size_gib << 30, 0)
            report = GuestReport(id=guest.id, state="running", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held and held.host_keys else (_host_key(),), disks=disks)
        self._guests[guest.id] = report
        return report

    async def snapshot(self, snapshot: Snapshot, progress: Callable[[SnapshotReport], Awaitable[None]]) -> SnapshotReport:
        if snapshot.role == "gone":
            await self._shelf.remove(snapshot.id)
            return SnapshotReport(id=snapshot.id, state="gone")
        if await self._shelf.find(snapshot.id) is None:
            copies = tuple(Copy(volume=volume.id, file=f"{volume.id}.qcow2", parents=(), virtual_bytes=volume.size_gib << 30)
                           for volume in snapshot.volumes)
            await self._shelf.draft(snapshot.id, copies, 0)
            for percent in (0, 50):
                await progress(SnapshotReport(id=snapshot.id, state="copying", progress=percent))
                await asyncio.sleep(COPY_SECONDS)
            held = self._guests.get(snapshot.guest)
            await self._shelf.finish(Manifest(
                id=snapshot.id, consistency="frozen" if held and held.state == "running" else "off", copies=copies,
                parents=tuple(volume.origin.snapshot for volume in snapshot.volumes if volume.origin)), 0)
        return next(one for one in await self.snapshots() if one.id == snapshot.id)

    async def snapshots(self) -> list[SnapshotReport]:
        found = [await self._shelf.find(identifier) for identifier in await self._shelf.observe()]
        return [SnapshotReport(id=one.id, state="available", progress=100, consistency=one.consistency, parents=one.parents)
                for one in found if one is not None]

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
