"""The QEMU engine: the hypervisor door over real processes. One lock per guest; nothing else is shared."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import msgspec

from skysail.contract.document import Guest, Snapshot, Volume
from skysail.contract.report import GuestReport, SnapshotReport
from skysail.hypervisor import Usage, confinement, flattening, personality, process
from skysail.hypervisor.guest import QemuGuest, remove
from skysail.hypervisor.qmp import Gone
from skysail.hypervisor.record import Record
from skysail.hypervisor.snapshot import Copying, abandon, report
from skysail.hypervisor.workshop import Workshop
from skysail.kit.config import GUEST_UIDS
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run_async

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
TRIM_EVERY = 20  # looks: a guest writes its serial log at some megabytes a second at most


class Qemu:
    """Guests of this host as QEMU processes. ``uid_base`` is the first of the user ids that guests run under."""

    def __init__(self, workshop: Workshop, uid_base: int) -> None:
        self._shop = workshop
        self._uid_base = uid_base
        self._guests: dict[str, QemuGuest] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, str] = {}
        self._damaged: dict[str, int] = {}
        self._copied: dict[str, set[str]] = {}
        self._moves: dict[str, asyncio.Task[bool]] = {}
        # A template that an earlier agent was booting is worth nothing without that agent.
        workshop.templates.sweep()
        for path in sorted(workshop.guests.glob("*/guest.json")):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
            except msgspec.MsgspecError as damaged:
                # One guest's damage is not every guest's; its user id stays its own.
                log.error("the record %s cannot be read: %s", path, damaged)
                run = path.parent / "run"
                self._damaged[path.parent.name] = run.stat().st_uid if run.exists() else 0
                continue
            self._guests[record.id] = QemuGuest(workshop, record)

    async def ensure(self, guest: Guest) -> GuestReport:
        """See :class:`skysail.hypervisor.Hypervisor`; raises SkysailError when the guest cannot be brought there."""
        async with self._lock(guest.id):
            await self._call_off(guest.volume, *(one.volume for one in guest.disks))
            if guest.role == "gone":
                held = self._guests.get(guest.id)
                if held is not None:
                    await held.kill()
                    await held.release()
                # Also without a record: an agent may have died when half of the folder was removed.
                await remove(self._shop.guests / guest.id)
                self._guests.pop(guest.id, None)
                self._damaged.pop(guest.id, None)
                self._seen.pop(guest.id, None)
                return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
            held = self._guests.get(guest.id) or await self._new(guest)
            report = await (held.run(guest) if guest.role == "run" else held.stop(guest))
            self._seen[guest.id] = report.state
            return report

    async def _new(self, guest: Guest) -> QemuGuest:
        # The record is written before the volume is made, so this is no interrupted launch: it is somebody's disk.
        if guest.id in self._damaged or guest.volume.id in await self._shop.volumes():
            raise SkysailError(f"guest {guest.id} has a disk, but its record is lost or damaged",
                               f"bring {self._shop.guests / guest.id / 'guest.json'} back, or delete the instance")
        taken = {held.record.uid for held in self._guests.values()} | set(self._damaged.values())
        # The first is the templates' own.
        uid = next(uid for uid in range(self._uid_base + 1, self._uid_base + GUEST_UIDS) if uid not in taken)
        made = QemuGuest(self._shop, Record(id=guest.id, uid=uid, identity=personality.make()))
        # Taken before the first await: a second guest that is made at this moment gets another user id.
        self._guests[guest.id] = made
        made.save()
        return made

    async def snapshot(self, snapshot: Snapshot, progress: Callable[[SnapshotReport], Awaitable[None]]) -> SnapshotReport:
        """See :class:`skysail.hypervisor.Hypervisor`; raises SkysailError when it cannot be taken now."""
        guest = self._guests.get(snapshot.guest)
        lock = self._locks.setdefault(snapshot.guest, asyncio.Lock()) if snapshot.guest else asyncio.Lock()
        if snapshot.role == "gone":
            if guest is not None:
                async with lock:
                    await abandon(guest, snapshot.id)
            await self._shop.shelf.remove(snapshot.id)
            return SnapshotReport(id=snapshot.id, state="gone")
        manifest = await self._shop.shelf.find(snapshot.id)
        if manifest is None:
            if guest is None and snapshot.guest:
                raise SkysailError(f"the guest {snapshot.guest} is not on this host")
            self._copied[snapshot.id] = {one.id for one in snapshot.volumes}
            try:
                await self._call_off(*snapshot.volumes)
                manifest = await Copying(self._shop, snapshot, guest, lock, self._uid_base, progress).take()
            finally:
                del self._copied[snapshot.id]
        return report(manifest)

    async def flatten(self, volume: Volume, guest_id: str) -> bool:
        """See :class:`skysail.hypervisor.Hypervisor`; raises SkysailError when it cannot be done."""
        guest = self._guests.get(guest_id)
        if guest_id and (guest is None or not guest.record.made or self._lock(guest_id).locked()):
            return False
        if any(volume.id in volumes for volumes in self._copied.values()):
            return False
        if guest is not None and guest.alive():
            return await flattening.stream(self._shop, guest, volume, self._lock(guest_id))
        # A task of its own: whoever wants the volume calls it off, and not those who asked for this.
        work = asyncio.create_task(flattening.offline(self._shop, guest, volume, self._uid_base))
        self._moves[volume.id] = work
        try:
            await asyncio.wait((work,))
            return not work.cancelled() and work.result()
        finally:
            await self._call_off(volume)

    async def _call_off(self, *volumes: Volume) -> None:
        """Nobody but the caller does something with these volumes of a guest that is off, or of none, from here on."""
        moves = [move for one in volumes if (move := self._moves.pop(one.id, None)) is not None]
        for move in moves:
            move.cancel()
        if moves:
            await asyncio.wait(moves)

    async def lift(self, snapshot_id: str, leaving: Collection[str]) -> SnapshotReport | None:
        manifest = await self._shop.shelf.lift(snapshot_id, leaving, self._uid_base)
        return report(manifest) if manifest is not None else None

    async def snapshots(self) -> list[SnapshotReport]:
        found = [await self._shop.shelf.find(identifier) for identifier in await self._shop.shelf.observe()]
        return [report(one) for one in found if one is not None]

    async def observe(self) -> list[GuestReport]:
        return await asyncio.gather(*(self._observed(guest) for guest in list(self._guests.values())))

    async def _observed(self, guest: QemuGuest) -> GuestReport:
        try:
            return guest.report(await guest.look())
        except Gone as silent:
            # Its process lives but does not answer now: nobody's reason to restart a server.
            return guest.report("running", silent.what)

    async def strays(self) -> list[str]:
        """Folders without a record, and processes that work in our folders and no record names."""
        folder = self._shop.guests
        named = {guest.record.process.pid for guest in self._guests.values() if guest.record.process is not None}
        found = [f"the folder {path.name} of no guest" for path in sorted(folder.iterdir()) if path.name not in self._guests]
        return found + [f"process {pid} of no guest" for pid in confinement.holders(f"{folder}/") if pid not in named]

    async def usage(self) -> dict[str, Usage]:
        found = await asyncio.gather(*(self._usage(guest) for guest in list(self._guests.values())))
        return {identifier: usage for identifier, usage in found if usage is not None}

    async def _usage(self, guest: QemuGuest) -> tuple[str, Usage | None]:
        busy = self._locks.setdefault(guest.record.id, asyncio.Lock()).locked()
        used = await guest.usage(busy)
        # One that is being made has no process yet, and is not down.
        return guest.record.id, used or (Usage(process="", age_seconds=0, cpu_seconds=0, busy=True) if busy else None)

    async def bound(self, guest_id: str, processors: float) -> None:
        async with self._locks.setdefault(guest_id, asyncio.Lock()):
            held = self._guests.get(guest_id)
            if held is not None and held.alive():
                confinement.bound(guest_id, processors)

    async def changes(self) -> AsyncIterator[GuestReport]:
        """Guests that were running and are not any more. Looked for twice a second: it costs 0.4 ms a guest, and works
        the same for guests that another agent started. Each look is a task of its own: a QEMU that does not answer holds up
        nobody else's."""
        news: asyncio.Queue[GuestReport] = asyncio.Queue()
        looks: set[asyncio.Task[None]] = set()
        for turn in itertools.count():
            for identifier, guest in list(self._guests.items()):
                if self._seen.get(identifier) == "running" and not self._lock(identifier).locked():
                    look = asyncio.create_task(self._look_again(identifier, guest, news))
                    looks.add(look)
                    look.add_done_callback(looks.discard)
            if turn % TRIM_EVERY == 0:
                await in_thread(process.trim_all, [guest.folder / "run" for guest in list(self._guests.values())])
            await asyncio.sleep(LOOK_SECONDS)
            while not news.empty():
                yield news.get_nowait()

    async def _look_again(self, identifier: str, guest: QemuGuest, news: asyncio.Queue[GuestReport]) -> None:
        async with self._lock(identifier):
            try:
                report = await self._observed(guest)
            except SkysailError as failure:
                log.warning("guest %s could not be looked at: %s", identifier, failure)
                return
            # It may have been removed while we waited for the lock.
            if self._guests.get(identifier) is guest and report.state != "running":
                log.info("guest %s is %s", identifier, report.state)
                self._seen[identifier] = report.state
                news.put_nowait(report)

    def _lock(self, identifier: str) -> asyncio.Lock:
        return self._locks.setdefault(identifier, asyncio.Lock())

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
