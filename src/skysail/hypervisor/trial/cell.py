"""One guest, moved once from one QEMU to another, with everything compared that there is to be compared.

The processes are started with the arguments that guests have, and move as they do, but for the encryption. What goes over is
recorded on its way. Before the receiver runs its guest, its processors' registers, its memory and what it would send itself
are held against the sender's; then it runs, and what its guest says is looked at (guest.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from skysail.contract.migration import STREAMS
from skysail.hypervisor import disks, offer, process, qemu, registers
from skysail.hypervisor.accelerator import Accelerator, follows_writes
from skysail.hypervisor.capabilities import capabilities
from skysail.hypervisor.qmp import Gone, Monitor, Refused
from skysail.hypervisor.trial import stream, subject
from skysail.kit.errors import SkysailError

# ``rebooted``: reset a moment ago, and moved when it says that it is up. ``booting``: its firmware runs.
Condition = Literal["idle", "computing", "dirtying", "busy", "rebooted", "booting"]
_WORK: dict[Condition, subject.Work] = {"idle": "idle", "computing": "computing", "dirtying": "dirtying", "busy": "busy",
                                       "rebooted": "idle", "booting": "idle"}
MEMORY_MIB = 64
PLUGGED_MIB = 128
GENERATION = "5c0a5c0a-0000-4000-8000-000000000001"
MAC = "52:54:00:00:00:01"
# An emulated guest on a machine with much else to do takes its time.
PATIENCE_SECONDS = 120.0
FIRMWARE_SECONDS = 0.25
# So far may its clock be from ours: what it said was read a while after it said so.
CLOCK_SECONDS = 10.0
LINES = 5
# A guest that runs is held back to so many rounds, for what is forgotten from one to the next, by this speed.
ROUNDS = 5
HELD_BYTES_PER_SECOND = 20_000_000
UNBOUNDED = 1 << 40
ETHERNET = 0x88B5
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TAP, _NO_PI, _VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _UP = 0x8913, 0x8914, 0x1


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A guest as it is started. ``full``: with memory that was plugged in, a block-storage disk and a seed."""

    machine: str
    accelerator: Accelerator
    cpu: str
    vcpus: int
    full: bool = True

    def __str__(self) -> str:
        return f"{self.vcpus} x {self.cpu}" + ("" if self.full else ", bare")


class Failure(SkysailError):
    """The guest did not move, or does not go on; the message says why."""


class _Side:
    """One of the two processes."""

    def __init__(self, folder: Path, program: str, machine: qemu.Machine, tap: int) -> None:
        self.folder = folder
        self._log = (folder / "qemu.log").open("wb")
        self._process = subprocess.Popen([program, *qemu.argv(machine)], stdin=subprocess.DEVNULL, stdout=self._log,
                                         stderr=self._log)
        self._tap = tap
        self.serial = folder / "serial.log"
        self.monitor: Monitor

    async def open(self, shape: Shape, data: Path) -> None:
        try:
            self.monitor = await Monitor.connect(self.folder / "qmp.sock", PATIENCE_SECONDS)
        except SkysailError as failure:
            raise Failure(f"QEMU does not start: {self.said() or failure}") from failure
        await process.plug_network(self.monitor, self._tap, MAC)
        if shape.full:
            await process.plug_memory(self.monitor, PLUGGED_MIB << 20)
            await disks.plug(self.monitor, "xvdf", (str(data),), 0)
        # Both have the one disk, which is nobody's while the sender has let it go and the receiver has not taken it: of such
        # a process QEMU 7.2 sends nothing.
        early = {"capability": "late-block-activate", "state": False}
        await self.monitor.execute("migrate-set-capabilities", {"capabilities": [
            early if one["capability"] == early["capability"] else one for one in capabilities(False)["capabilities"]]})
        await self.monitor.execute("migrate-set-parameters", {"multifd-channels": STREAMS, "max-bandwidth": UNBOUNDED})

    async def registers(self) -> dict[int, dict[str, str]]:
        return registers.parse(await self.monitor.execute("human-monitor-command", {"command-line": "info registers -a"}))

    async def memory(self) -> list[bytes]:
        """A checksum of each page. What the guest was given later lies above 4 GiB, and it leaves that alone."""
        path = self.folder / "memory"
        await self.monitor.execute("pmemsave", {"val": 0, "size": MEMORY_MIB << 20, "filename": str(path)})
        with path.open("rb") as file:
            found = [hashlib.blake2b(page, digest_size=16).digest() for page in iter(lambda: file.read(4096), b"")]
        path.unlink()
        return found

    def console(self) -> str:
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def said(self) -> str:
        """What QEMU itself printed last."""
        lines = (self.folder / "qemu.log").read_text(errors="replace").strip().splitlines()
        return "; ".join(line.partition("qemu-system-x86_64: ")[2] or line for line in lines[-4:])[-500:]

    def alive(self) -> bool:
        return self._process.poll() is None

    async def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        with contextlib.suppress(AttributeError):
            await self.monitor.close()


