"""Snapshots: copies of a guest's disks, all of one moment, while it runs.

QEMU copies each disk's own layer to a file (``blockdev-backup``): what the guest overwrites meanwhile is copied before. So
the guest's own chain never grows, and the guest stands still only while the jobs are started, whatever the size of its disks;
its file systems are frozen by its agent around that moment where it has one. A copy stands on what the disk itself stands on.
A chain of copies of copies would grow: from MAX_PARENTS on, a copy holds everything.

Where volumes are in a cluster (a shelf that is not ``layered``), the cluster keeps what they hold, without a copy. But it
takes a second for that, which its monitors agree in, and a guest would be frozen for as long. So QEMU copies here, too, from
the very moment on and only what the guest overwrites, until the cluster has kept the rest; the shelf makes one of both.

Source: QEMU QMP Reference Manual, blockdev-backup, transaction, query-jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from skysail.contract.document import Snapshot, Volume
from skysail.contract.report import SnapshotReport
from skysail.hypervisor import confinement, disks, flattening, freezing, guest_agent
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.jobs import dismiss, jobs
from skysail.hypervisor.qmp import Gone, Monitor, Refused
from skysail.hypervisor.workshop import Workshop
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, run
from skysail.storage import Copy, Manifest
from skysail.storage.chains import convert

log = logging.getLogger(__name__)
# A template's disk, its image, and this many snapshots less two.
MAX_PARENTS = 6
LOOK_SECONDS = 0.25
# A disk is copied no faster: its guest shares the host's disks with others. While the guest is frozen it is hardly copied at
# all, which would keep QEMU from carrying the word to thaw: it took 65 to 95 ms, and takes 10 to 15.
BYTES_PER_SECOND = 400 << 20
BYTES_PER_SECOND_FROZEN = 1


def report(manifest: Manifest) -> SnapshotReport:
    """A snapshot that is whole."""
    return SnapshotReport(id=manifest.id, state="available", progress=100, consistency=manifest.consistency,
                          frozen_ms=manifest.frozen_ms, parents=manifest.parents)


class Copying:
    """Takes one snapshot, once. ``lock`` is the guest's; ``uid`` is the user id that handles disks of no guest."""

    def __init__(self, shop: Workshop, snapshot: Snapshot, guest: QemuGuest | None, lock: asyncio.Lock, uid: int,
                 progress: Callable[[SnapshotReport], Awaitable[None]]) -> None:
        self._shop = shop
        self._snapshot = snapshot
        self._guest = guest
        self._lock = lock
        self._uid = guest.record.uid if guest is not None else uid
        self._neutral_uid = uid
        self._progress = progress

    async def take(self) -> Manifest:
        """The snapshot, whole and checked; raises SkysailError when it could not be taken. Nothing of it is left then but a
        draft, which the next attempt replaces."""
        guest = self._guest
        async with self._lock:
            if guest is None or not guest.alive():
                # Under the lock: a guest that is off is not started while its disks are copied.
                if guest is not None and not guest.record.made:
                    raise SkysailError("the instance has not been made yet")
                await self._say(0)
                manifest, running = await self._copy_off(), None
            else:
                manifest, running = await self._adopt(guest) or await self._begin(guest), guest
        if running is None:
            return await self._shop.shelf.finish(manifest, self._neutral_uid)
        await self._say(0)
        if self._shop.shelf.layered:
            await self._follow(running)
        else:
            await self._keep(running, manifest)
        made = await self._shop.shelf.finish(manifest, self._uid)
        running.save(copying={key: one for key, one in running.record.copying.items() if key != made.id})
        return made

    async def _say(self, percent: int) -> None:
        await self._progress(SnapshotReport(id=self._snapshot.id, state="copying", progress=percent))

    async def _plan(self) -> tuple[list[Copy], tuple[str, ...]]:
        """What is to be copied, and the snapshots that the copies stand on."""
        copies: list[Copy] = []
        standing: set[str] = set()
        for volume in self._snapshot.volumes:
            parents = await self._parents(volume)
            if len(parents) > MAX_PARENTS:
                parents = ()
            standing |= self._shop.shelf.standing(parents)
            copies.append(Copy(volume=volume.id, file=f"{volume.id}.qcow2", parents=parents,
                               virtual_bytes=volume.size_gib << 30))
        return copies, tuple(sorted(standing))

    async def _parents(self, volume: Volume) -> tuple[str, ...]:
        return await (self._guest or self._shop.shelf).parents(volume)

    # --- a guest that runs

    async def _begin(self, guest: QemuGuest) -> Manifest:
        """Start the jobs at one moment of the guest; its disks are copied behind this."""
        if not guest.record.made:
            raise SkysailError("the instance has not been made yet")
        monitor = await guest.monitor()
        await guest.melt()  # one that is frozen already cannot be frozen for this
        await flattening.call_off(monitor)  # it changes the chain that the copies will stand on
        await abandon(guest, self._snapshot.id)
        copies, parents = await self._plan()
        files = await self._shop.shelf.draft(self._snapshot.id, copies, self._uid)
        started = []
        for number, copy in enumerate(copies):
            node = f"{self._snapshot.id}.{number}"
            source, under = await disks.find(monitor, copy.volume)
            # A volume that was flattened meanwhile holds what the first ones show: it reads the same on what is left.
            backing = next((under[file] for file in copy.parents if file in under), None)
            await monitor.execute("blockdev-add", {"driver": "file", "node-name": f"{node}-file",
                                                   "filename": str(files[copy.volume]), "discard": "unmap"})
            await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": f"{node}-file",
                                                   "backing": backing, "discard": "unmap"})
            started.append({"type": "blockdev-backup", "data": {
                "job-id": node, "device": source, "target": node,
                # With nothing below, its own layer is all that there is; a full copy would note zeros over its whole length.
                "sync": "none" if not self._shop.shelf.layered else "full" if under and not copy.parents else "top",
                "speed": BYTES_PER_SECOND_FROZEN, "auto-dismiss": False}})

        async def start() -> None:
            await monitor.execute("transaction", {"actions": started, "properties": {"completion-mode": "grouped"}})

        milliseconds = await self._frozen(guest, start)
        if milliseconds is None:
            await start()
        manifest = Manifest(id=self._snapshot.id, copies=tuple(copies), parents=parents, frozen_ms=milliseconds or 0.0,
                            consistency="crash" if milliseconds is None else "frozen")
        log.info("snapshot %s of guest %s: %s, %.0f ms", manifest.id, guest.record.id, manifest.consistency,
                 manifest.frozen_ms)
        guest.save(copying={**guest.record.copying, manifest.id: manifest})
        return manifest

    async def _frozen(self, guest: QemuGuest, act: Callable[[], Awaitable[None]]) -> float | None:
        """Run ``act`` with the guest's file systems frozen; None, and not run, where the guest cannot do that."""
        if not await _listens(await guest.monitor()):
            return None
        channel = await guest_agent.reach(guest.agent)
        if channel is None:
            return None
        try:
            # Noted first: an agent that comes after one that died in here thaws the guest.
            guest.save(freezing=True)
            async with freezing.hurried(channel):
                await freezing.flush(channel)
                former = confinement.unbound(guest.record.id)
                try:
                    milliseconds = await freezing.frozen(channel, guest.agent, act)
                finally:
                    confinement.rebind(former)
            guest.save(freezing=False)
            return milliseconds
        except (Gone, Refused) as unable:
            guest.save(freezing=False)  # thawed, as frozen() promises; when it cannot be, that is another error
            if not guest.alive() or await jobs(await guest.monitor(), f"{self._snapshot.id}."):
                raise
            log.warning("guest %s is not frozen for its snapshot: %s", guest.record.id, unable.what)
            return None
        finally:
            channel.close()

    async def _adopt(self, guest: QemuGuest) -> Manifest | None:
        """What an earlier agent began, if its jobs are all still known to QEMU."""
        held = guest.record.copying.get(self._snapshot.id)
        if held is None:
            return None
        known = {job["id"] for job in await jobs(await guest.monitor(), f"{held.id}.")}
        return held if all(f"{held.id}.{number}" in known for number in range(len(held.copies))) else None

    async def _follow(self, guest: QemuGuest) -> None:
        """Let the jobs run until each is through, and QEMU has let go of the files; raises SkysailError when one failed."""
        said = 0
        monitor = await guest.monitor()
        for job in await jobs(monitor, f"{self._snapshot.id}."):
            with contextlib.suppress(Refused):  # it is through, or has failed
                await monitor.execute("block-job-set-speed", {"device": job["id"], "speed": BYTES_PER_SECOND})
        while True:
            seen = await jobs(await guest.monitor(), f"{self._snapshot.id}.")
            if all(job["status"] == "concluded" for job in seen):
                break
            total = sum(job["total-progress"] for job in seen) or 1
            percent = min(99, 100 * sum(job["current-progress"] for job in seen) // total)
            if percent != said:
                await self._say(said := percent)
            await asyncio.sleep(LOOK_SECONDS)
        failed = [job["error"] for job in seen if "error" in job]
        async with self._lock:
            await abandon(guest, self._snapshot.id)
        if failed or len(seen) != len(self._snapshot.volumes):
            raise SkysailError(f"the disks could not be copied: {'; '.join(failed) or 'QEMU forgot the work'}")

    async def _keep(self, guest: QemuGuest, manifest: Manifest) -> None:
        """Have the cluster keep the disks while what the guest overwrites is copied; raises SkysailError when that was not so
        all the time."""
        try:
            await self._shop.shelf.mark(manifest)
            seen = await jobs(await guest.monitor(), f"{manifest.id}.")
        finally:
            async with self._lock:
                await abandon(guest, manifest.id)
        failed = [job["error"] for job in seen if "error" in job]
        if failed or [job["status"] for job in seen] != ["running"] * len(manifest.copies):
            raise SkysailError(f"what was overwritten meanwhile is not known: {'; '.join(failed) or 'QEMU forgot the work'}")

    # --- volumes that nobody writes

    async def _copy_off(self) -> Manifest:
        copies, parents = await self._plan()
        files = await self._shop.shelf.draft(self._snapshot.id, copies, self._uid)
        manifest = Manifest(id=self._snapshot.id, consistency="off", copies=tuple(copies), parents=parents)
        if not self._shop.shelf.layered:
            await self._shop.shelf.mark(manifest)
            return manifest
        for volume, copy in zip(self._snapshot.volumes, copies, strict=True):
            source = await self._shop.give_volume(volume.id, self._uid)
            if copy.parents or volume.origin is None:
                await in_thread(_copy, source, files[volume.id])
            else:
                await in_thread(convert, (str(source), *await self._parents(volume)), files[volume.id], self._uid)
        for volume in self._snapshot.volumes:
            # The guest may be started from here on: its process is not to reach what is being checked.
            os.chown(files[volume.id], self._neutral_uid, -1)
            if self._guest is None:
                await self._shop.give_volume(volume.id, 0)
        return manifest


async def abandon(guest: QemuGuest, snapshot_id: str) -> None:
    """QEMU has no job and no node of the snapshot any more; the guest's record neither. The guest's lock is held."""
    if guest.alive():
        with contextlib.suppress(Gone):  # a process that dies takes its jobs along
            await _abandon(await guest.monitor(), f"{snapshot_id}.")
    if snapshot_id in guest.record.copying:
        guest.save(copying={key: one for key, one in guest.record.copying.items() if key != snapshot_id})


async def _abandon(monitor: Monitor, prefix: str) -> None:
    await dismiss(monitor, prefix)
    nodes = [one["node-name"] for one in await monitor.execute("query-named-block-nodes", {"flat": True})]
    for node in sorted((node for node in nodes if node.startswith(prefix)), key=lambda node: node.endswith("-file")):
        await monitor.execute("blockdev-del", {"node-name": node})


async def _listens(monitor: Monitor) -> bool:
    """Whether something in the guest has its agent's port open: one that has no agent is not waited for."""
    return any(one["label"] == "agent" and one["frontend-open"] for one in await monitor.execute("query-chardev"))


def _copy(source: Path, target: Path) -> None:
    run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)])
