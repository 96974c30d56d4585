"""A guest's file systems, frozen for a moment by its own agent.

A freeze blocks every writer of a file system, writes out what is dirty, and waits three times until each processor has seen
that (a grace period of RCU, some 20 ms). Therefore the guest writes out what it holds before it is frozen, and its kernel is
told to hurry those waits meanwhile: 65 to 90 ms become about 12. Source: QEMU Guest Agent Protocol Reference; Linux,
fs/super.c (freeze_super) and Documentation/RCU (rcu_expedited).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from skysail.hypervisor import guest_agent
from skysail.hypervisor.guest_agent import ANSWER_SECONDS
from skysail.hypervisor.qmp import Channel, Gone, Refused
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
# A freeze waits for what is being written; a guest that cannot end that in this time is copied as it stands.
FREEZE_SECONDS = 20.0
THAW_SECONDS = 60.0
SYNC_SECONDS = 30.0
# What was written while a long sync ran is left for the next one; a guest that always writes is frozen all the same.
SYNCS = 3
LITTLE_SECONDS = 0.25
HURRY = "/sys/kernel/rcu_expedited"


async def flush(channel: Channel) -> None:
    """Have the guest write out what it holds in memory, so that the freeze has little left to wait for. A guest whose agent
    may not run programs is frozen without it."""
    with contextlib.suppress(Gone, Refused):
        for _ in range(SYNCS):
            began = time.monotonic()
            await guest_agent.run(channel, "sync", seconds=SYNC_SECONDS)
            if time.monotonic() - began < LITTLE_SECONDS:
                return


@contextlib.asynccontextmanager
async def hurried(channel: Channel) -> AsyncIterator[None]:
    """The guest's kernel does not wait for its processors' next ticks while this lasts; without effect where its agent may
    not write files. An agent of ours that dies in here leaves it hurrying until it boots, at the price of some interrupts."""
    former = ""
    with contextlib.suppress(Gone, Refused):
        former = await guest_agent.read(channel, HURRY)
        if former == "0":
            await guest_agent.write(channel, HURRY, "1")
    try:
        yield
    finally:
        if former == "0":
            with contextlib.suppress(Gone, Refused):
                await guest_agent.write(channel, HURRY, former)


async def frozen(channel: Channel, agent: Path, act: Callable[[], Awaitable[None]]) -> float:
    """Run ``act`` while the guest's file systems stand still; for how many milliseconds at most a writer in it had to wait
    for that, by the guest's own clock: from before its agent began to freeze the first file system until after it had thawed
    the last. Where its clock does not say, or says more than can be, it is the time that passed here. Raises Gone or Refused,
    with ``act`` not run, when the guest does not freeze.

    Whatever happens, the guest is thawed; raises SkysailError when even that fails.
    """
    began = time.monotonic()
    first = last = None
    answered = False
    try:
        # One write for each pair: between the clock and the freeze lies no way to us and back.
        first, answer = await channel.ask_all(_TIME, {"execute": "guest-fsfreeze-freeze"}, seconds=FREEZE_SECONDS)
        answered = True
        if isinstance(answer, Refused):
            raise answer
        asked = time.monotonic() - began
        await act()
        acted = time.monotonic() - began - asked
    finally:
        # Shielded: a caller that is called off in here would leave a server that cannot write.
        thawing = asyncio.ensure_future(_thaw(channel, agent, answered))
        try:
            last = await asyncio.shield(thawing)
        except asyncio.CancelledError:
            await asyncio.wait((thawing,))
            raise
    whole = time.monotonic() - began
    log.info("frozen: %.0f ms until it was, %.0f ms held, %.0f ms until it was thawed", asked * 1000, acted * 1000,
             (whole - asked - acted) * 1000)
    if isinstance(first, int) and isinstance(last, int) and 0 < last - first < whole * 1e9:
        return (last - first) / 1e6
    return whole * 1000


_TIME = {"execute": "guest-get-time"}


async def _thaw(channel: Channel, agent: Path, answered: bool) -> Any:
    """Thaw; the guest's clock afterwards, or what came in its place. The answer to a freeze that was not ``answered`` may
    still come, and would be taken for the thaw's: then a conversation of its own is begun."""
    try:
        if not answered:
            raise Gone("the freeze was not answered")
        answer, clock = await channel.ask_all({"execute": "guest-fsfreeze-thaw"}, _TIME, seconds=ANSWER_SECONDS)
        if isinstance(answer, Refused):
            raise answer
        return clock
    except (Gone, Refused):
        channel.close()
        await thaw(agent)
        return None


async def thaw(agent: Path) -> None:
    """The guest's file systems are not frozen when this returns; raises SkysailError when its agent does not say so."""
    end = time.monotonic() + THAW_SECONDS
    while time.monotonic() < end:
        channel = await guest_agent.reach(agent)
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
