"""Block storage and snapshots of this host, each thing brought to its role by a task of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from skysail.agent.chores import Chores
from skysail.agent.flattening import Flattening
from skysail.contract.document import Disk, HostDocument, Snapshot, Volume
from skysail.contract.report import DiskReport, SnapshotReport
from skysail.hypervisor import Hypervisor
from skysail.kit.errors import SkysailError
from skysail.storage import Pool, Shelf

log = logging.getLogger(__name__)
# A copy that fails once may have lost its guest's process; after this many it is said to have failed.
TRIES = 3


class Blocks:
    """Holds the disks and snapshots of a document. ``changed`` is called after each change, ``look`` with a guest whose
    system disk changed."""

    def __init__(self, hypervisor: Hypervisor, pool: Pool, shelf: Shelf, changed: Callable[[], Awaitable[None]],
                 look: Callable[[str], Awaitable[None]]) -> None:
        self._hypervisor = hypervisor
        self._pool = pool
        self._shelf = shelf
        self._disks: Chores[Disk, DiskReport] = Chores(self._converge_disk, _disk_failed, changed)
        self._alone: set[str] = set()
        self._snapshots: Chores[Snapshot, SnapshotReport] = Chores(self._converge_snapshot, _snapshot_failed, changed)
        self._flattening = Flattening(hypervisor, shelf, self._flat, self._lifted, look)

    async def start(self) -> None:
        """Report the snapshots that are here already."""
        try:
            held = await self._hypervisor.snapshots()
        except SkysailError as failed:
            # A cluster that is away keeps no agent from its guests; each is told of when its turn comes.
            log.warning("which snapshots are here is not known yet: %s", failed)
            return
        for report in held:
            await self._snapshots.say(report)

    def take(self, document: HostDocument) -> None:
        """Converge to the document, behind this call."""
        self._disks.take(document.disks)
        self._snapshots.take(document.snapshots)
        self._flattening.take(document)

    async def flatten(self) -> None:
        """Move what stands on deleted snapshots off them; runs until cancelled."""
        await self._flattening.run()

    def reports(self) -> tuple[tuple[DiskReport, ...], tuple[SnapshotReport, ...]]:
        return self._disks.reports(), self._snapshots.reports()

    async def ready(self, disk_id: str) -> None:
        """Once the disk has been made, or could not be."""
        await self._disks.settled(disk_id)

    async def sound(self, volume: Volume) -> None:
        """What a volume that is not here yet will grow from is what it was; raises SkysailError."""
        if volume.origin is not None and volume.id not in await self._pool.observe():
            await self._shelf.verify(volume.origin)

    async def _converge_disk(self, disk: Disk) -> DiskReport:
        if disk.role == "gone":
            await self._pool.remove(disk.id)
            return DiskReport(id=disk.id, state="gone")
        if disk.made:
            if disk.id not in await self._pool.observe():
                raise SkysailError(f"the disk {disk.id} is not on this host any more", "bring its file back, or delete it")
        else:
            await self.sound(disk.volume)
            parent = Path((await self._shelf.chain(disk.volume.origin))[0]) if disk.volume.origin else None
            await self._pool.ensure(disk.volume, parent, disk.volume.size_gib << 30, os.geteuid())
        return DiskReport(id=disk.id, state="available", alone=disk.id in self._alone or not self._shelf.layered)

    async def _flat(self, disk_id: str) -> None:
        self._alone.add(disk_id)
        if _is_available(self._disks.find(disk_id)):
            await self._disks.say(DiskReport(id=disk_id, state="available", alone=True))

    async def _lifted(self, report: SnapshotReport) -> None:
        if _is_available(self._snapshots.find(report.id)):
            await self._snapshots.say(report)

    async def _converge_snapshot(self, snapshot: Snapshot) -> SnapshotReport:
        if snapshot.role == "keep" and await self._shelf.find(snapshot.id) is None:
            if snapshot.duplicates is not None:
                await self._shelf.duplicate(snapshot.id, snapshot.duplicates)
            elif snapshot.arrived:
                await self._shelf.arrive(snapshot.id)
        return await self._hypervisor.snapshot(snapshot, self._snapshots.say)


def _is_available(report: DiskReport | SnapshotReport | None) -> bool:
    """Whether news of it may be told: of what went meanwhile nothing is said any more, least of all that it is there."""
    return report is not None and report.state == "available"


def _disk_failed(disk: Disk, failures: int, reason: str) -> DiskReport:
    return DiskReport(id=disk.id, state="failed" if failures >= TRIES else "preparing", reason=reason)


def _snapshot_failed(snapshot: Snapshot, failures: int, reason: str) -> SnapshotReport:
    return SnapshotReport(id=snapshot.id, state="failed" if failures >= TRIES else "waiting", reason=reason)
