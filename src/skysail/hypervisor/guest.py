"""One guest of this host: its folder, its record on disk, its process.

The record is what a later agent finds: it is written before and after each effect that must not be repeated or forgotten.
``made`` turns true once the guest has its identity on its own disk; a process found without it has never been anybody's
server, so it is thrown away and made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from skysail.contract.document import Guest, Volume
from skysail.contract.migration import Progress
from skysail.contract.report import GuestReport, GuestState
from skysail.hypervisor import (
    Usage,
    addressing,
    boot,
    confinement,
    disks,
    freezing,
    guest_agent,
    mounting,
    offer,
    personality,
    process,
    qemu,
)
from skysail.hypervisor.qmp import Channel, Gone, Monitor, Refused
from skysail.hypervisor.record import Record
from skysail.hypervisor.template import Image, Template
from skysail.hypervisor.workshop import Workshop
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread

log = logging.getLogger(__name__)
# An orderly shutdown under emulation takes some 10 s; a guest that ignores the button is cut off after this.
SHUTDOWN_SECONDS, PRESS_SECONDS = 90.0, 5.0
CLONE_SECONDS = 60.0
QUIT_SECONDS = 10.0
# A foreign guest is called running before its agent is up.
MOUNT_SECONDS = 60.0

# QEMU's run states (QMP Reference Manual, RunState) that are not simply "it runs". A process that waits to begin has run
# nothing yet; one that stands on an I/O error waits for room on the disk and loses nothing.
STATES: Mapping[str, GuestState] = {
    "prelaunch": "starting", "inmigrate": "starting", "shutdown": "halted", "guest-panicked": "crashed",
    "internal-error": "crashed", "io-error": "crashed", "postmigrate": "sent"}


class QemuGuest:
    """Brings one guest to its role. Calls come one at a time; the engine holds the lock."""

    def __init__(self, workshop: Workshop, record: Record) -> None:
        self._shop = workshop
        self.record = record
        self._monitor: Monitor | None = None
        self._connecting = asyncio.Lock()
        self._stages: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        # How its move to another host stands, between what its record says of that.
        self.progress: Progress | None = None

    @property
    def folder(self) -> Path:
        return self._shop.guests / self.record.id

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.record.process is not None and self.record.process.alive()

    def moves(self) -> bool:
        """Whether it is on its way to another host, or about to be."""
        return self.record.departure is not None and self.record.departure.phase != "failed"

    def pulls(self) -> bool:
        """Whether it came from another host, and some of its memory is still there."""
        arrival = self.record.arrival
        return arrival is not None and arrival.pull is not None and arrival.pull.state == "coming"

    def awaits_memory(self) -> bool:
        """Whether it is to come from another host, and has not begun to run."""
        arrival = self.record.arrival
        return arrival is not None and not arrival.never and not self.record.made and self.alive()

    def save(self, **changes: Any) -> None:
        """Change the record on the disk, then here: what could not be written down (a full disk) did not happen."""
        record = msgspec.structs.replace(self.record, **changes)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            durable.sync(self._shop.guests)
        durable.replace(self.folder / "guest.json", msgspec.json.encode(record))
        self.record = record

    def report(self, state: GuestState, reason: str = "") -> GuestReport:
        """The guest as it stands."""
        arrival, departure = self.record.arrival, self.record.departure
        awaited = arrival is not None and not arrival.never and not self.record.made
        return GuestReport(id=self.record.id, state=state, starts=self.record.starts, reboots=self.record.reboots,
                           reason=reason, host_keys=(self.record.identity.host_public,), stages=dict(self._stages),
                           disks=self.record.disks, refused=dict(self._refused), mounts=dict(self.record.mounts),
                           alone=self.record.made and not self._shop.shelf.standing(self.record.parents),
                           ours=self.record.ours, qemu=self.record.qemu if self.alive() else "",
                           destination=arrival.destination if awaited and arrival is not None else None,
                           pull=arrival.pull if arrival is not None else None,
                           passport=departure.passport if departure is not None else None,
                           progress=self.progress or (departure.progress if departure is not None else None))

    async def monitor(self) -> Monitor:
        """The control connection, made again after a restart of the agent."""
        async with self._connecting:  # QEMU serves one connection: a second one would wait for the first to end
            if self._monitor is None:
                self._monitor = await Monitor.connect(self.folder / "run" / "qmp.sock")
            return self._monitor

    async def look(self) -> GuestState:
        """The state of the process, as QEMU itself says it; raises Gone while it lives but does not answer."""
        if self.alive() and self.pulls():
            # QEMU may wait for a page of it with its main loop, and must not be asked much: see hypervisor/pull.py.
            return "running"
        if self.alive():
            try:
                status = await process.status(await self.monitor())
                if self.record.departure is not None and self.record.departure.sending.terms.off and status == "prelaunch":
                    return "sent" if self.record.departure.phase == "sent" else "stopped"
                if self.record.departure is not None and self.record.departure.phase == "sent":
                    return "sent"  # by post-copy it is so before QEMU has sent all of it
                if self.record.arrival is not None and not self.record.made and status != "running":
                    return "listening"
                return STATES.get(status, "running")
            except Gone:
                await self._leave()
                if self.alive():
                    # Busy or hung is not dead: whoever asked tries again, and its disk stays its own.
                    raise
        await self._leave()
        if self.record.departure is not None and self.record.departure.phase == "sent":
            return "sent"
        if self.record.arrival is not None and not self.record.made:
            return "listening" if self.record.arrival.bare and not self.record.arrival.never else "failed"
        if self.record.stopped:
            return "stopped"
        if self.record.halted:
            return "halted"
        return "crashed" if self.record.made else "preparing"

    async def usage(self, busy: bool) -> Usage | None:
        """What its process has used; None without one. A guest that is ``busy`` is not asked whether it answers: its agent
        talks to one at a time."""
        pid, departure = self.record.process, self.record.departure
        if pid is None or not pid.alive() or (departure is not None and departure.phase == "sent"):
            return None
        used = confinement.used_seconds(self.record.id, pid.pid)
        if used is None:
            return None  # it ended meanwhile
        answers = None if busy or not self.record.made or self.moves() else await guest_agent.answers(self.agent)
        return Usage(process=f"{pid.boot}/{pid.pid}/{pid.started}", age_seconds=pid.age(), cpu_seconds=used, answers=answers,
                     busy=busy, waiting=self.record.arrival is not None and not self.record.made)

    async def run(self, guest: Guest) -> GuestReport:
        """Let it run: clone or boot it, or adopt it as it is; carry out a reboot that is due."""
        state = await self.look()
        process.trim(self.folder / "run")
        if state == "halted" and self.record.starts >= guest.starts:
            # It powered itself off, and nobody asked for a start since.
            self.save(halted=True)
            await self.kill()
            return self.report("halted")
        if self.alive() and state == "crashed":
            state = await self._resume()
        if self.alive() and (state != "running" or not self.record.made):
            await self.kill()
        if self.record.made and self.record.ours is None:
            with contextlib.suppress(SkysailError):  # an image that is not here keeps no guest from running
                self.save(ours=self.ours(guest))
        if not self.alive():
            for volume in (guest.volume, *(one.volume for one in guest.disks)):
                await self._shop.reclaim_volume(volume.id)
            await (self._boot(guest) if self.record.made else self._make(guest))
            await self._plug_disks(guest, await self.monitor())
            self.save(starts=guest.starts)
            await self._readdress(guest)
            await self._mount_disks(guest)
            return self.report("running")
        if self.record.reboots >= guest.reboots:
            await self.melt()
        if not self.record.grown:
            await self._grow(guest, await self.monitor())
        await self._plug_disks(guest, await self.monitor(), running=True)
        if self.record.starts != guest.starts:
            # An agent died while it booted, or it was started again while a stop had not reached it.
            if self.ours(guest):
                await boot.await_agent(self.folder / "run", await self.monitor())
            self.save(starts=guest.starts)
        if self.record.reboots < guest.reboots:
            await self._reboot(guest)
            self.save(reboots=guest.reboots, leaving="", freezing=False)
        await self._readdress(guest)
        await self._mount_disks(guest)
        return self.report("running")

    async def _readdress(self, guest: Guest) -> None:
        """Have a guest of ours take on the IPv6 address that it has now, or let go of one. What a foreign one does inside is
        its owner's affair. One that cannot be told is told again after its next boot."""
        around = self._shop.around()
        wanted = around.ipv6(guest)
        if self.record.ipv6 == wanted:
            return
        former = self.record.ipv6
        told = former is None or not self.ours(guest)
        if told or await addressing.tell(self.agent, guest, around, former or ""):
            self.save(ipv6=wanted)
        else:
            log.warning("guest %s does not take on the address %s: its agent does not do it", guest.id, wanted or "''")

    async def _resume(self) -> GuestState:
        """Let a guest go on that stands because its disk could not be written; raises SkysailError while it cannot."""
        monitor = await self.monitor()
        if await process.status(monitor) != "io-error":
            return "crashed"
        await monitor.execute("cont")
        await asyncio.sleep(0.5)  # QEMU repeats the writes that failed, and stops again at once if they fail again
        if await process.status(monitor) == "io-error":
            raise SkysailError("the guest waits because its disk cannot be written", "make room on the host's disk")
        return await self.look()

    async def stop(self, guest: Guest) -> GuestReport:
        """Shut it down, orderly unless ``force``; its disk stays."""
        if self.alive() and self.record.made and not guest.force and await self.look() == "running":
            try:
                with contextlib.suppress(SkysailError):  # one that stays frozen is cut off in the end
                    await self.melt()
                monitor = await self.monitor()
                end = press = time.monotonic()
                end += SHUTDOWN_SECONDS
                while time.monotonic() < end and await process.status(monitor) == "running":
                    if time.monotonic() >= press:
                        # Again and again: a system that is still booting does not listen to the button yet.
                        await monitor.execute("system_powerdown")
                        press += PRESS_SECONDS
                    await asyncio.sleep(0.1)
            except Gone:
                pass  # it is off, which is what was asked for
        await self.kill()
        wanted = tuple(one.volume.id for one in guest.disks)
        await self.release(wanted)
        self._refused = {}
        self.save(starts=guest.starts, halted=False, stopped=True, disks=wanted)
        return self.report("stopped")

    async def kill(self) -> None:
        """End the process now, if there is one."""
        if self.record.process is not None and self.record.process.alive() and self._shop.cluster is not None:
            # Killed, it would keep its images open in the cluster's eyes for half a minute.
            with contextlib.suppress(SkysailError, TimeoutError):
                async with asyncio.timeout(QUIT_SECONDS):
                    await process.leave(self.record.process, await self.monitor())
        if self.record.process is not None:
            await process.end(self.record.process, self.record.id)
        await clear(self.folder)
        await self._leave()
        if self.record.process is not None:
            # With the process went what it was copying; the snapshots are taken again, from the disks that it left.
            self.save(process=None, freezing=False, copying={}, mounts={})

    async def release(self, kept: Collection[str] = ()) -> None:
        """Take its block storage back, but for what is ``kept``. Its process is gone."""
        for volume in self.record.disks:
            if volume not in kept:
                with contextlib.suppress(SkysailError):  # a disk that is lost is nobody's any more
                    await self._shop.give_volume(volume, os.geteuid())

    async def melt(self) -> None:
        """Thaw what an agent froze that died before it could thaw it."""
        if self.record.freezing:
            await freezing.thaw(self.agent)
            self.save(freezing=False)

    async def _plug_disks(self, guest: Guest, monitor: Monitor, *, running: bool = False) -> None:
        """Give it the disks that it does not have. A guest does not boot without one; to one that is ``running``, a disk that
        cannot be plugged in is refused: it is left, whole, to whoever asked for it."""
        self._refused = {}
        if not guest.disks:
            return
        there = await disks.plugged(monitor)
        # Noted before they are given: whoever finds this record takes them back.
        if missing := [one.volume.id for one in guest.disks if one.volume.id not in self.record.disks]:
            self.save(disks=(*self.record.disks, *missing))
        for one in guest.disks:
            if one.name in there:
                continue
            try:
                path = await self._shop.give_volume(one.volume.id, self.record.uid)
                await disks.plug(monitor, one.name, (str(path), *await self.parents(one.volume)))
            except SkysailError as failure:
                if not running or isinstance(failure, Gone):
                    raise
                log.warning("guest %s cannot be given the disk %s: %s", self.record.id, one.volume.id, failure)
                await self.release([other for other in self.record.disks if other != one.volume.id])
                self.save(disks=tuple(other for other in self.record.disks if other != one.volume.id))
                self._refused[one.volume.id] = failure.what[:500]
                continue
            await disks.throttle(monitor, one.name, guest.iops)

    async def _mount_disks(self, guest: Guest) -> None:
        """Have it mount those that mount by themselves, once in the life of its process."""
        waiting = [one for one in guest.disks if one.mount and one.volume.id in self.record.disks
                   and self.record.mounts.get(one.volume.id, "Pending") == "Pending"]
        if waiting and not self.ours(guest):
            # Nobody waited for it when it booted.
            await boot.await_agent(self.folder / "run", await self.monitor(), MOUNT_SECONDS)
        for one in waiting:
            self.save(mounts=self.record.mounts | {one.volume.id: await mounting.mount(self.agent, one.name)})

    async def parents(self, volume: Volume) -> tuple[str, ...]:
        """The files that one of its volumes stands on, nearest first."""
        if volume.id == self.record.id:
            if self.record.parents:
                return await self._shop.shelf.current(self.record.parents)
            if not self.record.parent:
                return ()  # its own file holds everything: it came from another host, or was flattened to the end
            image = str(self.image(volume.image).path)
            return (image,) if self.record.parent == image else (self.record.parent, image)
        return await self._shop.shelf.parents(volume)

    def _beneath(self, *files: str) -> tuple[str, ...]:
        """What QEMU opens of what a volume was made over: nothing where the store itself keeps that."""
        return files if self._shop.shelf.layered else ()

    async def _leave(self) -> None:
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None

    async def _make(self, guest: Guest) -> None:
        """First life: a clone of the template where the image can be templated, else a cold boot with a seed."""
        self._stages = {}
        began = time.monotonic()
        # What an interrupted attempt left behind belonged to nobody.
        await self._shop.drop_volume(guest.volume.id)
        image = self.image(guest.volume.image)
        if guest.volume.origin is not None:
            await self._restore(guest, image, await self._shop.shelf.chain(guest.volume.origin))
            return
        template = await self._shop.templates.ensure(image, guest.vcpus) if image.ours else None
        self._stages["template"] = time.monotonic() - began
        if template is not None:
            self.save(parent="".join(self._beneath(str(template.disk))))
            await self._clone(guest, image, template, began)
        else:
            self.save(parent="".join(self._beneath(str(image.path))))
            await self._write_seed(guest, image)
            await self._cold(guest, await self._shop.make_volume(guest.volume, image.path, guest.volume.size_gib << 30,
                                                                 self.record.uid))
            self.save(made=True, ours=image.ours)

    async def _restore(self, guest: Guest, image: Image, parents: tuple[str, ...]) -> None:
        """First life from a copy of another guest's disk: it boots cold, and takes on an identity of its own."""
        self.save(parents=self._beneath(*parents))
        await self._write_seed(guest, image)
        volume = await self._shop.make_volume(guest.volume, Path(parents[0]), guest.volume.size_gib << 30,
                                              self.record.uid)
        await self._cold(guest, volume)
        self.save(made=True, ours=image.ours, ipv6=self._shop.around().ipv6(guest))

    async def _write_seed(self, guest: Guest, image: Image) -> None:
        if image.ours:
            told = personality.message(guest, self.record.identity, self._shop.around())
            await in_thread(durable.replace, self.seed, personality.identity_disk(told))
        else:
            await in_thread(personality.write_seed, personality.seed(guest, self.record.identity, self._shop.around()),
                            self.seed)
        os.chown(self.seed, self.record.uid, self.record.uid)

    @property
    def seed(self) -> Path:
        return self.folder / "seed.iso"

    def image(self, digest: str) -> Image:
        image = self._shop.find_image(digest)
        if image is None:
            raise SkysailError(f"the image {digest[:12]} is not on this host", "build it: sudo ./skysail images build")
        return image

    def ours(self, guest: Guest) -> bool:
        """Whether it carries our agents."""
        return self.image(guest.volume.image).ours if self.record.ours is None else self.record.ours

    async def _clone(self, guest: Guest, image: Image, template: Template, began: float) -> None:
        volume = await self._shop.make_volume(guest.volume, template.disk, template.disk_bytes, self.record.uid)
        self._stages["volume"] = time.monotonic() - began
        machine = self._machine(guest, (str(volume), *self._beneath(str(template.disk), str(image.path))),
                                pluggable=True, incoming=True, memory="clone" if template.memory else "private",
                                memory_file=str(template.memory), memory_mib=qemu.TEMPLATE_MEMORY_MIB)
        monitor = await self.spawn(guest, machine)
        self._stages["spawned"] = time.monotonic() - began
        around = self._shop.around()
        # Connected before the restore, as it was when the template was saved: the personaliser's read never ends.
        channel = await Channel.connect(self.folder / "run" / "clone.sock")
        try:
            await template.load(monitor)
            self._stages["restored"] = time.monotonic() - began
            await self.plug(guest, monitor)
            await disks.throttle(monitor, disks.SYSTEM, guest.iops)
            await monitor.execute("cont")
            self._stages["running"] = time.monotonic() - began
            answer = await channel.ask(personality.message(guest, self.record.identity, around), CLONE_SECONDS)
        finally:
            channel.close()
        if not answer.get("ready"):
            raise SkysailError(f"the clone could not take its identity: {answer}")
        # From here on its identity is on its disk (the personaliser synced it): never again thrown away.
        self.save(made=True, ours=True, grown=False, ipv6=around.ipv6(guest))
        self._stages["personalised"] = time.monotonic() - began
        await self._grow(guest, monitor)
        self._stages["grown"] = time.monotonic() - began

    async def _grow(self, guest: Guest, monitor: Monitor) -> None:
        """From the template's size to the plan's; repeatable, because an agent may die between the two halves."""
        if self.record.process is not None:
            # It was started with the template's memory as its bound.
            confinement.limit(guest.id, self.record.process.pid, vcpus=guest.vcpus, memory_mib=guest.memory_mib)
        await monitor.execute("block_resize", {"node-name": "disk", "size": guest.volume.size_gib << 30})
        more = guest.memory_mib - qemu.TEMPLATE_MEMORY_MIB
        if more > 0:
            await process.plug_memory(monitor, more << 20)
        self.save(grown=True)

    async def _boot(self, guest: Guest) -> None:
        """Any later life: from its own disk, with all of its memory from the start."""
        self._stages = {}
        volume = (await self._shop.volumes()).get(guest.volume.id)
        if volume is None:
            # A new one would boot as a blank server and hide the loss.
            raise SkysailError(f"the volume {guest.volume.id} is not on this host any more",
                               "bring its file back, or delete the instance")
        await self._cold(guest, volume)

    async def _cold(self, guest: Guest, volume: Path) -> None:
        began = time.monotonic()
        ours = self.ours(guest)
        machine = self._machine(guest, (str(volume), *await self.parents(guest.volume)),
                                seed=str(self.seed) if self.seed.exists() else "", memory_mib=guest.memory_mib,
                                seed_serial="identity" if ours else "seed")
        monitor = await self.spawn(guest, machine)
        # Also for a clone that died before it was grown: from here on it has all that its plan gives.
        await monitor.execute("block_resize", {"node-name": "disk", "size": guest.volume.size_gib << 30})
        if not self.record.grown:
            self.save(grown=True)
        await self.plug(guest, monitor)
        await disks.throttle(monitor, disks.SYSTEM, guest.iops)
        await self._plug_disks(guest, monitor)
        await monitor.execute("cont")
        self._stages["running"] = time.monotonic() - began
        if ours:
            await boot.await_agent(self.folder / "run", monitor)
        self._stages["answering"] = time.monotonic() - began

    def resting(self, guest: Guest, chain: Sequence[str] = ("",)) -> qemu.Machine:
        """A process for its disks that never runs, over the files ``chain`` of its system disk: of its memory nothing is
        used."""
        return self._machine(guest, tuple(chain), seed=str(self.seed) if self.seed.exists() else "",
                             memory_mib=min(guest.memory_mib, qemu.TEMPLATE_MEMORY_MIB),
                             seed_serial="identity" if self.ours(guest) else "seed")

    async def hold(self, guest: Guest) -> None:
        """Give its disks a process that does not run: they are read by nobody who has more rights than the guest itself. It
        is off, and its lock is held."""
        await self.kill()
        volume = await self._shop.give_volume(guest.volume.id, self.record.uid)
        monitor = await self.spawn(guest, self.resting(guest, (str(volume), *await self.parents(guest.volume))))
        self.save(stopped=True)
        for one in guest.disks:
            path = await self._shop.give_volume(one.volume.id, self.record.uid)
            await disks.plug(monitor, one.name, (str(path), *await self.parents(one.volume)))

    def _machine(self, guest: Guest, chain: tuple[str, ...], *, memory_mib: int, seed: str = "", seed_serial: str = "seed",
                 memory: Literal["private", "template", "clone"] = "private", memory_file: str = "",
                 pluggable: bool = False, incoming: bool = False) -> qemu.Machine:
        return qemu.Machine(
            id=guest.id, accelerator=self._shop.accelerator, vcpus=guest.vcpus, memory_mib=memory_mib,
            folder=str(self.folder / "run"), disk=chain, generation_id=self.record.identity.generation_id, memory=memory,
            memory_file=memory_file, pluggable=pluggable, incoming=incoming, seed=seed,
            seed_serial=seed_serial)

    async def spawn(self, guest: Guest, machine: qemu.Machine) -> Monitor:
        await in_thread(confinement.sweep, f"{self.folder}/")
        key = self._shop.cluster.key() if self._shop.cluster is not None else ""
        key_file = process.prepare(self.folder / "run", self.record.uid, key)
        machine = msgspec.structs.replace(machine, key_file=key_file)
        self.folder.chmod(0o711)
        pid, self._monitor = await process.start(machine, self.record.uid, self._shop.program)
        try:
            held = offer.version(await self._monitor.execute("query-version"))
            # A boot is also any reboot that was due: asked for it again, an agent that died now would boot it twice.
            self.save(process=pid, shape=machine.shape(), qemu=held, reboots=guest.reboots, leaving="", halted=False,
                      stopped=False, mounts={})
        except (OSError, SkysailError):
            await self._leave()
            await process.end(pid, machine.id)
            raise
        return self._monitor

    async def plug(self, guest: Guest, monitor: Monitor) -> None:
        descriptor = await self._shop.open_port(guest.port)
        try:
            await process.plug_network(monitor, descriptor, guest.port.mac, guest.port.mtu)
        finally:
            os.close(descriptor)

    async def _reboot(self, guest: Guest) -> None:
        """By the guest's own shutdown where its agent answers, else by the reset line.

        The boot to be left is written down first: an agent that comes after one that died in here sees by the guest's present
        boot whether the reboot happened, and does not reboot it twice.
        """
        monitor = await self.monitor()
        if self.record.leaving:
            await boot.await_agent(self.folder / "run", monitor)
        answers = await guest_agent.answers(self.agent)
        present = await guest_agent.present_boot(self.agent) if answers else ""
        if not (self.record.leaving and present and present != self.record.leaving):
            if present:
                self.save(leaving=present)
            if not (answers and await self._shut_down_to_reboot(monitor)):
                await monitor.execute("system_reset")
        if self.ours(guest):
            await boot.await_agent(self.folder / "run", monitor)

    @property
    def agent(self) -> Path:
        return self.folder / "run" / "agent.sock"

    async def _shut_down_to_reboot(self, monitor: Monitor) -> bool:
        """Ask the guest to reboot by itself; whether its reset came."""
        with monitor.listening("RESET") as resets:
            # An answer to guest-shutdown never comes: the agent goes down with its guest.
            with contextlib.suppress(Gone, Refused):
                async with guest_agent.reached(self.agent) as channel:
                    await channel.ask({"execute": "guest-shutdown", "arguments": {"mode": "reboot"}}, 1.0)
            try:
                async with asyncio.timeout(SHUTDOWN_SECONDS):
                    await monitor.heard(resets)
                    return True
            except TimeoutError:
                return False


async def clear(folder: Path) -> None:
    """No process works in this guest's folder, whether a record names it or not, and its cgroup is gone."""
    await in_thread(confinement.sweep, f"{folder}/")
    await in_thread(confinement.release, folder.name)


async def remove(folder: Path) -> None:
    """Clear the guest's folder and delete it; repeatable. The volume is the pool's."""
    await clear(folder)
    with contextlib.suppress(FileNotFoundError):
        await in_thread(shutil.rmtree, folder)
