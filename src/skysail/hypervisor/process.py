"""One QEMU process: started confined, adopted again by whoever comes later, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import msgspec

from skysail.hypervisor import confinement, qemu
from skysail.hypervisor.qmp import Gone, Monitor, Refused
from skysail.kit import logs
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, kill, machine_boot, started_at

PROGRAM = "qemu-system-x86_64"
# A secret on its way to QEMU, in the folder that is its own.
KEY = "ceph.key"
# Of the serial log, and of what QEMU itself prints.
LOG_LIMIT_BYTES = 1 << 20


class Pid(msgspec.Struct, frozen=True, kw_only=True):
    """A process by pid, start time and boot of the machine: the three are never given to another one."""

    pid: int
    started: int
    boot: str = ""

    def alive(self) -> bool:
        return started_at(self.pid) == self.started and self.boot in ("", machine_boot())

    def age(self) -> float:
        """Seconds since its start, if it is alive (proc(5): start times are ticks of the boot-time clock)."""
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / os.sysconf("SC_CLK_TCK"))


def prepare(folder: Path, uid: int, key: str = "") -> str:
    """An empty folder for the process's sockets and logs, the only one that it may write; old sockets go. The file in it that
    has ``key``, if there is one: the process reads it when it starts, and :func:`start` removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("qmp.sock", "agent.sock", "clone.sock", KEY):
        (folder / name).unlink(missing_ok=True)
    if key:
        # Made anew, and through no link: the folder belonged to the process before.
        descriptor = os.open(folder / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)
            os.fchown(file.fileno(), uid, uid)
    os.chown(folder, uid, uid)
    folder.chmod(0o750)
    return str(folder / KEY) if key else ""


async def start(machine: qemu.Machine, uid: int, program: str = PROGRAM) -> tuple[Pid, Monitor]:
    """Spawn QEMU paused, bounded by its cgroup; raises SkysailError with what QEMU said when it ends at once."""
    folder = Path(machine.folder)
    groups = []
    if machine.accelerator == "kvm":
        groups.append(Path("/dev/kvm").stat().st_gid)
    log = own_log(folder)
    log.unlink(missing_ok=True)
    found = shutil.which(program)
    if found is None:
        raise SkysailError(f"{program} is not installed", "run: sudo ./skysail up")
    number = confinement.spawn([found, *qemu.argv(machine)], uid=uid, log=log, groups=groups,
                               networked=machine.networked)
    started = started_at(number)
    if started is None:
        raise SkysailError(f"QEMU ended at once: {said(log)}")
    pid = Pid(pid=number, started=started, boot=machine_boot())
    try:
        confinement.limit(machine.id, number, vcpus=machine.vcpus, memory_mib=machine.memory_mib)
        connecting = asyncio.create_task(Monitor.connect(folder / "qmp.sock"))
        while not connecting.done():
            await asyncio.wait((connecting,), timeout=0.2)
            if not pid.alive():
                connecting.cancel()
                raise SkysailError(f"QEMU did not start: {said(log)}")
        return pid, connecting.result()
    except BaseException:
        kill(pid.pid, pid.started)
        raise
    finally:
        (folder / KEY).unlink(missing_ok=True)


def said(log: Path) -> str:
    """The end of what QEMU printed."""
    with contextlib.suppress(FileNotFoundError):
        return log.read_text(errors="replace")[-1500:].strip()
    return ""


async def leave(pid: Pid, monitor: Monitor) -> None:
    """Have QEMU close its disks and end by itself; returns when it has."""
    with contextlib.suppress(Gone, Refused):
        await monitor.execute("quit")
    while pid.alive():
        await asyncio.sleep(0.01)


async def end(pid: Pid, name: str, seconds: float = 10.0) -> None:
    """The process is gone when this returns; its cgroup too. Raises SkysailError when the kernel keeps it."""
    if pid.alive():
        kill(pid.pid, pid.started)
    stop = asyncio.get_running_loop().time() + seconds
    while pid.alive():
        if asyncio.get_running_loop().time() > stop:
            raise SkysailError(f"process {pid.pid} of guest {name} does not die", "look for a stuck disk: dmesg")
        await asyncio.sleep(0.01)
    await in_thread(confinement.release, name)


async def plug_network(monitor: Monitor, descriptor: int, mac: str, mtu: int = 1500) -> None:
    """Plug a network card over the tap ``descriptor`` into its slot. It tells its guest the ``mtu`` where that is not what
    every card has (virtio 1.2, 5.1.4: ``mtu``); a guest that moves has to meet the same one."""
    await monitor.pass_descriptor("tap", descriptor)
    await monitor.execute("netdev_add", {"type": "tap", "id": "net", "fd": "tap"})
    await monitor.execute("device_add", {"driver": "virtio-net-pci", "id": "nic", "netdev": "net", "mac": mac,
                                         "bus": qemu.NIC_PORT, "romfile": "", **({"host_mtu": mtu} if mtu != 1500 else {})})


async def plug_memory(monitor: Monitor, size_bytes: int) -> None:
    """Plug in the memory that a plan has beyond the template's; repeatable."""
    if not await monitor.execute("query-memory-devices"):
        with contextlib.suppress(Refused):  # it is there from an attempt that was cut off before the next line
            await monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": "more", "size": size_bytes})
        await monitor.execute("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"})


async def status(monitor: Monitor) -> str:
    """QEMU's run state, such as ``running``, ``shutdown`` or ``guest-panicked``."""
    answer: dict[str, Any] = await monitor.execute("query-status")
    return str(answer["status"])


def own_log(folder: Path) -> Path:
    """What QEMU itself prints, beside its folder: it cannot put a link in this place."""
    return folder.parent / f"{folder.name}.qemu.log"


def trim_all(folders: list[Path]) -> None:
    """:func:`trim` for each."""
    for folder in folders:
        trim(folder)


def trim(folder: Path) -> None:
    """Bring the logs of the process that has ``folder`` back to their bound: a guest can write its serial log for ever, and
    provoke warnings of its QEMU. Both are appended to, so they can be cut under its hands."""
    _trim(folder / "serial.log")
    _trim(own_log(folder))


def _trim(log: Path) -> None:
    try:
        # The folder is the guest process's own: a link that it put there must not lead us elsewhere.
        descriptor = os.open(log, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        held = os.fstat(descriptor)
        # A second name of a file that is not its own would be a link, too.
        if stat.S_ISREG(held.st_mode) and held.st_nlink == 1 and held.st_size > 2 * LOG_LIMIT_BYTES:
            surplus = (held.st_size - LOG_LIMIT_BYTES) // held.st_blksize * held.st_blksize
            logs.cut(descriptor, surplus)
    finally:
        os.close(descriptor)
