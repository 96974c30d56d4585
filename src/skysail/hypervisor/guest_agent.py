"""What a guest's own agent (qemu-ga) does for us inside: it answers, says which boot this is, runs programs.

The agent talks to one of us at a time, in lines of JSON. What it says is the guest's word: nothing follows from it but that
guest's own fate. Source: QEMU Guest Agent Protocol Reference.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from skysail.hypervisor.qmp import Channel, Gone, Refused

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.05
BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a program in the guest ended; ``status`` is negative for one that a signal ended."""

    status: int
    said: str


async def reach(agent: Path, seconds: float = ANSWER_SECONDS) -> Channel | None:
    """A conversation with the guest agent behind the socket ``agent``, past whatever it still had to say to somebody else;
    None when it does not answer."""
    try:
        channel = await Channel.connect(agent)
    except Gone:
        return None
    try:
        await channel.synchronise(seconds)
    except (Gone, Refused):
        channel.close()
        return None
    except BaseException:
        channel.close()
        raise
    return channel


@contextlib.asynccontextmanager
async def reached(agent: Path) -> AsyncIterator[Channel]:
    """:func:`reach`, closed in the end; raises Gone when it does not answer."""
    channel = await reach(agent)
    if channel is None:
        raise Gone(f"nobody answers at {agent.name}")
    try:
        yield channel
    finally:
        channel.close()


async def answers(agent: Path, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether the guest agent answers."""
    channel = await reach(agent, seconds)
    if channel is not None:
        channel.close()
    return channel is not None


async def present_boot(agent: Path) -> str:
    """The guest's boot_id (proc(5)); empty when its agent does not say."""
    try:
        async with reached(agent) as channel:
            return await read(channel, BOOT_ID)
    except (Gone, Refused):
        return ""


async def read(channel: Channel, path: str) -> str:
    """The first line of a file in the guest; raises Gone or Refused."""
    async with _opened(channel, path, "r") as handle:
        try:
            said = await channel.ask({"execute": "guest-file-read", "arguments": {"handle": handle, "count": 256}},
                                     ANSWER_SECONDS)
            return base64.b64decode(said["buf-b64"]).decode(errors="replace").partition("\n")[0].strip()
        except (KeyError, TypeError, ValueError) as odd:
            raise Refused(f"the guest agent's answer about {path} makes no sense") from odd


async def write(channel: Channel, path: str, line: str) -> None:
    """Replace what is in a file of the guest by one line; raises Gone or Refused."""
    async with _opened(channel, path, "w") as handle:
        await channel.ask({"execute": "guest-file-write", "arguments": {
            "handle": handle, "buf-b64": base64.b64encode(f"{line}\n".encode()).decode()}}, ANSWER_SECONDS)
        await channel.ask({"execute": "guest-file-flush", "arguments": {"handle": handle}}, ANSWER_SECONDS)


@contextlib.asynccontextmanager
async def _opened(channel: Channel, path: str, mode: str) -> AsyncIterator[Any]:
    handle = await channel.ask({"execute": "guest-file-open", "arguments": {"path": path, "mode": mode}}, ANSWER_SECONDS)
    try:
        yield handle
    finally:
        with contextlib.suppress(Gone, Refused):
            await channel.ask({"execute": "guest-file-close", "arguments": {"handle": handle}}, ANSWER_SECONDS)


async def run(channel: Channel, *argv: str, seconds: float, input: bytes = b"") -> Ended:
    """Run a program in the guest, as root, to its end, with ``input`` as its standard input. Raises Gone also when it has not
    ended in ``seconds`` (it goes on then), Refused when the agent may not run programs."""
    end = time.monotonic() + seconds
    given = {"input-data": base64.b64encode(input).decode()} if input else {}
    try:
        started = await channel.ask({"execute": "guest-exec", "arguments": {
            "path": argv[0], "arg": list(argv[1:]), "capture-output": True, **given}}, ANSWER_SECONDS)
        while time.monotonic() < end:
            seen = await channel.ask({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}}, ANSWER_SECONDS)
            if seen["exited"]:
                said = b"".join(base64.b64decode(seen.get(stream, "")) for stream in ("out-data", "err-data"))
                return Ended(status=int(seen.get("exitcode", -int(seen.get("signal", 1)))),
                             said=said.decode(errors="replace").strip()[-500:])
            await asyncio.sleep(LOOK_SECONDS)
    except (KeyError, TypeError, ValueError, AttributeError) as odd:
        raise Refused(f"the guest agent's answer about {argv[0]} makes no sense") from odd
    raise Gone(f"{argv[0]} did not end in the guest within {seconds:.0f} s")
