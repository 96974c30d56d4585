"""A guest that goes to another host: the source's half of a live migration (see docs/decisions/0040).

Until QEMU says ``completed`` the guest is ours, and whatever fails, it goes on here. From then on it is the target's: this
process does not run again unless the target says that it never will, or is lost. By post-copy that is so from the moment on
in which QEMU has sent all but memory; what goes after it is in :mod:`skysail.hypervisor.trail` (see docs/decisions/0046).
Disks that are in a pool are not copied: the target has them open, too, and writes nothing before it runs. A guest that is off
moves by the same steps, without its memory.

Every step looks first at what there is, so that an agent which comes after one that died goes on where QEMU stands. Here are
their order and what is noted of them. How disks and memory go is in :mod:`skysail.hypervisor.mirrors` and
:mod:`skysail.hypervisor.memory`, what both go by in :mod:`skysail.hypervisor.connections`.

Source: QEMU QMP Reference Manual, migrate-continue, query-migrate; docs/devel/migration (pause-before-switchover).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from skysail.contract.document import Guest
from skysail.contract.migration import Destination, MovingDisk, Progress
from skysail.contract.report import GuestReport, GuestState
from skysail.hypervisor import accelerator, confinement, credentials, memory, mirrors, offer, passport, process, relay
from skysail.hypervisor.connections import Connections, Failed, drop_certificates
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.line import Line
from skysail.hypervisor.mirrors import Mirrors
from skysail.hypervisor.qmp import Gone, Monitor, Refused
from skysail.hypervisor.record import Departure
from skysail.hypervisor.trail import Trail, part
from skysail.hypervisor.workshop import Workshop
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.1
# No byte has moved for so long: the network is away.
STALL_SECONDS = 30.0
# The same for a guest that stands still meanwhile.
STILL_SECONDS = 10.0
WORD_SECONDS = 5.0
SETTLED_SECONDS = 10.0
# A target's disk may have much to write out.
SYNC_SECONDS = 120.0
AGAIN_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


async def prepare(shop: Workshop, guest: QemuGuest, wanted: Guest) -> None:
    """Give the guest the passport of its next attempt. It runs, and its lock is held. Raises SkysailError when it cannot move
    now."""
    record = guest.record
    assert wanted.sending is not None
    off, pool = wanted.sending.terms.off, await shop.pool()
    if off and not record.made:
        raise SkysailError(f"guest {record.id} has not been made yet")
    if record.shape is None and not off:
        raise SkysailError(f"guest {record.id} was started by an earlier version of Skysail, which did not note how",
                           "stop and start the instance once")
    if record.copying or record.freezing:
        raise SkysailError(f"guest {record.id} is being copied")
    if off and not pool:
        await guest.hold(wanted)
    # A guest that is off and in a pool has no process, and needs none.
    monitor = await guest.monitor() if guest.alive() else None
    if monitor is not None:
        await _cut(monitor)  # an agent may have died before it had ended the last attempt
    authority = credentials.make(guest.folder / "move", "client", wanted.sending.guest, record.uid)
    guest.progress = None
    issued = await passport.issue(shop, guest, wanted, monitor, authority=authority, pool=pool)
    guest.save(departure=Departure(
        sending=wanted.sending, process=guest.record.process, phase="ready", passport=issued,
        progress=Progress(guest=wanted.sending.guest, state="ready")))


class Departing:
    """One attempt of one guest. ``news`` is told how it comes along. ``relay_uid`` carries its bytes to the network."""

    def __init__(self, guest: QemuGuest, relay_uid: int, news: Callable[[GuestReport], None]) -> None:
        assert guest.record.departure is not None
        self._guest = guest
        self._sending = guest.record.departure.sending
        assert self._sending.destination is not None
        self._destination: Destination = self._sending.destination
        self._news = news
        self._called_off = ""
        self._stopped = 0.0
        self._moved = (0, 0.0)
        # Bytes of disks that are the same at both ends, and that there are.
        self._same = (0, 0)
        self._former: dict[str, str] = {}
        self._line: Line | None = None
        self._connections = Connections(guest, self._destination, self._sending.guest, relay_uid)
        self._trail = Trail(guest, self._connections, lambda word: self._say(word, WORD_SECONDS), self._count_after)
        self._mirrors = Mirrors(self._copied, self._destination.over, self._sending.terms.bytes_per_second, self._connections)

    @property
    def _departure(self) -> Departure:
        departure = self._guest.record.departure
        assert departure is not None
        return departure

    @property
    def _folder(self) -> Path:
        return self._guest.folder / "move"

    @property
    def _off(self) -> bool:
        """Whether it moves without running."""
        return self._sending.terms.off

    @property
    def _copied(self) -> tuple[MovingDisk, ...]:
        """The disks that the target has a copy of its own of."""
        return () if self._departure.passport.pool else self._departure.passport.disks

    def call_off(self, reason: str) -> None:
        """Give it up as soon as it can be; without effect once the guest is the target's."""
        self._called_off = reason

    async def run(self) -> None:
        """Until the guest is the target's, or ours for good. Cancelled, it leaves everything as it is, for the next one."""
        try:
            if self._departure.heard or self._departure.phase == "failed":
                await self._finish()
                return
            if self._departure.phase == "sent" or self._departure.parted:
                await self._hand_over()
                return
            self._former = confinement.unbound(self._guest.record.id)
            try:
                await self._move()
            except (SkysailError, OSError, TimeoutError) as failure:
                if not await self._ours(failure):
                    await self._hand_over()
                    return
                await back(self._guest)
                await self._fail(str(failure) or "it took too long")
            else:
                await self._hand_over()
        finally:
            confinement.rebind(self._former)
            confinement.even(self._guest.record.id)
            self._connections.close()
            if self._line is not None:
                self._line.close()

    async def _move(self) -> None:
        """Everything until QEMU says ``completed``. Raises whatever keeps it from that."""
        guest = self._guest
        if not self._departure.began:
            self._note(began=time.time())
        if self._called_off:
            raise Failed(self._called_off)
        async with asyncio.timeout(max(1.0, self._departure.began + self._sending.terms.seconds - time.time())):
            fresh = self._departure.phase in ("ready", "mirroring")
            if fresh:
                if guest.record.process != self._departure.process:
                    raise Failed("its process is another one than its passport is of")
                credentials.trust(self._folder, self._destination.authority, guest.record.uid)
                await self._tell_seed()
                self._note(phase="mirroring")
            if self._off:
                await self._copy_off()
                return
            monitor = await guest.monitor()
            if fresh:
                await self._connections.take_certificates(monitor)
                if self._copied:
                    await self._mirrors.copy(monitor, self._count_disks)
                    await self._have_synced(monitor)
                # From here on the target may have been told to run, whatever becomes of us: see record.Departure.
                self._note(phase="moving")
            confinement.ahead(guest.record.id)
            if fresh or await memory.status(monitor) == "":
                await self._migrate(monitor)
            await self._follow(monitor)

    async def _copy_off(self) -> None:
        """Nobody writes to its disks: once they are the same there it is the target's, which has not been told so before that
        is written down."""
        if self._copied:
            monitor = await self._guest.monitor()
            await self._connections.take_certificates(monitor)
            await mirrors.forget_ended(monitor)
            await self._mirrors.copy(monitor, self._count_disks)
            await self._mirrors.end(monitor)
            await self._have_synced(None)
        if self._called_off:
            raise Failed(self._called_off)
        self._sent("its target has not been told yet")

    async def _tell_seed(self) -> None:
        if self._departure.passport.shape.seed_serial:
            content = await in_thread(self._guest.seed.read_bytes)
            await self._say({"seed": base64.b64encode(content).decode()}, SYNC_SECONDS)

    async def _have_synced(self, monitor: Monitor | None) -> None:
        """What went over is on the target's disk. Its agent may be one that is just being followed by another; but where the
        copies that still run end, or nobody answers for long, this raises Failed."""
        end = time.monotonic() + SYNC_SECONDS
        while True:
            try:
                await self._say({"sync": True}, SYNC_SECONDS)
                return
            except Gone as silent:
                if time.monotonic() > end:
                    raise Failed(str(silent)) from silent
            if self._called_off:
                raise Failed(self._called_off)
            if monitor is not None:
                await self._mirrors.look(monitor)
            await asyncio.sleep(AGAIN_SECONDS[-1])

    async def _migrate(self, monitor: Monitor) -> None:
        """Begin to send the memory."""
        outlet = self._connections.to_memory()
        await self._stand(monitor)
        await memory.send(monitor, outlet, self._sending.terms, self._connections.tls)

    async def _stand(self, monitor: Monitor) -> None:
        """Stop the guest if its QEMU would lose what it writes from now on; undone by :func:`back`. The target runs it in any
        case by the word that it is told."""
        shape = self._departure.passport.shape
        version = offer.version(await monitor.execute("query-version"))
        if not accelerator.follows_writes(shape.accelerator, version):
            log.info("guest %s stands still while its memory goes: QEMU %s loses track of what it writes",
                     self._guest.record.id, version)
            self._note(stood=self._departure.stood or _now())
            # It writes out the disks first, there too.
            await self._connections.ask(monitor, "stop")

    async def _follow(self, monitor: Monitor) -> None:
        """Until it has completed, or goes by post-copy; raises Failed when it has not."""
        parting = False
        with monitor.listening("MIGRATION", "MIGRATION_PASS", "STOP") as events:
            while True:
                seen = await self._connections.ask(monitor, "query-migrate")
                self._count(*await self._mirrored(monitor, seen), seen)
                match seen.get("status", ""):
                    case "completed":
                        return
                    case word if word.startswith(memory.AFTER):
                        # Before its target is told anything: from here on a failure of QEMU's is none of the attempt.
                        self._note(parted=True)
                        return
                    case "active" if self._sending.terms.post_copy and not parting and self._gone_through(seen):
                        parting = True
                        self._note(stood=self._departure.stood or _now())
                        await part(monitor, self._connections)
                        continue
                    case "pre-switchover":
                        self._stopped = self._stopped or _now()
                        await self._mirrors.end(monitor)
                        # It may leave that state a moment after it was told to, and then refuses to be told again.
                        with contextlib.suppress(Refused):
                            await monitor.execute("migrate-continue", {"state": "pre-switchover"})
                    case over if over in memory.OVER:
                        raise Failed(f"QEMU did not send it: {seen.get('error-desc', over)}")
                    case "device":
                        pass  # the guest stands still: nothing is called off any more, it is a matter of milliseconds
                    case _ if self._called_off:
                        raise Failed(self._called_off)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        if (await monitor.heard(events))["event"] == "STOP":
                            self._stopped = _now()

    @staticmethod
    def _gone_through(seen: dict[str, Any]) -> bool:
        """Whether all of the memory has gone once: what has to go after the guest is only what it wrote since."""
        return int(seen.get("ram", {}).get("dirty-sync-count", 0)) > 1

    async def _mirrored(self, monitor: Monitor, seen: dict[str, Any]) -> tuple[int, int]:
        """As :meth:`skysail.hypervisor.mirrors.Mirrors.look`, which raises Failed, as long as mirrors are needed; as it was
        then when they are not."""
        if seen.get("status") in ("setup", "active"):
            self._same = await self._mirrors.look(monitor)
        return self._same

    # --- the end

    async def _ours(self, failure: BaseException) -> bool:
        """Whether the guest is still ours after a failure, with nothing of the migration going on any more. Asked until that
        is known."""
        guest = self._guest
        self._connections.hang_up()
        for turn in range(1 << 30):
            try:
                if not guest.alive():
                    return self._departure.phase != "moving" or "never" in await self._say({"never": True}, WORD_SECONDS)
                monitor = await guest.monitor()
                word = await memory.status(monitor)
                if word not in memory.OVER and not word.startswith(memory.AFTER):
                    word = await memory.cancel(monitor)
                return word in memory.OVER
            except SkysailError as silent:
                if turn == 0:
                    log.warning("guest %s failed to move (%s); it is not known yet whose it is: %s", guest.record.id,
                                failure, silent)
                await asyncio.sleep(AGAIN_SECONDS[min(turn, len(AGAIN_SECONDS) - 1)])
        raise AssertionError

    async def _hand_over(self) -> None:
        """The right to run is the target's. Told until it answers."""
        for turn in range(1 << 30):
            try:
                answer = await self._say({"run": True}, WORD_SECONDS)
            except SkysailError as silent:
                if self._departure.phase != "sent":
                    log.warning("guest %s is sent, and its target does not say that it runs: %s", self._guest.record.id,
                                silent)
                    self._sent(f"{silent}")
                if self._departure.parted:
                    with contextlib.suppress(SkysailError):
                        await self._trail.mend()
                await asyncio.sleep(AGAIN_SECONDS[min(turn, len(AGAIN_SECONDS) - 1)])
                continue
            if "never" in answer:
                lost = await take_up(self._guest)
                await self._fail(f"the target did not run it: {answer['never']}{lost}")
                return
            await self._measure(answer.get("for_ms"))
            if self._departure.parted:
                await self._send_after()
            self._sent("")
            await self._finish()
            return

    async def _send_after(self) -> None:
        """It runs at the target, and the rest of its memory goes after it."""
        self._sent(_AFTER)
        cut = await self._trail.follow()
        if cut:
            log.warning("guest %s was started from its disk by its target: %s", self._guest.record.id, cut)
        held = self._departure.progress if self._guest.progress is None else self._guest.progress
        assert held is not None
        self._guest.progress = msgspec.structs.replace(held, cut=cut)

    def _count_after(self, seen: dict[str, Any]) -> None:
        """How what goes after it comes along."""
        held, ram = self._guest.progress or self._departure.progress, seen.get("ram", {})
        if held is None or not ram.get("total"):
            return
        percent = min(99, 100 * (int(ram["total"]) - int(ram["remaining"])) // int(ram["total"]))
        self._guest.progress = msgspec.structs.replace(
            held, state="sent", reason=_AFTER, percent=percent, memory_bytes=int(ram["transferred"]),
            seconds=round(time.time() - self._departure.began, 3))
        if held.percent != percent:
            self._news(self._guest.report("sent"))

    async def _measure(self, runs_ms: float | None) -> None:
        """QEMU's last word on how it went. The guest has been running there for so long, where that is known."""
        if self._off:
            return
        now, stood = _now(), self._departure.stood
        since = stood or self._stopped
        with contextlib.suppress(SkysailError):  # it is over in any case
            seen = await (await self._guest.monitor()).execute("query-migrate")
            if "ram" in seen:
                self._count(*await self._mirrored(await self._guest.monitor(), seen), seen)
        held = self._guest.progress
        if held is not None and since and runs_ms is not None:
            gap_ms = max(0.0, round((now - since) * 1000 - runs_ms, 1))
            # QEMU counts its pause from when it stops a guest by itself.
            self._guest.progress = msgspec.structs.replace(held, gap_ms=gap_ms, pause_ms=gap_ms if stood else held.pause_ms)

    def _sent(self, reason: str) -> None:
        held = self._guest.progress or self._departure.progress or Progress(guest=self._sending.guest, state="sent")
        after = self._departure.parted
        self._tell(msgspec.structs.replace(held, state="sent", reason=reason, percent=99 if after and reason else 100,
                                           post_copy=after), phase="sent", heard=not reason)

    async def _fail(self, reason: str) -> None:
        """It runs here, or is started again here, and the attempt is over."""
        log.warning("guest %s does not move: %s", self._guest.record.id, reason)
        held = self._guest.progress or Progress(guest=self._sending.guest, state="failed")
        self._tell(msgspec.structs.replace(held, state="failed", reason=reason[:500]), phase="failed")
        await self._finish()

    def _tell(self, progress: Progress, **noted: Any) -> None:
        self._note(progress=progress, **noted)
        self._guest.progress = progress
        here: GuestState = "stopped" if self._off else "running" if self._guest.alive() else "crashed"
        self._news(self._guest.report("sent" if self._departure.phase == "sent" else here))

    async def _finish(self) -> None:
        """Nothing of the attempt is left but what is noted."""
        if self._guest.alive():
            with contextlib.suppress(SkysailError):
                await _cut(await self._guest.monitor())
        relay.end(self._guest.folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- beside

    async def _say(self, word: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._line is None:
            try:
                context = credentials.context(self._folder, "client")
            except OSError as lost:
                raise Failed(f"the keys of the attempt are lost: {lost}") from lost
            self._line = Line(self._destination.address, self._destination.word_port, context, self._sending.guest)
        return await self._line.ask(word, seconds)

    def _note(self, **changes: Any) -> None:
        self._guest.save(departure=msgspec.structs.replace(self._departure, **changes))

    def _count_disks(self, done: int, total: int) -> None:
        """How it comes along while nothing else goes; raises Failed when it does not."""
        self._same = (done, total)
        self._count(done, total, {})

    def _count(self, done: int, total: int, seen: dict[str, Any]) -> None:
        """How it comes along; raises Failed when it does not."""
        ram, former = seen.get("ram", {}), self._guest.progress
        went = int(ram.get("transferred", 0))
        whole = total + (0 if self._off else int(ram.get("total", 0) or self._departure.passport.shape.memory_mib << 20))
        gone = done + int(ram.get("total", 0)) - int(ram.get("remaining", ram.get("total", 0)))
        self._guest.progress = Progress(
            guest=self._sending.guest, state="copying", percent=min(99, 100 * gone // max(whole, 1)),
            seconds=round(time.time() - self._departure.began, 3), memory_bytes=went,
            disk_bytes=self._connections.disk_bytes(),
            rounds=int(ram.get("dirty-sync-count", 0)), pause_ms=float(seen.get("downtime", 0)),
            slowed_percent=int(seen.get("cpu-throttle-percentage", 0)), gap_ms=former.gap_ms if former is not None else 0.0)
        if former is None or former.percent != self._guest.progress.percent:
            self._news(self._guest.report("stopped" if self._off else "running"))
        now = time.monotonic()
        # A guest that writes to its disk moves bytes of it all the time.
        moved = went if seen.get("status") else done
        if self._moved[0] != moved or not self._moved[1]:
            self._moved = (moved, now)
        elif now - self._moved[1] > (limit := STILL_SECONDS if self._departure.stood else STALL_SECONDS) and seen.get(
                "status", "") in ("", "setup", "active"):
            raise Failed(f"no byte has moved for {limit:.0f} s: the network between the hosts is away")
        if self._called_off and seen.get("status", "") in ("", "setup", "active"):
            raise Failed(self._called_off)


async def take_up(guest: QemuGuest) -> str:
    """The target never will run it: it goes on here as by :func:`back`. QEMU lets none go on of which it has still memory to
    send: then its process ends, and it starts from its disk, which is whole. What that has lost, in words; '' where nothing
    is."""
    departure = guest.record.departure
    if departure is not None and departure.parted and guest.alive():
        word = await memory.status(await guest.monitor())
        if word.startswith(memory.AFTER):
            await guest.kill()
            return "; QEMU lets it not go on here either, and it starts from its disk"
    await back(guest)
    return ""


async def back(guest: QemuGuest) -> None:
    """The target never will run it: it goes on here, where it stood, if its process still is there."""
    if guest.alive():
        monitor = await guest.monitor()
        # QEMU says that a migration is over a moment before it says how the guest stands.
        end = time.monotonic() + SETTLED_SECONDS
        while (state := await process.status(monitor)) == "finish-migrate":
            if time.monotonic() > end:
                raise SkysailError(f"guest {guest.record.id} stands still in the midst of a migration that is over")
            await asyncio.sleep(0.01)
        if state in ("postmigrate", "paused"):
            await monitor.execute("cont")


# Why a source has not done with a guest that runs elsewhere.
_AFTER = "memory goes after it"


def _now() -> float:
    """Seconds since this machine was booted, the same for the next agent (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def abandon(guest: QemuGuest) -> None:
    """Nothing is left that carries the guest away, nor any key. Its process is gone."""
    if guest.record.departure is not None:
        relay.end(guest.folder)
        shutil.rmtree(guest.folder / "move", ignore_errors=True)


async def _cut(monitor: Monitor) -> None:
    """QEMU sends nothing anywhere any more."""
    await mirrors.cut(monitor)
    await drop_certificates(monitor)