class _Recorder:
    """A socket whose connections are kept as they come, and passed on to ``onward`` where there is one."""

    def __init__(self, path: Path, onward: Path | None = None) -> None:
        self.path = path
        self._onward = onward
        self._kept: list[bytearray] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._take, self.path, limit=1 << 22)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self._kept.append(kept)
        if self._onward is None:
            await self._copy(reader, None, kept)
            return
        back, forth = await asyncio.open_unix_connection(self._onward, limit=1 << 22)
        await asyncio.gather(self._copy(reader, forth, kept), self._copy(back, writer, None))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, kept: bytearray | None) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                # Of the streams of memory alone nothing is kept but their beginning.
                if kept is not None and (kept.startswith(stream.MAGIC) or len(kept) < len(stream.MAGIC)):
                    kept += data
                if writer is not None:
                    writer.write(data)
                    await writer.drain()
        if writer is not None:
            writer.close()

    async def close(self) -> bytes:
        """What came over the first of the connections, the one that is not for memory alone."""
        self._server.close()
        return next((bytes(one) for one in self._kept if one.startswith(stream.MAGIC)), b"")


def run(sender: str, receiver: str, shape: Shape, condition: Condition, live: bool) -> list[str]:
    """Move a guest of this shape and condition from the QEMU whose program is ``sender`` to ``receiver``, while it runs if
    ``live``; what is not as it was, in words. Needs root, for the network that the guest has."""
    with tempfile.TemporaryDirectory(prefix="sky") as folder, _taps(2) as taps:
        return asyncio.run(_run(Path(folder), (sender, receiver), shape, condition, live, taps))


async def _run(folder: Path, programs: tuple[str, str], shape: Shape, condition: Condition, live: bool,
               taps: list[tuple[int, socket.socket]]) -> list[str]:
    disk = subject.image(folder / "disk.qcow2", _WORK[condition], shape.vcpus)
    data, seed = folder / "data.qcow2", folder / "seed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(data), "16M"], check=True)
    seed.write_bytes(bytes(1 << 20))
    loop = asyncio.get_running_loop()
    sides = list[_Side]()
    try:
        for number, (program, (tap, wire)) in enumerate(zip(programs, taps, strict=True)):
            own = folder / str(number)
            own.mkdir()
            loop.add_reader(wire, _echo, wire)
            sides.append(_Side(own, program, qemu.Machine(
                id="trial", accelerator=shape.accelerator, vcpus=shape.vcpus, memory_mib=MEMORY_MIB, folder=str(own),
                disk=(str(disk),), generation_id=GENERATION, pluggable=shape.full, seed=str(seed) if shape.full else "",
                type=shape.machine, cpu=shape.cpu, incoming=number == 1), tap))
            await sides[-1].open(shape, data)
        return await _trial(folder, sides[0], sides[1], shape, condition, live)
    except (Failure, Refused, Gone, stream.Unreadable) as failure:
        return [str(failure), *(f"QEMU ended: {side.said()}" for side in sides if not side.alive())]
    finally:
        for side in sides:
            await side.close()
        for _, wire in taps:
            loop.remove_reader(wire)


