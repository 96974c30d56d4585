"""A hypervisor without guests: it keeps the door's promises in memory, for tests and for measuring scale."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path

import asyncssh
import msgspec

from skysail.contract.document import Guest, Snapshot, Volume
from skysail.contract.migration import SYSTEM_DISK, Destination, MovingDisk, Passport, Progress, Sending, Shape
from skysail.contract.report import GuestReport, Mount, SnapshotReport
from skysail.hypervisor import Usage
from skysail.storage import Copy, Manifest, Shelf
from skysail.storage.sim import SimShelf

MakeVolume = Callable[[Volume, Path | None, int, int], Awaitable[Path]]
# Long enough to be seen under way.
COPY_SECONDS = 0.3


# A simulated guest's launch script is this line: what it does with its processors and its network as long as it runs.
LOAD = re.compile(r"^#load(?: cpu=(?P<cpu>[0-9.]+))?(?: rx=(?P<rx>\d+))?(?: tx=(?P<tx>\d+))?$", re.MULTILINE)


class Life:
    """A process that is none: it burns ``cpu`` processors and moves bytes, per second, and counts them."""

    _numbers = itertools.count(1)

    def __init__(self, launch_script: str, now: float) -> None:
        told = LOAD.search(launch_script)
        self.cpu = float(told["cpu"] or 0) if told else 0.0
        self.rx, self.tx = (int(told["rx"] or 0), int(told["tx"] or 0)) if told else (0, 0)
        self.name = f"sim/{os.getpid()}/{next(self._numbers)}"
        self.processors = float("inf")
        self.began = self.seen = now
        self.used = 0.0

    def count(self, now: float) -> None:
        """Burn until ``now``."""
        self.used += min(self.cpu, self.processors) * (now - self.seen)
        self.seen = now

    def flow(self, now: float) -> tuple[int, int]:
        """Bytes in and out so far."""
        return int(self.rx * (now - self.began)), int(self.tx * (now - self.began))


class SimHypervisor:
    """Guests are entries of a table; :meth:`halt` and :meth:`crash` do what a guest does by itself. ``make_volume`` gives
    each guest that runs its disk, as the real engine does. Disks are in the ``pool`` that other hosts see, too, if there is
    one. What a guest uses is counted from its launch script (see LOAD)."""

    def __init__(self, make_volume: MakeVolume | None = None, now: Callable[[], float] = time.monotonic,
                 shelf: Shelf | None = None, pool: str = "") -> None:
        self._now = now
        self._pool = pool
        self._lives: dict[str, Life] = {}
        self._flows: dict[str, tuple[int, int]] = {}
        self._make_volume = make_volume
        self._shelf = shelf or SimShelf()
        self._guests: dict[str, GuestReport] = {}
        self._moves: dict[str, asyncio.Task[None]] = {}
        self._changes: asyncio.Queue[GuestReport] = asyncio.Queue()

    async def ensure(self, guest: Guest) -> GuestReport:
        held = self._guests.get(guest.id)
        disks = tuple(one.volume.id for one in guest.disks)
        mounts: dict[str, Mount] = {one.volume.id: "Mounted" for one in guest.disks if one.mount}
        if guest.role == "receive" and (held is None or held.state not in ("running", "stopped")):
            nowhere = Destination(address="sim", memory_port=1, disks_port=2, word_port=3, authority="")
            keys = (guest.receiving.passport.host_key,) if guest.receiving is not None else ()
            report = GuestReport(id=guest.id, state="listening", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=keys, destination=nowhere)
            self._guests[guest.id] = report
            return report
        if held is not None and held.progress is not None and held.progress.state != "ready" and guest.role in (
                "run", "send", "stop") and (moved := self._moving(guest, held)) is not None:
            return moved
        if guest.role == "gone":
            self._call_off(guest.id)
            self._guests.pop(guest.id, None)
            self._end(guest.id)
            return GuestReport(id=guest.id, state="gone", starts=guest.starts, reboots=guest.reboots)
        if guest.role == "stop":
            self._end(guest.id)
            heritage = guest.heritage if held is None else None
            if heritage is not None and self._make_volume is not None:  # it is there already, in a pool that has no memory
                await self._make_volume(guest.volume, Path("/nonexistent"), guest.volume.size_gib << 30, 0)
            report = GuestReport(id=guest.id, state="stopped", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held else (heritage.host_key,) if heritage else (), disks=disks,
                                 alone=held is not None and held.alone)
            if guest.sending is not None:
                report = self._leaving(guest, report)
        elif held is not None and held.state == "halted" and held.starts >= guest.starts:
            return held
        else:
            if self._make_volume is not None:
                await self._make_volume(guest.volume, Path("/nonexistent"), guest.volume.size_gib << 30, 0)
            report = GuestReport(id=guest.id, state="running", starts=guest.starts, reboots=guest.reboots,
                                 host_keys=held.host_keys if held and held.host_keys else (_known_key(guest),), disks=disks,
                                 mounts=mounts, alone=held is not None and held.alone, ours=True)
            if guest.id not in self._lives:
                self._lives[guest.id] = Life(guest.personality.user_data, self._now())
            if guest.role == "send":
                report = self._leaving(guest, report)
        self._guests[guest.id] = report
        return report

    def _leaving(self, guest: Guest, report: GuestReport) -> GuestReport:
        """A guest that is to move: on its way, once it knows where to."""
        assert guest.sending is not None
        going = guest.sending.destination is not None
        if going and guest.id not in self._moves:
            self._moves[guest.id] = asyncio.create_task(self._go(guest.id, guest.sending))
        shape = Shape(number=0, type="sim", accelerator="tcg", cpu="sim", vcpus=guest.vcpus, memory_mib=guest.memory_mib,
                      pluggable=False)
        return msgspec.structs.replace(
            report, progress=Progress(guest=guest.sending.guest, state="copying" if going else "ready"),
            passport=Passport(shape=shape, plugged_mib=0, generation_id="sim", host_key="".join(report.host_keys), ours=True,
                              authority="", starts=guest.starts, reboots=guest.reboots, pool=self._pool, disks=tuple(
                                  MovingDisk(name=name, volume=volume.id, size_bytes=volume.size_gib << 30)
                                  for name, volume in ((SYSTEM_DISK, guest.volume),
                                                       *((one.name, one.volume) for one in guest.disks)))))

    async def _go(self, identifier: str, sending: Sending) -> None:
        await asyncio.sleep(COPY_SECONDS)
        self._end(identifier)
        self._change(identifier, state="sent", progress=Progress(
            guest=sending.guest, state="sent", percent=100, post_copy=sending.terms.post_copy))

    def _moving(self, guest: Guest, held: GuestReport) -> GuestReport | None:
        """How a guest stands that is on its way, or went, or could not; None where it is to be as before."""
        assert held.progress is not None
        wanted = guest.sending.guest if guest.sending is not None else ""
        if wanted == held.progress.guest or (held.state == "sent" and guest.lost != held.progress.guest):
            return held
        self._call_off(guest.id)
        return None

    def _call_off(self, identifier: str) -> None:
        task = self._moves.pop(identifier, None)
        if task is not None:
            task.cancel()

    def _change(self, identifier: str, **changes: object) -> None:
        self._guests[identifier] = msgspec.structs.replace(self._guests[identifier], **changes)
        self._changes.put_nowait(self._guests[identifier])

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

    async def flatten(self, volume: Volume, guest_id: str) -> bool:
        held = self._guests.get(guest_id)
        if held is not None and held.id == volume.id:
            self._guests[guest_id] = msgspec.structs.replace(held, alone=True)
        return held is not None or not guest_id

    async def lift(self, snapshot_id: str, leaving: Collection[str]) -> SnapshotReport | None:
        await self._shelf.lift(snapshot_id, leaving, 0)
        return next((one for one in await self.snapshots() if one.id == snapshot_id), None)

    def _end(self, guest_id: str) -> None:
        self._flows[guest_id] = self.flow(guest_id)
        self._lives.pop(guest_id, None)

    def flow(self, guest_id: str) -> tuple[int, int]:
        """Bytes that went in and out of the guest's port."""
        before, life = self._flows.get(guest_id, (0, 0)), self._lives.get(guest_id)
        now = life.flow(self._now()) if life is not None else (0, 0)
        return before[0] + now[0], before[1] + now[1]

    async def usage(self) -> dict[str, Usage]:
        found = {}
        for identifier, life in self._lives.items():
            life.count(self._now())
            found[identifier] = Usage(process=life.name, age_seconds=self._now() - life.began, cpu_seconds=life.used,
                                      answers=True)
        return found

    async def bound(self, guest_id: str, processors: float) -> None:
        if (life := self._lives.get(guest_id)) is not None:
            life.count(self._now())
            life.processors = processors

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

    def break_off(self, guest_id: str, reason: str) -> None:
        """The guest cannot move, and runs on here."""
        held = self._guests[guest_id].progress
        assert held is not None and held.state == "copying"
        self._call_off(guest_id)
        self._change(guest_id, progress=msgspec.structs.replace(held, state="failed", reason=reason))

    def halt(self, guest_id: str) -> None:
        """The guest powers itself off."""
        self._end(guest_id)
        self._change(guest_id, state="halted")

    def crash(self, guest_id: str) -> None:
        """The guest's process dies."""
        self._end(guest_id)
        self._change(guest_id, state="crashed")


def _known_key(guest: Guest) -> str:
    return guest.heritage.host_key if guest.heritage is not None else _host_key()


def _host_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
