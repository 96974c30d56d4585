"""Where a guest's process is held: its own user, no capability, no network but to storage, seccomp, its own cgroup.

The process is started by ``unshare`` and ``setpriv`` because QEMU's own ``-runas`` fights with its seccomp filter
(``elevateprivileges=deny``). cgroups: version 2, and the version 1 controllers where they are mounted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from skysail.kit.errors import SkysailError
from skysail.kit.process import kill as kill
from skysail.kit.process import started_at

CGROUPS = Path("/sys/fs/cgroup")
PERIOD_MICROSECONDS = 100_000
# What QEMU itself needs beside the guest's memory: device models, and the translated code under emulation.
OVERHEAD_MIB = 384
# What each guest has where all want more processors than there are (cgroup-v2.rst, sched-design-CFS.rst), and how much more
# of it one has that goes ahead.
WEIGHTS = (("cpu.weight", "100"), ("cpu.shares", "1024"))
AHEAD = 10


def spawn(argv: Sequence[str], *, uid: int, log: Path, groups: Sequence[int] = (), networked: bool = False) -> int:
    """Start ``argv`` confined and detached from us, its output in ``log``; its pid. It outlives this process. One that is
    ``networked`` is in the machine's own network; what it reaches there is bounded by its user id (see
    ``network/nftables.py``)."""
    held = [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]
    apart = [] if networked else ["unshare", "--net", "--"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*apart, "setpriv", f"--reuid={uid}", f"--regid={uid}", *held, "--no-new-privs", "--bounding-set=-all",
             "--inh-caps=-all", "--", *argv],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/")
    # Reaped by a thread of its own, or its pid would stay taken as a zombie and look alive.
    _reap(process)
    return process.pid


def _reap(process: subprocess.Popen[bytes]) -> None:
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


def sweep(place: str) -> None:
    """kill -9 every QEMU whose control socket's path begins with ``place``, waiting until it is gone (at most 5 s).

    It closes the gap between the start of a process and the moment its pid is written down: an agent that died in between
    left a process that no record names, holding the guest's disk. The path tells our own from another cloud's guests, which
    may run under the same user ids; the program tells it from whoever looks at that path.
    """
    end = time.monotonic() + 5.0
    while found := holders(place):
        for pid, started in found.items():
            kill(pid, started)
        if time.monotonic() > end:
            raise SkysailError(f"processes {list(found)} at {place} do not die", "look for a stuck disk: dmesg")
        time.sleep(0.005)


def holders(place: str) -> dict[int, int]:
    """Pid and start time of each QEMU, or what is about to become one, whose control socket's path begins with ``place``."""
    mark, found = f"socket,id=qmp,path={place}".encode(), {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                started = started_at(int(entry.name))
                words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                if started is not None and any(word.startswith(mark) for word in words) and (
                        Path(entry.path, "exe").readlink().name.startswith(("qemu-system-", "unshare", "setpriv"))):
                    found[int(entry.name)] = started
    return found


def _folders(name: str) -> list[Path]:
    """The guest's cgroup in each hierarchy of this machine."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / "skysail" / name]
    return [CGROUPS / controller / "skysail" / name for controller in ("cpu", "memory", "pids")
            if (CGROUPS / controller).is_dir()]


def limit(name: str, pid: int, *, vcpus: int, memory_mib: int) -> None:
    """Put ``pid`` into the cgroup ``name`` with its processors and memory as the bound; repeatable.

    Raises SkysailError when the machine's cgroups refuse.
    """
    memory = str((memory_mib + OVERHEAD_MIB) << 20)
    quota = str(vcpus * PERIOD_MICROSECONDS)
    try:
        for folder in _folders(name):
            if (CGROUPS / "cgroup.controllers").exists():
                for parent in (CGROUPS, folder.parent):
                    parent.mkdir(exist_ok=True)
                    (parent / "cgroup.subtree_control").write_text("+cpu +memory +pids")
            folder.mkdir(parents=True, exist_ok=True)
            for file, value in (("cpu.max", f"{quota} {PERIOD_MICROSECONDS}"), ("memory.max", memory),
                                ("pids.max", "1024"), *WEIGHTS, ("cpu.cfs_period_us", str(PERIOD_MICROSECONDS)),
                                ("cpu.cfs_quota_us", quota), ("memory.limit_in_bytes", memory)):
                if (folder / file).exists():
                    (folder / file).write_text(value)
            (folder / "cgroup.procs").write_text(str(pid))
    except OSError as refused:
        raise SkysailError(f"the cgroup of guest {name} could not be set: {refused}",
                           "see: sudo ./skysail doctor") from refused


def bound(name: str, processors: float) -> None:
    """Let the guest's cgroup use so many processors. Raises SkysailError when the machine's cgroups refuse."""
    # The kernel takes no quota below a millisecond.
    quota = max(1000, round(processors * PERIOD_MICROSECONDS))
    try:
        for folder in _folders(name):
            for file, value in (("cpu.max", f"{quota} {PERIOD_MICROSECONDS}"), ("cpu.cfs_quota_us", str(quota))):
                if (folder / file).exists():
                    (folder / file).write_text(value)
    except OSError as refused:
        raise SkysailError(f"the cgroup of guest {name} could not be set: {refused}",
                           "see: sudo ./skysail doctor") from refused


def unbound(name: str) -> dict[str, str]:
    """Let the guest use as many processors as it can get; what :func:`rebind` takes. For moments in which it is not to be
    held up: a guest that has used up its share stands still for the rest of the period."""
    former = {}
    for folder in _folders(name):
        for file, value in (("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")):
            with contextlib.suppress(OSError):
                held = (folder / file).read_text()
                (folder / file).write_text(value)
                former[str(folder / file)] = held
    return former


def ahead(name: str) -> None:
    """Let the guest's process go before others where all want more processors than there are, while its memory moves: soon
    it stands still for that. Undone by :func:`even`."""
    _weigh(name, AHEAD)


def even(name: str) -> None:
    """The guest goes before nobody."""
    _weigh(name, 1)


def _weigh(name: str, factor: int) -> None:
    for folder in _folders(name):
        for file, usual in WEIGHTS:
            with contextlib.suppress(OSError):  # it ended meanwhile
                if (folder / file).exists():
                    (folder / file).write_text(str(int(usual) * factor))


def rebind(former: dict[str, str]) -> None:
    """The guest is bound again as it was before :func:`unbound`."""
    for file, value in former.items():
        with contextlib.suppress(OSError):  # it ended meanwhile
            Path(file).write_text(value)


def used_seconds(name: str, pid: int) -> float | None:
    """Processor seconds of the guest so far: its cgroup's counter (version 2: cpu.stat), else its process's with all
    threads (proc(5), fields 14 and 15); None when the process is gone."""
    with contextlib.suppress(OSError):
        for line in (CGROUPS / "skysail" / name / "cpu.stat").read_text().splitlines():
            if line.startswith("usage_usec "):
                return int(line.split()[1]) / 1e6
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def release(name: str, seconds: float = 2.0) -> None:
    """Remove the guest's cgroup; one with a process still in it stays.

    The kernel holds a cgroup for a moment after its last process died, so it is tried again for ``seconds``.
    """
    end = time.monotonic() + seconds
    for folder in _folders(name):
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
