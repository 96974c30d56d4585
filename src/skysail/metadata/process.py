"""The engine that answers guests: a confined process (:mod:`skysail.metadata.responder`) and the conversation with it.

The agent keeps the listening sockets too, so that a process that died is followed by another one on the same sockets: who
asks meanwhile waits. With the agent the process ends; the next agent starts its own. The key that seals tokens outlives both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, kill, started_at
from skysail.metadata import Record, Tokenless

log = logging.getLogger(__name__)
Listen = Callable[[], Awaitable[tuple[socket.socket, ...]]]
PROGRAM = Path(__file__).with_name("responder.py")
ANSWER_SECONDS = 30.0
LINE_BYTES = 1 << 26
KEY_BYTES = 32


def spawn(mark: str, uid: int, control: socket.socket, listeners: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
    """Start the process, confined, over these sockets; ``mark`` is the word that it is found again by."""
    # By its descriptor: its user need not be able to reach the folder that the program lies in.
    with PROGRAM.open("rb") as program:
        descriptors = [listener.fileno() for listener in listeners]
        return subprocess.Popen(
            ["unshare", "--net", "--", "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs",
             "--bounding-set=-all", "--inh-caps=-all", "--", os.path.realpath(sys.executable), "-I", "-S", "-B",
             f"/dev/fd/{program.fileno()}", mark, *map(str, descriptors)],
            stdin=control.fileno(), stdout=subprocess.DEVNULL, pass_fds=(program.fileno(), *descriptors), cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}, start_new_session=True)


def holders(mark: str) -> dict[int, int]:
    """Pid and start time of each process that was spawned with this mark."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                started = started_at(int(entry.name))
                words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                if started is not None and mark.encode() in words and (
                        Path(entry.path, "exe").readlink().name.startswith(("python", "unshare", "setpriv"))):
                    found[int(entry.name)] = started
    return found


def sweep(mark: str) -> None:
    """kill -9 what an agent that died left behind and that did not notice; raises SkysailError when it does not die."""
    end = time.monotonic() + 5.0
    while found := holders(mark):
        for pid, started in found.items():
            kill(pid, started)
        if time.monotonic() > end:
            raise SkysailError(f"processes {list(found)} that answered for metadata do not die", "look at them with: ps")
        time.sleep(0.005)


def kept_key(path: Path) -> bytes:
    """The key in this file, which is made if there is none."""
    with contextlib.suppress(FileNotFoundError):
        held = path.read_bytes()
        if len(held) == KEY_BYTES:
            return held
    key = secrets.token_bytes(KEY_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, key)
    return key


class Answerer:
    """Keeps one process that answers, on the sockets that ``listen`` gives, under the user id ``uid``. ``key`` seals tokens;
    it is asked for at each start."""

    def __init__(self, listen: Listen, *, mark: str, uid: int, key: Callable[[], bytes]) -> None:
        self._listen = listen
        self._mark = mark
        self._uid = uid
        self._key = key
        self._lock = asyncio.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._listeners: tuple[socket.socket, ...] = ()
        self._told: dict[str, Record] = {}
        self._number = 0
        self._life = secrets.token_hex(8)
        self._counts: dict[str, int] = {}  # of processes that are gone
        self._seen: dict[str, int] = {}  # of this one

    async def apply(self, records: Sequence[Record]) -> None:
        """See :class:`skysail.metadata.Responder`."""
        async with self._lock:
            wanted = {one.id: one for one in records}
            if not wanted and self._child is None:
                return  # there may not even be a network yet
            await self._ensure()
            if wanted != self._told:
                await self._tell(wanted)
            else:
                await self._ask({})

    async def _tell(self, wanted: dict[str, Record]) -> None:
        await self._ask({"drop": sorted(self._told.keys() - wanted.keys()), "set": [
            msgspec.to_builtins(one) for one in wanted.values() if self._told.get(one.id) != one]})
        self._told = wanted

    async def observe(self) -> dict[str, str] | None:
        async with self._lock:
            if self._child is None:
                return None
            with contextlib.suppress(SkysailError):
                held: dict[str, str] = (await self._ask({"look": True}))["held"]
                return held
            return None

    async def tokenless(self) -> Tokenless:
        async with self._lock:
            if self._child is not None:
                with contextlib.suppress(SkysailError):
                    await self._ask({})
            counts = dict(self._counts)
            for identifier, count in self._seen.items():
                counts[identifier] = counts.get(identifier, 0) + count
            return Tokenless(life=self._life, counts=counts)

    async def check(self) -> list[str]:
        """Start a process of the same kind, without sockets, and let it answer."""
        async def nowhere() -> tuple[socket.socket, ...]:
            return ()

        probe = Answerer(nowhere, mark=f"{self._mark}-check", uid=self._uid, key=lambda: bytes(KEY_BYTES))
        try:
            await probe._ensure()
        except SkysailError as failed:
            return [f"the process that tells instances of themselves does not run ({failed.what}): "
                    "it needs unshare and setpriv (util-linux)"]
        finally:
            await probe.close()
        return []

    async def close(self) -> None:
        async with self._lock:
            await self._end()

    async def _ensure(self) -> None:
        """A process that answers, over the sockets that guests reach now."""
        if self._child is None or self._child.poll() is not None:
            await self._end()
            await in_thread(sweep, self._mark)  # it would still hold the address
        listeners = await self._listen()
        if self._child is not None and listeners == self._listeners:
            return
        await self._end()
        ours, theirs = socket.socketpair()
        try:
            key = await in_thread(self._key)
            self._child = await in_thread(spawn, self._mark, self._uid, theirs, listeners)
            self._listeners = listeners
            self._streams = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        except OSError as refused:
            ours.close()
            await self._end()
            raise SkysailError(f"the process that answers for metadata was not started: {refused}") from refused
        finally:
            theirs.close()
        await self._ask({"key": key.hex()})

    async def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Its answer; raises SkysailError, and has ended the process, when there is none."""
        self._number += 1
        try:
            if self._streams is None:
                raise ConnectionError("it is not there")
            reader, writer = self._streams
            async with asyncio.timeout(ANSWER_SECONDS):
                writer.write(json.dumps(order | {"number": self._number}).encode() + b"\n")
                await writer.drain()
                answer: dict[str, Any] = json.loads(await reader.readline() or b"{}")
            if answer.get("number") != self._number:
                raise ConnectionError("it ended")
        except (OSError, ValueError, TimeoutError) as silent:
            await self._end()
            raise SkysailError(f"the process that answers for metadata does not answer ({silent})",
                               "it is started again by itself; the agent's log says more") from silent
        except BaseException:
            # Called off in the middle: an answer that is still to come would be taken for the next one.
            await self._end()
            raise
        self._seen = answer["tokenless"]
        if answer["trouble"]:
            log.warning("a request for metadata failed: %s", answer["trouble"])
        return answer

    async def _end(self) -> None:
        """No process answers."""
        child, streams = self._child, self._streams
        self._child, self._streams, self._told, self._listeners = None, None, {}, ()
        for identifier, count in self._seen.items():
            self._counts[identifier] = self._counts.get(identifier, 0) + count
        self._seen = {}
        if streams is not None:
            streams[1].close()
        if child is not None:
            child.kill()
            await in_thread(child.wait)
