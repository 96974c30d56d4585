"""What a run of tests or benchmarks holds, so that the next run ends what a dead one left behind.

A run that is killed tears nothing down: its controllers, agents and QEMUs go on. Each cloud is therefore claimed: an entry in
ESTATES names its folder and is locked for as long as the run lives (flock(2), which the kernel lets go of with the process).
The processes that the run started are noted in the folder, by pid, start time and boot; a guest is known by its control
socket, whose path lies in that folder. Whoever claims a cloud settles the estates of the dead first. A run that is told to
end by SIGTERM, as timeout(1) does, tears down like one that is interrupted at the keyboard.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec

from skysail.hypervisor import confinement
from skysail.kit import durable
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.process import machine_boot, started_at
from skysail.kit.workplace import locked
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.serve import agent, processes
from skysail.serve.up import end_guests

# Not in a cache, of which there may be several: slots, and what dead runs left, are the machine's.
SLOT_LOCKS = Path("/run/lock/skysail-tests")
ESTATES = SLOT_LOCKS / "estates"
GRACE_SECONDS = 5.0

_claims: list[tuple[IO[str], Path, Path]] = []


def claim(folder: Path) -> None:
    """The cloud in ``folder`` is this run's, until the folder is gone. What dead runs left is ended first."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    if any(folder == claimed for _, _, claimed in _claims):
        return
    settle()
    with locked(ESTATES):
        entry = ESTATES / f"{os.getpid()}-{secrets.token_hex(4)}"
        held = entry.open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(str(folder))
        held.flush()
        _claims.append((held, entry, folder))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def note(folder: Path, name: str, pid: int) -> None:
    """Process ``pid`` was started for the cloud in ``folder``; another one of that ``name`` is there no more."""
    started = started_at(pid)
    if started is not None:
        (folder / "started").mkdir(exist_ok=True)
        durable.replace(folder / "started" / f"{name}.json", msgspec.json.encode(
            processes.Record(pid=pid, started=started, boot=machine_boot())))


def settle() -> list[Path]:
    """End what dead runs of this user left, and remove it; the folders that it was."""
    settled = []
    with locked(ESTATES):
        for claimed in list(_claims):
            held, entry, folder = claimed
            if not folder.exists():
                entry.unlink()
                held.close()
                _claims.remove(claimed)
        for entry in ESTATES.iterdir():
            with contextlib.suppress(FileNotFoundError), entry.open() as left:
                if entry.stat().st_uid == os.geteuid() and _free(left):
                    folder = Path(left.read())
                    if folder.is_absolute():
                        _end(folder)
                        settled.append(folder)
                    entry.unlink()
    return settled


def _free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end(folder: Path) -> None:
    """No process of the cloud is left, nor its network, nor its folder."""
    # Controller and agent first, which would start others.
    for path in sorted([*folder.glob("started/*.json"), *folder.glob("run/*.json")]):
        with contextlib.suppress(msgspec.MsgspecError, SkysailError):
            record = msgspec.json.decode(path.read_bytes(), type=processes.Record)
            if record.boot == machine_boot():
                processes.end(record, GRACE_SECONDS)
    with contextlib.suppress(SkysailError):
        config = load(str(folder)) if (folder / "skysail.toml").exists() else Config(data=str(folder), engines="sim")
        end_guests(config)
        if config.engines == "real" and os.geteuid() == 0:
            for listener in agent.ingress(config):
                asyncio.run(listener.end())
            with _slot(config) as free:
                if free:
                    confinement.sweep(f"{config.templates_dir}/.{config.guest_uid_base}-")
                    asyncio.run(LinuxFabric(Layout.of(config)).teardown())
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _slot(config: Config) -> Iterator[bool]:
    """Whether the slot that the cloud had is nobody's now. Another run may have it, and the network is that one's then."""
    number = config.namespace.removeprefix("skytest")
    if not number.isdigit():
        yield False
        return
    with (SLOT_LOCKS / number).open("w") as lock:
        yield _free(lock)