async def _trial(folder: Path, source: _Side, target: _Side, shape: Shape, condition: Condition, live: bool) -> list[str]:
    await source.monitor.execute("cont")
    await _bring(source, condition)
    # One that its QEMU does not follow stands still when it moves, too.
    runs = live and follows_writes(shape.accelerator, offer.version(await source.monitor.execute("query-version")))
    if not runs:
        await source.monitor.execute("stop")
    before = {} if runs else await source.registers()
    recorder = _Recorder(folder / "sent.sock", folder / "inlet.sock")
    await recorder.open()
    await target.monitor.execute("migrate-incoming", {"uri": f"unix:{folder / 'inlet.sock'}"})
    await _migrate(source, recorder.path, target, held=runs)
    sent = await recorder.close()
    await _until(target, lambda status: status != "inmigrate", "the receiver does not take it in")
    found = [str(one) for one in registers.differences(await source.registers(), await target.registers())]
    if before:
        found += [str(one) for one in registers.differences(before, await source.registers()) if str(one) not in found]
    ours, theirs = await source.memory(), await target.memory()
    changed = [number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    if changed:
        found.append(f"{len(changed)} pages of memory are not the same, the first at {changed[0] << 12:#x}")
    found += stream.differences(stream.devices(sent), await _kept(folder, target))
    return found + await _goes_on(source, target, condition)


async def _bring(source: _Side, condition: Condition) -> None:
    """Into the condition in which it is moved."""
    if condition == "booting":
        await asyncio.sleep(FIRMWARE_SECONDS)
        return
    await _reads(source, lambda text: len(subject.said(text)) > 2, "the guest does not come up")
    if condition == "rebooted":
        await source.monitor.execute("system_reset")
        await _reads(source, lambda text: subject.boots(text) > 1, "the guest does not come up again")


async def _migrate(source: _Side, way: Path, target: _Side, held: bool = False) -> None:
    """Send it to its end; ``held`` back to some rounds, if it writes so much."""
    if held:
        await source.monitor.execute("migrate-set-parameters", {"max-bandwidth": HELD_BYTES_PER_SECOND, "downtime-limit": 1})
    await source.monitor.execute("migrate", {"uri": f"unix:{way}"})
    end = time.monotonic() + PATIENCE_SECONDS
    while (status := (seen := await source.monitor.execute("query-migrate")).get("status", "")) != "completed":
        if status in ("failed", "cancelled"):
            raise Failure(f"the receiver does not take it in: {target.said() or seen.get('error-desc', status)}")
        if held and seen.get("ram", {}).get("dirty-sync-count", 0) >= ROUNDS:
            held = False
            await source.monitor.execute("migrate-set-parameters", {"max-bandwidth": UNBOUNDED, "downtime-limit": 300})
        if status == "pre-switchover":
            with contextlib.suppress(Refused):
                await source.monitor.execute("migrate-continue", {"state": "pre-switchover"})
        if time.monotonic() > end:
            raise Failure(f"the migration comes to no end: it is {status}")
        await asyncio.sleep(0.01)


async def _kept(folder: Path, target: _Side) -> dict[str, bytes]:
    """What the receiver would send of the guest, which it has not run yet."""
    recorder = _Recorder(folder / "kept.sock")
    await recorder.open()
    await target.monitor.execute("migrate-set-capabilities", {"capabilities": [
        {"capability": name, "state": False} for name in ("return-path", "pause-before-switchover", "auto-converge")]})
    await _migrate(target, recorder.path, target)
    return stream.devices(await recorder.close())


async def _goes_on(source: _Side, target: _Side, condition: Condition) -> list[str]:
    """What is wrong with what the guest says once it runs."""
    former = source.console()
    last = spoken[-1] if (spoken := subject.said(former)) else None
    await target.monitor.execute("cont")

    def whole(text: str) -> list[subject.Line]:
        """A line may have been begun on one side and ended on the other."""
        return [line for line in subject.said(former + text) if last is None or line.count > last.count]

    try:
        await _reads(target, lambda text: len(whole(text)) >= LINES, "the guest does not go on")
    except Failure as failure:
        return [str(failure)]
    now, lines = time.time(), whole(target.console())
    found = []
    if letters := sorted(set("".join(line.complaints for line in lines))):
        found.append(f"the guest says that {', '.join(subject.MEANINGS[one] for one in letters)}")
    if [line.count for line in lines] != list(range(lines[0].count, lines[0].count + len(lines))) or (
            last is not None and lines[0].count != last.count + 1):
        found.append(f"the guest counted {last.count if last else 0}, then {[line.count for line in lines]}")
    if lines[-1].rounds <= (last or lines[0]).rounds:
        found.append("one of its processors stands still")
    if condition == "busy" and (lines[-1].blocks <= lines[0].blocks or lines[-1].echoes <= lines[0].echoes):
        found.append(f"its disk or its network stands still: {lines[0].blocks} to {lines[-1].blocks} blocks, "
                     f"{lines[0].echoes} to {lines[-1].echoes} frames")
    late = _seconds(time.strftime("%H%M%S", time.gmtime(now))) - _seconds(lines[-1].time)
    if min(late % 86400, -late % 86400) > CLOCK_SECONDS:
        found.append(f"its clock shows {lines[-1].time}, and it is {time.strftime('%H%M%S', time.gmtime(now))} UTC")
    if not target.alive():
        found.append(f"QEMU ended: {target.said()}")
    return found


def _seconds(clock: str) -> int:
    return int(clock[:2]) * 3600 + int(clock[2:4]) * 60 + int(clock[4:6])


async def _reads(side: _Side, seen: Callable[[str], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not seen(side.console()):
        if time.monotonic() > end or not side.alive():
            raise Failure(f"{otherwise}: {side.said()}; its last words: {side.console()[-100:]!r}")
        await asyncio.sleep(0.02)


async def _until(side: _Side, seen: Callable[[str], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not seen(status := await process.status(side.monitor)):
        if time.monotonic() > end:
            raise Failure(f"{otherwise}: it is {status}")
        await asyncio.sleep(0.01)


# --- its network: a tap as guests have, in a network namespace of nobody's


@contextlib.contextmanager
def _taps(count: int) -> Iterator[list[tuple[int, socket.socket]]]:
    """Taps, each with a socket for what comes out of it. They go when they are closed."""
    made: list[tuple[int, socket.socket]] = []
    failed: list[OSError] = []

    def apart() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.extend(_tap(f"trial{number}") for number in range(count))
        except OSError as failure:
            failed.append(failure)

    # A namespace is a thread's: this one ends with what it opened there still open.
    thread = threading.Thread(target=apart)
    thread.start()
    thread.join()
    try:
        if failed:
            raise SkysailError(f"no network for a trial's guest: {failed[0].strerror}", "run with sudo")
        yield made
    finally:
        for descriptor, wire in made:
            os.close(descriptor)
            wire.close()


def _tap(name: str) -> tuple[int, socket.socket]:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HDR))
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETHERNET))
    flags = struct.unpack("16sH22x", fcntl.ioctl(wire, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0)))[1]
    fcntl.ioctl(wire, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | _UP))
    wire.bind((name, ETHERNET))
    return descriptor, wire


def _echo(wire: socket.socket) -> None:
    """Every frame goes back."""
    with contextlib.suppress(BlockingIOError, OSError):
        while True:
            frame, origin = wire.recvfrom(2048)
            if origin[2] != socket.PACKET_OUTGOING:
                wire.send(frame)
