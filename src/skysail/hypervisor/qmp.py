"""A guest's control socket: commands, events and file descriptors over QMP, and the same for its guest agent.

Source: QEMU "QMP Reference Manual" and "Guest Agent Protocol Reference". A QEMU that dies ends every pending call with
:class:`Gone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from skysail.kit.errors import SkysailError

# Commands answer within milliseconds; what takes long is a job that reports by itself.
ANSWER_SECONDS = 30.0


class Gone(SkysailError):
    """The process behind the socket is gone, or never answered."""


class Refused(SkysailError):
    """QEMU understood the command and refused it."""


class Monitor:
    """One connection to one QEMU. Open it with :meth:`connect`, close it with :meth:`close`."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, seconds: float = 10.0) -> Monitor:
        """Connect as soon as the socket is there; raises :class:`Gone` after ``seconds``."""
        end = asyncio.get_running_loop().time() + seconds
        while True:
            client = QMPClient("skysail")
            # Else its own listener keeps every event for a reader that there is not: a guest can make them for ever.
            client.events.event_filter = lambda event: False
            try:
                # A QEMU that is stuck, or that another agent still talks to, takes the connection and never greets.
                async with asyncio.timeout_at(end):
                    await client.connect(connected(path))
                return cls(client)
            except (QMPError, OSError, EOFError) as failure:
                if asyncio.get_running_loop().time() > end:
                    raise Gone(f"no QEMU answers at {path.name}: {failure}") from failure
            # The socket appears some 50 ms after the spawn; a connect costs little, so look often.
            await asyncio.sleep(0.005)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, aside: bool = False) -> Any:
        """Run one command and return its result; raises :class:`Refused`, or :class:`Gone` also when no answer comes. One
        that may be run ``aside`` is run at once, even while QEMU's main loop waits for something (QMP's exec-oob)."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._client.execute(command, dict(arguments) if arguments is not None else None, oob=aside)
        except ExecuteError as refused:
            raise Refused(f"QEMU refused {command}: {refused}") from refused
        except TimeoutError as silent:
            raise Gone(f"QEMU did not answer {command} within {ANSWER_SECONDS:.0f} s") from silent
        except (QMPError, OSError, EOFError) as failure:
            raise Gone(f"QEMU went away during {command}") from failure

    async def pass_descriptor(self, name: str, descriptor: int) -> None:
        """Give QEMU a copy of ``descriptor`` under ``name`` (SCM_RIGHTS, then ``getfd``)."""
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError, EOFError) as failure:
            raise Gone("QEMU went away while it was given a descriptor") from failure
        await self.execute("getfd", {"fdname": name})

    def listening(self, *names: str) -> AbstractContextManager[EventListener]:
        """Hear the events of these names for as long as the context lasts."""
        return self._client.listener(names)

    async def heard(self, listener: EventListener) -> dict[str, Any]:
        """The listener's next event; raises :class:`Gone` when the connection ends."""
        waiting = asyncio.create_task(listener.get())
        ended = asyncio.create_task(self._ended())
        try:
            await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return dict(waiting.result())
            raise Gone("QEMU went away")
        finally:
            waiting.cancel()
            ended.cancel()

    async def _ended(self) -> None:
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Leave the socket; the guest goes on."""
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError):
            return


def connected(path: Path) -> socket.socket:
    """A connection to the socket at ``path``, held by the user that owns its folder; raises OSError.

    A guest's process owns its folder: one that broke out of QEMU could put a link to another guest's socket there, and have
    us say to that one what was meant for its own.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(str(path))
        _, uid, _ = struct.unpack("iII", made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        owner = path.parent.stat().st_uid
        if uid != owner:
            raise ConnectionRefusedError(f"user {uid} listens at {path.name}, not {owner}")
    except BaseException:
        made.close()
        raise
    return made


class Channel:
    """A line-wise JSON conversation with a program inside the guest, over a virtio-serial port."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Channel:
        """Connect to the port's socket; raises :class:`Gone`."""
        try:
            return cls(path, *await asyncio.open_unix_connection(sock=connected(path), limit=1 << 20))
        except OSError as failure:
            raise Gone(f"nothing listens at {path.name}") from failure

    async def ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """One line there, one line back; raises :class:`Gone` after ``seconds``, :class:`Refused` on an error answer."""
        (answer,) = await self._told((request,), seconds)
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def ask_all(self, *requests: Mapping[str, Any], seconds: float) -> list[Any]:
        """Several lines at once, of which the program carries out one after the other without waiting for us; an answer for
        each, a :class:`Refused` among them. Raises :class:`Gone` after ``seconds``."""
        return await self._told(requests, seconds)

    async def _told(self, requests: Sequence[Mapping[str, Any]], seconds: float) -> list[Any]:
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
                await self._writer.drain()
                answers = [json.loads(await self._reader.readline()) for _ in requests]
        except (TimeoutError, OSError, ValueError, RecursionError) as silent:
            raise Gone(f"no answer at {self._path.name}") from silent
        return [Refused(f"the guest refused: {str(answer)[:500]}") if not isinstance(answer, dict) or "error" in answer
                else answer.get("return", answer) for answer in answers]

    async def synchronise(self, seconds: float) -> None:
        """Put an end to what somebody before us began to say to a guest agent, and pass over what it answers to that: after
        this, the next line is ours. Raises :class:`Gone`.

        A byte 0xFF, which no JSON has, does both (Guest Agent Protocol Reference, guest-sync-delimited); the number tells our
        answer from one to an agent that died.
        """
        number = secrets.randbits(48)
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(b"\xff" + json.dumps(
                    {"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode() + b"\n")
                await self._writer.drain()
                while True:
                    await self._reader.readuntil(b"\xff")
                    with contextlib.suppress(ValueError, RecursionError):
                        if json.loads(await self._reader.readline()) == {"return": number}:
                            return
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError, ValueError) as silent:
            raise Gone(f"no answer at {self._path.name}") from silent

    def close(self) -> None:
        self._writer.close()
