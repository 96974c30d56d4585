"""One guest of this host: its folder, its record on disk, its process.

The record is what a later agent finds: it is written before and after each effect that must not be repeated or forgotten.
``made`` turns true once the guest has its identity on its own disk; a process found without it has never been anybody's
server, so it is thrown away and made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from skysail.contract.document import Guest, Port, Volume
from skysail.contract.report import GuestReport, GuestState
from skysail.hypervisor import confinement, personality, process, qemu
from skysail.hypervisor.personality import Identity, Surroundings
from skysail.hypervisor.process import Pid
from skysail.hypervisor.qmp import Channel, Gone, Monitor, Refused, ask
from skysail.hypervisor.template import Template, Templates
from skysail.kit.errors import SkysailError

# An orderly shutdown under emulation takes some 10 s; a guest that ignores the button is cut off after this.
SHUTDOWN_SECONDS = 90.0
BOOT_SECONDS = 300.0
CLONE_SECONDS = 60.0

MakeVolume = Callable[[Volume, Path, int, int], Awaitable[Path]]
OpenPort = Callable[[Port], Awaitable[int]]


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image on this host: its file, and whether guests made of it carry our agents."""

    digest: str
    path: Path
    ours: bool


class Record(msgspec.Struct, kw_only=True):
    """What must be known about a guest after a crash of everything else."""

    id: str
    uid: int
    identity: Identity
    made: bool = False
    image: str = ""
    parent: str = ""
    process: Pid | None = None
    starts: int = 0
    reboots: int = 0
    halted: bool = False
    grown: bool = True


class Workshop(msgspec.Struct, frozen=True, kw_only=True):
    """What every guest of this host is made with."""

    guests: Path
    accelerator: Literal["kvm", "tcg"]
    templates: Templates
    find_image: Callable[[str], Image | None]
    make_volume: MakeVolume
    drop_volume: Callable[[str], Awaitable[None]]
    open_port: OpenPort
    around: Surroundings


