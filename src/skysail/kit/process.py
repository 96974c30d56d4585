"""The one home of child processes: argument lists only, never a shell; output captured; failures explained."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from skysail.kit.errors import ProcessFailed, SkysailError

P = ParamSpec("P")
T = TypeVar("T")


def run(argv: Sequence[str], *, input: bytes | None = None, env: Mapping[str, str] | None = None,
        timeout: float | None = None) -> bytes:
    """Run ``argv`` to its end and return its standard output.

    Raises :class:`ProcessFailed` when the program is missing, exits non-zero or exceeds ``timeout`` seconds.
    """
    try:
        done = subprocess.run(argv, input=input, env=dict(env) if env is not None else None, timeout=timeout,
                              capture_output=True, check=False)
    except FileNotFoundError as missing:
        raise ProcessFailed(f"the program {argv[0]} is not installed", cure="run: sudo ./skysail up") from missing
    except subprocess.TimeoutExpired as slow:
        raise ProcessFailed(f"{argv[0]} did not finish within {timeout} s") from slow
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace")[-4000:]
        raise ProcessFailed(f"{argv[0]} exited with {done.returncode}: {said.strip()}", stderr=said, code=done.returncode)
    return done.stdout


async def run_async(argv: Sequence[str], *, input: bytes | None = None, timeout: float | None = None) -> bytes:
    """:func:`run`, off the event loop."""
    return await in_thread(run, argv, input=input, timeout=timeout)


async def run_while_wanted(argv: Sequence[str]) -> bytes:
    """:func:`run` for a program that may take minutes, and may be ended at any moment: it is killed, and gone, when its
    caller is called off."""
    try:
        program = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                                       stderr=subprocess.PIPE)
    except FileNotFoundError as missing:
        raise ProcessFailed(f"the program {argv[0]} is not installed", cure="run: sudo ./skysail up") from missing
    try:
        out, err = await program.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            program.kill()
        await asyncio.shield(program.wait())
        raise
    if program.returncode != 0:
        said = err.decode(errors="replace")[-4000:]
        raise ProcessFailed(f"{argv[0]} exited with {program.returncode}: {said.strip()}", stderr=said,
                            code=program.returncode)
    return out


async def run_apart(argv: Sequence[str], *, env: Mapping[str, str], timeout: float) -> None:
    """Run a program of somebody else's: in a session of its own, with this environment and no other, none of our files, and
    no longer than ``timeout`` seconds. Only how it ended counts, whoever it left behind. Raises :class:`ProcessFailed`. One
    that takes too long is gone then, with its process group, and so it is when its caller is called off."""
    with tempfile.TemporaryFile() as said:
        try:
            program = await asyncio.create_subprocess_exec(
                *argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=dict(env), cwd="/", start_new_session=True)
        except OSError as refused:
            raise ProcessFailed(f"{argv[0]} cannot be run: {refused.strerror}") from refused
        try:
            async with asyncio.timeout(timeout):
                code = await program.wait()
        except BaseException as late:
            # Its session is known by its first process, which nobody has waited for yet: no other one can be meant.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            await asyncio.shield(program.wait())
            if isinstance(late, TimeoutError):
                raise ProcessFailed(f"{argv[0]} did not finish within {timeout:.0f} s") from late
            raise
        if code != 0:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
            words = said.read().decode(errors="replace").strip()
            raise ProcessFailed(f"{argv[0]} exited with {code}: {words}", stderr=words, code=code)


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call`` in a thread. A thread cannot be called off: a cancelled caller waits for it, so that what it does is done
    before the caller cleans up or somebody else begins."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait((work,))
        raise


def started_at(pid: int) -> int | None:
    """When process ``pid`` was started, in clock ticks since boot (proc(5), field 22); None when there is none.

    Pid and start time together name a process until the machine reboots; a pid alone may have been given to another one.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def kill(pid: int, started: int) -> None:
    """kill -9 that very process; nothing happens when it is gone already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Looked at after the handle is held: from here on the pid cannot become another process under our hands.
        if started_at(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def allow_open_files(pid: int = 0, count: int = sys.maxsize) -> None:
    """This process, or another one, and what it starts, may have as many files and connections open as it may allow itself,
    but no more than ``count``, by root's word as many as the kernel bears: few are the default (prlimit(2); proc(5),
    /proc/sys/fs/nr_open)."""
    kind = resource.RLIMIT_NOFILE
    try:
        most = min(count, int(Path("/proc/sys/fs/nr_open").read_text()))
        resource.prlimit(pid, kind, (most, most))
    except (OSError, ValueError):  # it is not for everybody to have more than others allowed, nor to see to another's
        with contextlib.suppress(OSError, ValueError):
            _, bound = resource.prlimit(pid, kind)
            resource.prlimit(pid, kind, (min(count, bound), bound))


def machine_boot() -> str:
    """The id of the machine's present boot (proc(5), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def require_root() -> None:
    """Raises :class:`SkysailError` for anyone but root."""
    if os.geteuid() != 0:
        raise SkysailError("this needs root: it makes namespaces, cgroups and guests", cure="run with sudo")
