"""Skysail's own long-lived processes: started, found again and stopped without ever signalling a stranger.

Each has a record ``<data>/run/<name>.json`` with its pid and its start time. A pid reused by another program has
another start time, so it is never taken for ours; signals go through a pidfd, so the check and the signal mean the same
process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from skysail.hypervisor.confinement import holders
from skysail.kit import durable
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import machine_boot, started_at


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One started process. ``started`` is in clock ticks since boot (proc(5), field 22 of stat), ``boot`` names that boot;
    ``digest`` the program and configuration that it was started from."""

    pid: int
    started: int
    boot: str = ""
    digest: str = ""


def record_path(config: Config, name: str) -> Path:
    """Where the record of process ``name`` lies."""
    return config.root / "run" / f"{name}.json"


def log_folder(config: Config) -> Path:
    """Where our processes write what they say. The agent keeps each log in it to its bound (:mod:`skysail.kit.logs`)."""
    return config.root / "logs"


def log_path(config: Config, name: str) -> Path:
    """Where process ``name`` writes what it says. Who opens it for a process does so for appending."""
    return log_folder(config) / f"{name}.log"


def find(config: Config, name: str) -> Record | None:
    """The record of ``name`` if that very process still lives, else None."""
    try:
        record = msgspec.json.decode(record_path(config, name).read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    same_boot = record.boot in ("", machine_boot())
    return record if same_boot and started_at(record.pid) == record.started else None


def start(config: Config, name: str, argv: Sequence[str], *, env: Mapping[str, str], digest: str = "") -> Record:
    """Start ``argv`` detached from the terminal and remember it. Raises :class:`SkysailError` if it cannot."""
    log = log_path(config, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    record_path(config, name).parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env),
                                     cwd="/", start_new_session=True, close_fds=True)
        except OSError as refused:
            raise SkysailError(f"cannot start {name}: {refused}") from refused
    started = started_at(child.pid)
    if started is None:
        raise SkysailError(f"{name} ended at once", cure=f"read {log}")
    record = Record(pid=child.pid, started=started, boot=machine_boot(), digest=digest)
    durable.replace(record_path(config, name), msgspec.json.encode(record))
    return record


def stop(config: Config, name: str, grace_seconds: float = 20.0) -> bool:
    """End ``name``: SIGTERM, then SIGKILL after ``grace_seconds``. Says whether it was running."""
    record = find(config, name)
    if record is not None:
        end(record, grace_seconds)
    record_path(config, name).unlink(missing_ok=True)
    return record is not None


def end(record: Record, grace_seconds: float) -> None:
    """Signal exactly the process of ``record`` until it is gone; a reused pid is left alone."""
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if started_at(record.pid) != record.started:
            return
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], seconds)[0]:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(record.pid, os.WNOHANG)
                return
        raise SkysailError(f"process {record.pid} does not end", cure="look at it with: ps -o pid,stat,wchan")
    finally:
        os.close(handle)


def guests(config: Config) -> list[Record]:
    """QEMU processes of this cloud: their control sockets lie in its guests folder."""
    return [Record(pid=pid, started=started) for pid, started in holders(f"{config.guests_dir}/").items()]


def wait_until(ready: Callable[[], bool], seconds: float, pause_seconds: float = 0.1) -> bool:
    """Call ``ready`` until it answers true or ``seconds`` have passed; says which."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
    return True