class QemuGuest:
    """Brings one guest to its role. Calls come one at a time; the engine holds the lock."""

    def __init__(self, workshop: Workshop, record: Record) -> None:
        self._shop = workshop
        self.record = record
        self._monitor: Monitor | None = None
        self._stages: dict[str, float] = {}

    @property
    def folder(self) -> Path:
        return self._shop.guests / self.record.id

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.record.process is not None and self.record.process.alive()

    def save(self) -> None:
        """Write the record, atomically and synced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        half = self.folder / "guest.json.new"
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(self.record))
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.folder / "guest.json")

    def report(self, state: GuestState, reason: str = "") -> GuestReport:
        """The guest as it stands."""
        return GuestReport(id=self.record.id, state=state, starts=self.record.starts, reboots=self.record.reboots,
                           reason=reason, host_keys=(self.record.identity.host_public,), stages=dict(self._stages))

    async def monitor(self) -> Monitor:
        """The control connection, made again after a restart of the agent."""
        if self._monitor is None:
            self._monitor = await Monitor.connect(self.folder / "run" / "qmp.sock")
        return self._monitor

    async def look(self) -> GuestState:
        """The state of the process, as QEMU itself says it."""
        if not self.alive():
            await self._forget_process()
            return "halted" if self.record.halted else ("crashed" if self.record.made else "preparing")
        try:
            seen = await process.status(await self.monitor())
        except Gone:
            await self._leave()
            if self.alive():
                # Busy or hung is not dead: whoever asked tries again, and its disk stays its own.
                raise
            await self._forget_process()
            return "crashed" if self.record.made else "preparing"
        if seen == "shutdown":
            return "halted"
        if seen in ("guest-panicked", "internal-error", "io-error"):
            return "crashed"
        return "running"

    async def run(self, guest: Guest) -> GuestReport:
        """Let it run: clone or boot it, or adopt it as it is; carry out a reboot that is due."""
        state = await self.look()
        process.trim_serial(self.folder / "run")
        if state == "halted" and self.record.starts >= guest.starts:
            # It powered itself off, and nobody asked for a start since.
            self.record.halted = True
            self.save()
            await self.kill()
            return self.report("halted")
        if self.alive() and (state != "running" or not self.record.made):
            await self.kill()
        if not self.alive():
            self.record.halted = False
            await (self._boot(guest) if self.record.made else self._make(guest))
            self.record.starts, self.record.reboots = guest.starts, guest.reboots
            self.save()
        elif not self.record.grown:
            await self._grow(guest, await self.monitor())
        elif self.record.starts != guest.starts:
            # Started again while a stop had not reached it: it runs, which is what was asked for.
            self.record.starts = guest.starts
            self.save()
        elif self.record.reboots < guest.reboots:
            await self._reboot(guest)
            self.record.reboots = guest.reboots
            self.save()
        return self.report("running")

    async def stop(self, guest: Guest) -> GuestReport:
        """Shut it down, orderly unless ``force``; its disk stays."""
        if self.alive() and not guest.force and await self.look() == "running":
            try:
                monitor = await self.monitor()
                await monitor.execute("system_powerdown")
                end = time.monotonic() + SHUTDOWN_SECONDS
                while time.monotonic() < end and await process.status(monitor) == "running":
                    await asyncio.sleep(0.1)
            except Gone:
                pass  # it is off, which is what was asked for
        await self.kill()
        self.record.starts, self.record.halted = guest.starts, False
        self.save()
        return self.report("stopped")

    async def remove(self) -> None:
        """No process, no folder; the volume is the pool's."""
        await self.kill()
        await asyncio.to_thread(shutil.rmtree, self.folder, True)

    async def kill(self) -> None:
        """End the process now, if there is one."""
        if self.record.process is not None:
            await process.end(self.record.process, self.record.id)
        await asyncio.to_thread(confinement.sweep, self.record.uid)
        await self._forget_process()

    async def _leave(self) -> None:
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None

    async def _forget_process(self) -> None:
        await self._leave()
        if self.record.process is not None:
            self.record.process = None
            self.save()

    async def _make(self, guest: Guest) -> None:
        """First life: a clone of the template where the image can be templated, else a cold boot with a seed."""
        self._stages = {}
        began = time.monotonic()
        # What an interrupted attempt left behind belonged to nobody.
        await self._shop.drop_volume(guest.volume.id)
        image = self._image(guest.volume.image)
        template = await self._shop.templates.ensure(image, guest.vcpus) if image.ours else None
        self._stages["template"] = time.monotonic() - began
        if template is not None:
            self.record.parent = str(template.disk)
            await self._clone(guest, image, template, began)
        else:
            self.record.parent = str(image.path)
            await asyncio.to_thread(personality.write_seed, personality.seed(guest, self.record.identity,
                                                                             self._shop.around), self._seed)
            os.chown(self._seed, self.record.uid, self.record.uid)
            self.record.image = image.digest
            await self._cold(guest)
            self.record.made = True
        self.record.image = image.digest
        self.save()

    @property
    def _seed(self) -> Path:
        return self.folder / "seed.iso"

    def _image(self, digest: str) -> Image:
        image = self._shop.find_image(digest)
        if image is None:
            raise SkysailError(f"the image {digest[:12]} is not on this host", "build it: sudo ./skysail images build")
        return image

    async def _clone(self, guest: Guest, image: Image, template: Template, began: float) -> None:
        volume = await self._shop.make_volume(guest.volume, template.disk, template.disk_bytes, self.record.uid)
        self._stages["volume"] = time.monotonic() - began
        machine = self._machine(guest, (str(volume), str(template.disk), str(image.path)), pluggable=True, incoming=True,
                                memory="clone" if template.memory else "private", memory_file=str(template.memory),
                                memory_mib=qemu.TEMPLATE_MEMORY_MIB)
        monitor = await self._spawn(machine)
        self._stages["spawned"] = time.monotonic() - began
        # Connected before the restore, as it was when the template was saved: the personaliser's read never ends.
        channel = await Channel.connect(self.folder / "run" / "clone.sock")
        try:
            await template.load(monitor)
            self._stages["restored"] = time.monotonic() - began
            await self._plug(guest, monitor)
            await monitor.execute("cont")
            self._stages["running"] = time.monotonic() - began
            answer = await channel.ask(
                personality.message(guest, self.record.identity, self._shop.around), CLONE_SECONDS)
        finally:
            channel.close()
        if not answer.get("ready"):
            raise SkysailError(f"the clone could not take its identity: {answer}")
        # From here on its identity is on its disk (the personaliser synced it): never again thrown away.
        self.record.made, self.record.grown = True, False
        self.save()
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
        if more > 0 and not await monitor.execute("query-memory-devices"):
            with contextlib.suppress(Refused):  # it is there from an attempt that was cut off before the next line
                await monitor.execute("object-add",
                                      {"qom-type": "memory-backend-ram", "id": "more", "size": more << 20})
            await monitor.execute("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"})
        self.record.grown = True
        self.save()

    async def _boot(self, guest: Guest) -> None:
        """Any later life: from its own disk, with all of its memory from the start."""
        self._stages = {}
        await self._cold(guest)

    async def _cold(self, guest: Guest) -> None:
        began = time.monotonic()
        image = self._image(guest.volume.image)
        parents = [self.record.parent] if self.record.parent == str(image.path) else [self.record.parent, str(image.path)]
        volume = await self._shop.make_volume(guest.volume, Path(self.record.parent), guest.volume.size_gib << 30,
                                              self.record.uid)
        machine = self._machine(guest, (str(volume), *parents),
                                seed=str(self._seed) if self._seed.exists() else "", memory_mib=guest.memory_mib)
        monitor = await self._spawn(machine)
        # Also for a clone that died before it was grown: from here on it has all that its plan gives.
        await monitor.execute("block_resize", {"node-name": "disk", "size": guest.volume.size_gib << 30})
        self.record.grown = True
        self.save()
        await self._plug(guest, monitor)
        await monitor.execute("cont")
        self._stages["running"] = time.monotonic() - began
        if image.ours:
            await self._await_agent(monitor)
        self._stages["answering"] = time.monotonic() - began

    def _machine(self, guest: Guest, chain: tuple[str, ...], *, memory_mib: int, seed: str = "",
                 memory: Literal["private", "template", "clone"] = "private", memory_file: str = "",
                 pluggable: bool = False, incoming: bool = False) -> qemu.Machine:
        return qemu.Machine(
            id=guest.id, accelerator=self._shop.accelerator, vcpus=guest.vcpus, memory_mib=memory_mib,
            folder=str(self.folder / "run"), disk=chain, generation_id=self.record.identity.generation_id, memory=memory,
            memory_file=memory_file, pluggable=pluggable, incoming=incoming, seed=seed)

    async def _spawn(self, machine: qemu.Machine) -> Monitor:
        await asyncio.to_thread(confinement.sweep, self.record.uid)
        process.prepare(self.folder / "run", self.record.uid)
        self.folder.chmod(0o711)
        pid, monitor = await process.start(machine, self.record.uid)
        self.record.process, self._monitor = pid, monitor
        self.save()
        return monitor

    async def _plug(self, guest: Guest, monitor: Monitor) -> None:
        descriptor = await self._shop.open_port(guest.port)
        try:
            await process.plug_network(monitor, descriptor, guest.port.mac)
        finally:
            os.close(descriptor)

    async def _await_agent(self, monitor: Monitor) -> None:
        """Until the guest's agent answers, or the guest goes off by itself; raises SkysailError after BOOT_SECONDS."""
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            try:
                await ask(self.folder / "run" / "agent.sock", {"execute": "guest-ping"}, 2.0)
                return
            except (Gone, Refused):
                if await process.status(monitor) != "running":
                    return
                await asyncio.sleep(0.2)
        raise SkysailError("the guest did not come up in time", f"read its serial log: {self.folder / 'run/serial.log'}")

    async def _reboot(self, guest: Guest) -> None:
        """By the guest's own shutdown where its agent answers, else by the reset line."""
        monitor = await self.monitor()
        monitor.forget_events()
        image = self._image(guest.volume.image)
        agent = self.folder / "run" / "agent.sock"
        try:
            await ask(agent, {"execute": "guest-ping"}, 5.0)
            asked = True
            # An answer to guest-shutdown never comes: the agent goes down with its guest.
            with contextlib.suppress(Gone):
                await ask(agent, {"execute": "guest-shutdown", "arguments": {"mode": "reboot"}}, 1.0)
        except (Gone, Refused):
            asked = False
        if not asked or not await self._saw_reset(monitor):
            await monitor.execute("system_reset")
        if image.ours:
            await self._await_agent(monitor)

    async def _saw_reset(self, monitor: Monitor) -> bool:
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                while (await monitor.event())["event"] != "RESET":
                    continue
                return True
        except TimeoutError:
            return False
