"""The QEMU engine: the hypervisor door over real processes. One lock per guest; nothing else is shared."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import msgspec

from skysail.contract.document import Guest, Snapshot, Volume
from skysail.contract.report import GuestReport, SnapshotReport
from skysail.hypervisor import Usage, arrival, confinement, departure, flattening, personality, process, userfault
from skysail.hypervisor.arrival import Arriving
from skysail.hypervisor.departure import Departing
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
# An attempt to move that is called off is over after this, unless the other host has to be asked and is not there.
CALL_OFF_SECONDS = 20.0
# States that a guest leaves by itself.
WATCHED = ("running", "listening")
TRIM_EVERY = 20  # looks: a guest writes its serial log at some megabytes a second at most


class Qemu:
    """Guests of this host as QEMU processes. ``uid_base`` is the first of the user ids that guests run under; what carries
    those that move to other hosts runs under ``relay_uid``."""

    def __init__(self, workshop: Workshop, uid_base: int, relay_uid: int) -> None:
        self._shop = workshop
        self._uid_base = uid_base
        self._relay_uid = relay_uid
        self._guests: dict[str, QemuGuest] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, str] = {}
        self._damaged: dict[str, int] = {}
        self._copied: dict[str, set[str]] = {}
        self._moves: dict[str, asyncio.Task[bool]] = {}
        self._news: asyncio.Queue[GuestReport] = asyncio.Queue()
        self._arrivals: dict[str, Arriving] = {}
        self._departures: dict[str, tuple[Departing, asyncio.Task[None]]] = {}
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
            held = self._guests[record.id] = QemuGuest(workshop, record)
            if record.made and not held.moves():
                confinement.even(record.id)  # an earlier agent may have died before it said so
        # Nor did it say so to those that it let in, whose user ids others may have next.
        awaited = {one.record.uid for one in self._guests.values() if one.awaits_memory()}
        userfault.keep(lambda uid: uid in awaited or not uid_base <= uid < uid_base + GUEST_UIDS)

    async def ensure(self, guest: Guest) -> GuestReport:
        """See :class:`skysail.hypervisor.Hypervisor`; raises SkysailError when the guest cannot be brought there."""
        async with self._lock(guest.id):
            await self._call_off(guest.volume, *(one.volume for one in guest.disks))
            if guest.role == "gone":
                held = self._guests.get(guest.id)
                if held is not None:
                    await self._forget_moves(held)
                    await held.kill()
                    await held.release()
                    await arrival.drop(self._shop, held)
                # Also without a record: an agent may have died when half of the folder was removed.
                await remove(self._shop.guests / guest.id)
                self._guests.pop(guest.id, None)
                self._damaged.pop(guest.id, None)
                self._seen.pop(guest.id, None)
                return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
            held = self._guests.get(guest.id) or await self._new(guest)
            report = await self._brought(held, guest)
            self._seen[guest.id] = report.state
            return report

    async def _brought(self, held: QemuGuest, guest: Guest) -> GuestReport:
        if guest.role == "receive" or (held.record.arrival is not None and not held.record.made):
            return await self._received(held, guest)
        if guest.receiving is not None and not held.record.made:
            # A new one in its place would be a blank server.
            raise SkysailError(f"guest {guest.id} is to run here, but it never came")
        if guest.receiving is not None and held.record.arrival is not None:
            await self._arriving(held, guest).linger()
        elif held.record.arrival is not None and not held.pulls():
            if (arriving := self._arrivals.pop(guest.id, None)) is not None:
                await arriving.close()
            await arrival.abandon(held)
            held.save(arrival=None)
        if held.record.departure is not None or guest.sending is not None:
            return await self._sent(held, guest)
        return await (held.stop(guest) if guest.role == "stop" else held.run(guest))

    # --- guests that come and go

    async def _received(self, held: QemuGuest, guest: Guest) -> GuestReport:
        if guest.receiving is None or (guest.role == "stop" and not guest.receiving.terms.off):
            raise SkysailError(f"guest {guest.id} has not come yet")
        arriving = self._arriving(held, guest)
        if guest.role == "receive":
            return await arriving.ensure()
        await arriving.came()
        return await self._brought(held, guest)

    def _arriving(self, held: QemuGuest, guest: Guest) -> Arriving:
        """Whoever takes the guest in."""
        if guest.id not in self._arrivals:
            self._arrivals[guest.id] = Arriving(self._shop, held, guest, self._lock(guest.id), self._tell)
        return self._arrivals[guest.id]

    async def _sent(self, held: QemuGuest, guest: Guest) -> GuestReport:
        """A guest that moves, or did not. Raises SkysailError while an attempt that nobody wants any more is not over."""
        former = held.record.departure
        wanted = guest.sending
        if former is not None and (wanted is None or wanted.guest != former.sending.guest):
            if former.phase not in ("ready", "failed"):
                if guest.lost == former.sending.guest:
                    await self._take_back(held)
                elif not await self._called_off(held):
                    return held.report("sent", f"it was sent to guest {former.sending.guest}")
            await departure.abandon(held)
            held.progress = None
            held.save(departure=None)
            former = None
        if former is not None and former.phase not in ("ready", "failed"):
            self._depart(held)
            return held.report("sent" if former.phase == "sent" else "stopped" if guest.role == "stop" else "running")
        if guest.role == "stop" and former is not None and former.phase == "ready":
            report = held.report("stopped")  # what has its disks open is not ended
        else:
            report = await (held.stop(guest) if guest.role == "stop" else held.run(guest))
        if wanted is None or report.state not in ("running", "stopped") or (former is not None and former.phase == "failed"):
            return report
        if former is None:
            await departure.prepare(self._shop, held, guest)
        elif wanted.destination is not None:
            held.save(departure=msgspec.structs.replace(former, sending=wanted))
            self._depart(held)
        return held.report(report.state)

    def _depart(self, held: QemuGuest) -> Departing:
        """Whoever carries the guest away, at work."""
        departing, task = self._departures.get(held.record.id, (None, None))
        if departing is None or task is None or task.done():
            departing = Departing(held, self._relay_uid, self._tell)
            self._departures[held.record.id] = (departing, asyncio.create_task(_work(departing)))
        return departing

    async def _called_off(self, held: QemuGuest) -> bool:
        """Whether the attempt is over and the guest still here; raises SkysailError while that is not known."""
        self._depart(held).call_off("it was called off")
        await asyncio.wait((self._departures[held.record.id][1],), timeout=CALL_OFF_SECONDS)
        phase = held.record.departure.phase if held.record.departure is not None else "failed"
        if phase not in ("failed", "sent"):
            raise SkysailError(f"guest {held.record.id} is still on its way")
        return phase == "failed"

    async def _take_back(self, held: QemuGuest) -> None:
        """The guest that it was sent to is gone for certain. It may have run for a moment: with disks that are the same here
        and there, what this one remembers of them is not true any more, and it is started from them."""
        await self._end_departure(held)
        assert held.record.departure is not None
        await (held.kill() if held.record.departure.passport.pool else departure.take_up(held))

    async def _end_departure(self, held: QemuGuest) -> None:
        _, task = self._departures.pop(held.record.id, (None, None))
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def _forget_moves(self, held: QemuGuest) -> None:
        await self._end_departure(held)
        await departure.abandon(held)
        if (arriving := self._arrivals.pop(held.record.id, None)) is not None:
            await arriving.close()
        await arrival.abandon(held)

    def _tell(self, report: GuestReport) -> None:
        """What a guest did by itself."""
        self._seen[report.id] = report.state
        self._news.put_nowait(report)

    # --- the rest of the door

    async def _new(self, guest: Guest) -> QemuGuest:
        # The record is written before the volume is made, so this is no interrupted launch: it is somebody's disk.
        inherited = guest.heritage is not None and self._shop.cluster is not None
        awaited = guest.receiving is not None and guest.receiving.passport.pool
        if guest.id in self._damaged or (not (awaited or inherited) and guest.volume.id in await self._shop.volumes()):
            raise SkysailError(f"guest {guest.id} has a disk, but its record is lost or damaged",
                               f"bring {self._shop.guests / guest.id / 'guest.json'} back, or delete the instance")
        taken = {held.record.uid for held in self._guests.values()} | set(self._damaged.values())
        # The first is the templates' own.
        uid = next(uid for uid in range(self._uid_base + 1, self._uid_base + GUEST_UIDS) if uid not in taken)
        who = personality.make() if guest.receiving is None else arrival.identity(guest.receiving.passport)
        record = Record(id=guest.id, uid=uid, identity=who)
        if guest.heritage is not None and inherited:
            # What is private of it is on its own disk, of which it has had its identity for long.
            record = msgspec.structs.replace(record, made=True, ours=guest.heritage.ours, identity=msgspec.structs.replace(
                who, host_private="", host_public=guest.heritage.host_key, machine_id=""))
        made = QemuGuest(self._shop, record)
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
            if guest is not None and guest.moves():
                raise SkysailError(f"the guest {snapshot.guest} is moving to another host")
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
        if any(volume.id in volumes for volumes in self._copied.values()) or (guest is not None and guest.moves()):
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
            # Its process lives but does not answer now: nobody's reason to restart a server. One that has not run here yet is
            # still awaited: said to run, it would be cleared away where it does.
            awaited = guest.record.arrival is not None and not guest.record.made
            return guest.report("listening" if awaited else "running", silent.what)

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
        looks: set[asyncio.Task[None]] = set()
        for turn in itertools.count():
            for identifier, guest in list(self._guests.items()):
                if self._seen.get(identifier) in WATCHED and not self._lock(identifier).locked():
                    look = asyncio.create_task(self._look_again(identifier, guest))
                    looks.add(look)
                    look.add_done_callback(looks.discard)
            if turn % TRIM_EVERY == 0:
                await in_thread(process.trim_all, [guest.folder / "run" for guest in list(self._guests.values())])
            end = asyncio.get_running_loop().time() + LOOK_SECONDS
            while (report := await self._next_change(end)) is not None:
                yield report

    async def _next_change(self, end: float) -> GuestReport | None:
        try:
            async with asyncio.timeout_at(end):
                return await self._news.get()
        except TimeoutError:
            return None

    async def _look_again(self, identifier: str, guest: QemuGuest) -> None:
        async with self._lock(identifier):
            try:
                report = await self._observed(guest)
            except SkysailError as failure:
                log.warning("guest %s could not be looked at: %s", identifier, failure)
                return
            # It may have been removed while we waited for the lock.
            if self._guests.get(identifier) is guest and report.state != self._seen.get(identifier):
                log.info("guest %s is %s", identifier, report.state)
                self._tell(report)

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


async def _work(departing: Departing) -> None:
    """Until it has come to an end: what a full disk kept it from writing down is tried again."""
    while True:
        try:
            await departing.run()
            return
        except Exception:
            log.exception("a guest's move goes on after a failure")
            await asyncio.sleep(1.0)
