"""Templates: a guest booted once per image, paused, its memory in a file and its device state beside it.

A launch maps the memory copy-on-write and loads the state, so it is a clone and not a boot. A template is made of one
image, one number of processors (they cannot be plugged in under emulation), one QEMU and one machine type; when any of
them changes, its key changes and a new one is made. Templates are immutable (mode 0444) and appear by rename.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from skysail.hypervisor import confinement, process, qemu
from skysail.hypervisor.qmp import Channel, Gone, Monitor, Refused, ask
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, run_async

if TYPE_CHECKING:
    from skysail.hypervisor.guest import Image

log = logging.getLogger(__name__)
BOOT_SECONDS = 300.0
LOAD_SECONDS = 30.0
# The state has to carry everything but the memory, which is in its own shared file.
CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A finished template: ``disk`` is the parent of its clones' volumes, ``disk_bytes`` their size at the restore."""

    key: str
    disk: Path
    disk_bytes: int
    memory: Path
    state: Path

    async def load(self, monitor: Monitor) -> None:
        """Load the device state into a QEMU that waits for it; raises SkysailError when QEMU refuses the state."""
        await monitor.execute("migrate-set-capabilities", CAPABILITIES)
        descriptor = os.open(self.state, os.O_RDONLY)
        try:
            await monitor.pass_descriptor("state", descriptor)
        finally:
            os.close(descriptor)
        await monitor.execute("migrate-incoming", {"uri": "fd:state"})
        end = time.monotonic() + LOAD_SECONDS
        while await process.status(monitor) == "inmigrate":
            if time.monotonic() > end:
                raise SkysailError("QEMU did not load the template's state")
            await asyncio.sleep(0.002)


class Templates:
    """The templates under ``folder``; each is made at its first use, once, however many ask for it."""

    def __init__(self, folder: Path, accelerator: Literal["kvm", "tcg"], uid: int,
                 progress: Callable[[str], None] = log.info) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._uid = uid
        self._progress = progress
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._version = ""

    def sweep(self) -> None:
        """End and remove what an agent that died was making. Only its own: the folder may be shared with other clouds."""
        confinement.sweep(f"{self._folder}/{self._mark}")
        for left in self._folder.glob(f"{self._mark}*"):
            confinement.release(f"template-{left.name.removeprefix(self._mark).rpartition('-')[0]}")
            shutil.rmtree(left)

    @property
    def _mark(self) -> str:
        """How the names of this cloud's unfinished templates begin."""
        return f".{self._uid}-"

    async def ensure(self, image: Image, vcpus: int) -> Template:
        """The template of ``image`` with ``vcpus`` processors; raises SkysailError when it cannot be made."""
        if not self._version:
            self._version = (await run_async([process.PROGRAM, "--version"])).decode().splitlines()[0]
        facts = (image.digest, vcpus, self._version, qemu.MACHINE, self._accelerator, qemu.TEMPLATE_MEMORY_MIB)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        folder = self._folder / key
        if not folder.exists():
            # A task of its own: one launch that is called off does not take the others' template with it.
            if key not in self._builds or self._builds[key].done():
                self._builds[key] = asyncio.create_task(self._build(key, image, vcpus, folder))
            await asyncio.shield(self._builds[key])
        size = msgspec.json.decode((folder / "template.json").read_bytes())["disk_bytes"]
        return Template(key=key, disk=folder / "disk.qcow2", disk_bytes=size, memory=folder / "memory",
                        state=folder / "state")

    async def _build(self, key: str, image: Image, vcpus: int, folder: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        work = self._folder / f"{self._mark}{key}-{secrets.token_hex(3)}"
        work.mkdir(mode=0o711)
        began = time.monotonic()
        try:
            self._progress(f"template {key}: booting once with {vcpus} processor(s)")
            told = msgspec.json.decode(await run_async(
                ["qemu-img", "info", "-f", "qcow2", "--output=json", str(image.path)]))
            disk = work / "disk.qcow2"
            await run_async(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image.path), str(disk)])
            memory = work / "memory"
            memory.touch()
            os.truncate(memory, qemu.TEMPLATE_MEMORY_MIB << 20)
            for path in (disk, memory):
                os.chown(path, self._uid, self._uid)
            machine = qemu.Machine(
                id=f"template-{key}", accelerator=self._accelerator, vcpus=vcpus,
                memory_mib=qemu.TEMPLATE_MEMORY_MIB, folder=str(work / "run"), disk=(str(disk), str(image.path)),
                generation_id=str(uuid.uuid4()), memory="template", memory_file=str(memory), pluggable=True)
            process.prepare(work / "run", self._uid)
            pid, monitor = await process.start(machine, self._uid)
            try:
                await self._boot_and_save(monitor, work)
            finally:
                await monitor.close()
                await process.end(pid, machine.id)
            (work / "template.json").write_bytes(msgspec.json.encode(
                {"disk_bytes": told["virtual-size"], "image": image.digest, "vcpus": vcpus, "qemu": self._version}))
            shutil.rmtree(work / "run")
            for path in (disk, memory, work / "state"):
                os.chown(path, 0, 0)
                path.chmod(0o444)
            work.chmod(0o755)
            # On the disk before it has its name: a power cut leaves a whole template or none.
            for path in (*work.iterdir(), work):
                await in_thread(durable.sync, path)
            work.rename(folder)
            durable.sync(self._folder)
            self._progress(f"template {key}: ready after {time.monotonic() - began:.0f} s")
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(work / "run" / "serial.log", self._folder / f"failed-{key}.serial.log")
            shutil.rmtree(work, ignore_errors=True)
            raise

    async def _boot_and_save(self, monitor: Monitor, work: Path) -> None:
        await monitor.execute("cont")
        await _answers(work / "run" / "agent.sock", {"execute": "guest-ping"})
        channel = await Channel.connect(work / "run" / "clone.sock")
        try:
            # The personaliser rehearses what a clone will do, so that its pages are warm, syncs the disk, and waits.
            answer = await channel.ask({"rehearse": True}, BOOT_SECONDS)
            if not answer.get("waiting"):
                raise SkysailError(f"the personaliser in the template answered {answer}")
            await asyncio.sleep(1.0)
            await monitor.execute("stop")
            await monitor.execute("migrate-set-capabilities", CAPABILITIES)
            descriptor = os.open(work / "state", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                await monitor.pass_descriptor("state", descriptor)
            finally:
                os.close(descriptor)
            await monitor.execute("migrate", {"uri": "fd:state"})
            end = time.monotonic() + LOAD_SECONDS
            while (seen := (await monitor.execute("query-migrate")).get("status")) != "completed":
                if seen in ("failed", "cancelled") or time.monotonic() > end:
                    raise SkysailError(f"the template's state could not be saved: {seen}")
                await asyncio.sleep(0.01)
        finally:
            channel.close()


async def _answers(path: Path, request: dict[str, str]) -> None:
    """Until the guest answers; raises SkysailError after BOOT_SECONDS."""
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end:
        try:
            await ask(path, request, 2.0)
            return
        except (Gone, Refused):
            await asyncio.sleep(0.2)
    raise SkysailError("the image did not come up as a template", "its serial log lies beside the templates")
