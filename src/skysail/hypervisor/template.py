"""Templates: a guest booted once per image, paused, its memory in a file and its device state beside it.

A launch maps the memory copy-on-write and loads the state, so it is a clone and not a boot. A template is made of one
image, one number of processors (they cannot be plugged in under emulation), one QEMU and one machine type; when any of
them changes, its key changes and a new one is made. Templates are immutable (mode 0444) and appear by rename.

There are two ways to the memory. ``mapped``: it is a file of its own, opened read-only by every clone. QEMU before 10
opens such a file for writing even when it maps it privately, and to let a clone do that would let it change what all
others share; there the way is ``private``: the memory is part of the saved state, and each clone loads a copy of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from skysail.hypervisor import boot, confinement, guest_agent, process, qemu
from skysail.hypervisor.accelerator import probe
from skysail.hypervisor.qmp import Channel, Monitor
from skysail.kit import durable
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, run, run_async

log = logging.getLogger(__name__)
# Made once and in the background: on a busy machine a boot may take its time.
BOOT_SECONDS = 1200.0
# An application is started in it, too.
REHEARSAL_SECONDS = 1200.0
LOAD_SECONDS = 60.0
# The first QEMU whose memory-backend-file takes readonly=on,rom=off.
MAPS_READ_ONLY = 10
# QEMU's own bound is meant for a network that others use too.
SAVE_BYTES_PER_SECOND = 1 << 40
Way = Literal["mapped", "private"]
# The state has to carry everything but the memory, which is in its own shared file.
CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image on this host: its file, and whether guests made of it carry our agents."""

    digest: str
    path: Path
    ours: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``template.json`` says of a template: the size of its disk, the image's digest, what it was made with."""

    disk_bytes: int
    image: str
    vcpus: int
    qemu: str = ""
    memory: Way = "mapped"


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """What templates are made with now: QEMU calls itself ``version``."""

    version: str
    accelerator: Literal["kvm", "tcg"]
    way: Way

    @classmethod
    def of(cls, config: Config) -> Now:
        """On this machine. Raises SkysailError when there is no QEMU, or none that can do what is configured."""
        version = run([process.PROGRAM, "--version"]).decode().splitlines()[0]
        return cls(version=version, accelerator=probe(config.accelerator_file).accelerator,
                   way=choose_way(config.template_memory, version))

    def key(self, digest: str, vcpus: int) -> str:
        """The name of the template of the image with this digest."""
        facts = (digest, vcpus, self.version, qemu.MACHINE, qemu.SHAPE, self.accelerator, qemu.cpu_model(self.accelerator),
                 qemu.TEMPLATE_MEMORY_MIB, self.way)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A finished template: ``disk`` is the parent of its clones' volumes, ``disk_bytes`` their size at the restore.
    ``memory`` is the file that clones map; None where each has a copy of its own in the ``state``."""

    key: str
    disk: Path
    disk_bytes: int
    memory: Path | None
    state: Path

    async def load(self, monitor: Monitor) -> None:
        """Load the device state into a QEMU that waits for it; raises SkysailError when QEMU refuses the state."""
        if self.memory is not None:
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


def choose_way(wanted: Literal["auto", "mapped", "private"], version: str) -> Way:
    """How clones come to their memory under the QEMU that calls itself ``version``; raises SkysailError when they cannot
    as ``wanted``."""
    found = re.search(r"version (\d+)", version)
    maps = found is not None and int(found[1]) >= MAPS_READ_ONLY
    if wanted == "mapped" and not maps:
        raise SkysailError(f"{version} cannot map a template's memory read-only",
                           f"install QEMU {MAPS_READ_ONLY}, or set template_memory to auto")
    return "mapped" if maps and wanted != "private" else "private"


def held(folder: Path) -> dict[str, list[int]]:
    """For each image (by digest) that has templates under ``folder``, their numbers of processors."""
    found: dict[str, set[int]] = {}
    for path in folder.glob("[!.]*/template.json"):
        with contextlib.suppress(FileNotFoundError):  # it went while we looked
            told = msgspec.json.decode(path.read_bytes(), type=Facts)
            found.setdefault(told.image, set()).add(told.vcpus)
    return {image: sorted(sizes) for image, sizes in found.items()}


class Templates:
    """The templates under ``folder``; each is made at its first use, once, however many ask for it."""

    def __init__(self, folder: Path, accelerator: Literal["kvm", "tcg"], uid: int,
                 memory: Literal["auto", "mapped", "private"] = "auto",
                 progress: Callable[[str], None] = log.info, program: str = process.PROGRAM) -> None:
        self._folder = folder
        self._program = program
        self._accelerator = accelerator
        self._uid = uid
        self._memory = memory
        self._progress = progress
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._version: tuple[int, str] | None = None

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
        version = await self._qemu_version()
        way = choose_way(self._memory, version)
        key = Now(version=version, accelerator=self._accelerator, way=way).key(image.digest, vcpus)
        folder = self._folder / key
        if not folder.exists():
            # A task of its own: one launch that is called off does not take the others' template with it.
            if key not in self._builds or self._builds[key].done():
                self._builds[key] = asyncio.create_task(self._build(key, image, vcpus, version, way, folder))
            await asyncio.shield(self._builds[key])
        size = msgspec.json.decode((folder / "template.json").read_bytes(), type=Facts).disk_bytes
        return Template(key=key, disk=folder / "disk.qcow2", disk_bytes=size, state=folder / "state",
                        memory=folder / "memory" if way == "mapped" else None)

    async def _qemu_version(self) -> str:
        """What the QEMU that would start now calls itself; asked again when its file was replaced under a running agent."""
        program = shutil.which(self._program)
        seen = Path(program).stat().st_mtime_ns if program else 0
        if self._version is None or self._version[0] != seen:
            self._version = (seen, (await run_async([self._program, "--version"])).decode().splitlines()[0])
        return self._version[1]

    async def _build(self, key: str, image: Image, vcpus: int, version: str, way: Way, folder: Path) -> None:
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
            files = [disk]
            if way == "mapped":
                files.append(work / "memory")
                files[-1].touch()
                os.truncate(files[-1], qemu.TEMPLATE_MEMORY_MIB << 20)
            for path in files:
                os.chown(path, self._uid, self._uid)
            machine = qemu.Machine(
                id=f"template-{key}", accelerator=self._accelerator, vcpus=vcpus,
                memory_mib=qemu.TEMPLATE_MEMORY_MIB, folder=str(work / "run"), disk=(str(disk), str(image.path)),
                generation_id=str(uuid.uuid4()), memory="template" if way == "mapped" else "private",
                memory_file=str(work / "memory"), pluggable=True)
            process.prepare(work / "run", self._uid)
            pid, monitor = await process.start(machine, self._uid, self._program)
            try:
                await self._boot_and_save(monitor, work, way)
            finally:
                await monitor.close()
                await process.end(pid, machine.id)
            (work / "template.json").write_bytes(msgspec.json.encode(Facts(
                disk_bytes=told["virtual-size"], image=image.digest, vcpus=vcpus, qemu=version, memory=way)))
            shutil.rmtree(work / "run")
            (work / "run.qemu.log").unlink(missing_ok=True)
            for path in (*files, work / "state"):
                os.chown(path, 0, 0)
                path.chmod(0o444)
            work.chmod(0o755)
            # On the disk before it has its name: a power cut leaves a whole template or none.
            for path in (*work.iterdir(), work):
                await in_thread(durable.sync, path)
            try:
                work.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(work)  # another agent that shares these templates made the same one meanwhile
            durable.sync(self._folder)
            self._progress(f"template {key}: ready after {time.monotonic() - began:.0f} s")
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(work / "run" / "serial.log", self._folder / f"failed-{key}.serial.log")
            shutil.rmtree(work, ignore_errors=True)
            raise

    async def _boot_and_save(self, monitor: Monitor, work: Path, way: Way) -> None:
        await monitor.execute("cont")
        await boot.await_agent(work / "run", monitor, BOOT_SECONDS)
        if not await guest_agent.answers(work / "run" / "agent.sock", 2.0):
            raise SkysailError("the image did not come up as a template", "its serial log lies beside the templates")
        channel = await Channel.connect(work / "run" / "clone.sock")
        try:
            # The personaliser rehearses what a clone will do, so that its pages are warm, syncs the disk, and waits.
            answer = await channel.ask({"rehearse": True}, REHEARSAL_SECONDS)
            if not answer.get("waiting"):
                raise SkysailError(f"the personaliser in the template answered {answer}")
            await asyncio.sleep(1.0)
            await monitor.execute("stop")
            if way == "mapped":
                await monitor.execute("migrate-set-capabilities", CAPABILITIES)
            await monitor.execute("migrate-set-parameters", {"max-bandwidth": SAVE_BYTES_PER_SECOND})
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
