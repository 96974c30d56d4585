"""A guest's file systems, frozen for a moment by its own agent. Source: QEMU Guest Agent Protocol Reference."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from skysail.hypervisor.qmp import Channel, Gone, Refused
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
ANSWER_SECONDS = 5.0
# A freeze waits for what is being written; a guest that cannot end that in this time is copied as it stands.
FREEZE_SECONDS = 20.0
THAW_SECONDS = 60.0
SYNC_SECONDS = 30.0
_numbers = itertools.count(1)


async def reach(agent: Path) -> Channel | None:
    """A conversation with the guest agent behind the socket ``agent``, past whatever it still had to say to somebody else;
    None when it does not answer."""
    try:
        channel = await Channel.connect(agent)
    except Gone:
        return None
    number = next(_numbers)
    try:
        for _ in range(8):
            if await channel.ask({"execute": "guest-sync", "arguments": {"id": number}}, ANSWER_SECONDS) == number:
                return channel
    except (Gone, Refused):
        pass
    channel.close()
    return None


async def flush(channel: Channel) -> None:
    """Have the guest write out what it holds in memory, so that the freeze has little left to wait for. A guest whose agent
    may not run programs is frozen without it."""
    with contextlib.suppress(Gone, Refused, KeyError, TypeError):
        started = await channel.ask({"execute": "guest-exec", "arguments": {"path": "sync"}}, ANSWER_SECONDS)
        end = time.monotonic() + SYNC_SECONDS
        while time.monotonic() < end:
            seen = await channel.ask({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}}, ANSWER_SECONDS)
            if seen["exited"]:
                return
            await asyncio.sleep(0.05)


async def frozen(channel: Channel, agent: Path, act: Callable[[], Awaitable[None]]) -> float:
    """Run ``act`` while the guest's file systems stand still; for how many milliseconds, from before the freeze was asked for
    until the thaw was answered. Raises Gone or Refused, with ``act`` not run, when the guest does not freeze.

    Whatever happens, the guest is thawed; raises SkysailError when even that fails.
    """
    began = time.monotonic()
    try:
        await channel.ask({"execute": "guest-fsfreeze-freeze"}, FREEZE_SECONDS)
        asked = time.monotonic() - began
        await act()
        acted = time.monotonic() - began - asked
    finally:
        # Shielded: a caller that is called off in here would leave a server that cannot write.
        thawing = asyncio.ensure_future(_thaw(channel, agent))
        try:
            await asyncio.shield(thawing)
        except asyncio.CancelledError:
            await asyncio.wait((thawing,))
            raise
    whole = time.monotonic() - began
    log.info("frozen: %.0f ms until it was, %.0f ms held, %.0f ms until it was thawed", asked * 1000, acted * 1000,
             (whole - asked - acted) * 1000)
    return whole * 1000


async def _thaw(channel: Channel, agent: Path) -> None:
    try:
        await channel.ask({"execute": "guest-fsfreeze-thaw"}, ANSWER_SECONDS)
    except (Gone, Refused):
        channel.close()
        await thaw(agent)


async def thaw(agent: Path) -> None:
    """The guest's file systems are not frozen when this returns; raises SkysailError when its agent does not say so."""
    end = time.monotonic() + THAW_SECONDS
    while time.monotonic() < end:
        channel = await reach(agent)
        if channel is not None:
            try:
                if await channel.ask({"execute": "guest-fsfreeze-status"}, ANSWER_SECONDS) == "thawed":
                    return
                await channel.ask({"execute": "guest-fsfreeze-thaw"}, FREEZE_SECONDS)
            except (Gone, Refused):
                pass
            finally:
                channel.close()
        await asyncio.sleep(0.2)
    raise SkysailError("the guest's file systems were frozen, and its agent does not thaw them", "reboot the instance")
