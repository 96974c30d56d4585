"""The memory that goes after a guest which was handed over by post-copy, as its source sees it (see docs/decisions/0046).

The guest runs at its target, and this process answers for what it still has of it. A connection that breaks leaves both QEMUs
waiting: they are joined again as often as need be. Only when this process is gone, or cannot go on, is the target told that
nothing comes any more.

Source: QEMU docs/devel/migration/postcopy; QMP Reference Manual, migrate (resume), query-migrate.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from skysail.hypervisor import memory
from skysail.hypervisor.connections import Connections
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.qmp import Monitor
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.1
AGAIN_SECONDS = (0.1, 0.2, 0.5, 1.0)
# Two QEMUs that do not come together by a new connection within this time do not by that one.
JOIN_SECONDS = 15.0
# QEMU's words where the connection is broken, and where a new one is being made of use.
PAUSED, RECOVERING = f"{memory.AFTER}-paused", f"{memory.AFTER}-recover"
Say = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def part(monitor: Monitor, connections: Connections) -> None:
    """Hand the rest of its memory over after it; repeatable.

    The guest is stopped by us, not by QEMU: where a migration fails, QEMU runs by itself whatever it has stopped by itself,
    even after the other side could run (QEMU 10.0: migration_iteration_finish, after a connection that broke while the last
    page was on its way). One that was stopped before stays so.
    """
    await connections.ask(monitor, "stop")
    await connections.ask(monitor, "migrate-start-postcopy")


class Trail:
    """Of one guest, by ``connections``. ``say`` tells its target a word, and raises SkysailError without an answer; ``count``
    is told what QEMU says of it."""

    def __init__(self, guest: QemuGuest, connections: Connections, say: Say, count: Callable[[dict[str, Any]], None]) -> None:
        self._guest = guest
        self._connections = connections
        self._say = say
        self._count = count
        self._joining = 0.0
        self._turn = 0

    async def follow(self) -> str:
        """Until all of it is there, or never will be: why not, '' where it is."""
        while True:
            try:
                if (over := await self._look()) is not None:
                    return over
            except (SkysailError, OSError) as silent:
                if self._turn == 0:
                    log.warning("the memory of guest %s that is still here does not go: %s", self._guest.record.id, silent)
                await asyncio.sleep(AGAIN_SECONDS[min(self._turn, len(AGAIN_SECONDS) - 1)])
                self._turn += 1
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> str | None:
        """How it ended; None while it goes on."""
        if not self._guest.alive():
            return self._over(await self._say({"lost": True}))
        monitor = await self._guest.monitor()
        seen = await monitor.execute("query-migrate")
        self._count(seen)
        match str(seen.get("status", "")):
            case "completed":
                return ""
            case over if over in memory.OVER:
                # It may have failed in its very last step: only the target knows whether it has all of it.
                return self._over(await self._say({"lost": True}))
            case word if word == PAUSED:
                return await self._join(monitor)
            case word if word.startswith(RECOVERING):
                if time.monotonic() - self._joining > JOIN_SECONDS:
                    self._connections.hang_up()
            case _:
                self._turn = 0
        return None

    async def mend(self) -> None:
        """Join them again if their connection broke before the target could say that it runs: it may wait for a page."""
        if self._guest.alive():
            monitor = await self._guest.monitor()
            if (await monitor.execute("query-migrate")).get("status", "") == PAUSED:
                await self._join(monitor)

    async def _join(self, monitor: Monitor) -> str | None:
        """How it ended, if it has; None where they are being joined again."""
        if (ended := self._over(await self._say({"recover": True}))) is not None:
            return ended
        log.warning("guest %s and its memory are joined again", self._guest.record.id)
        await monitor.execute("migrate", {"uri": f"unix:{self._connections.to_memory()}", "resume": True})
        self._joining = time.monotonic()
        return None

    @staticmethod
    def _over(answer: dict[str, Any]) -> str | None:
        """What the target's answer says: why it is cut, '' where it has all; None where it waits for more."""
        pull = answer.get("pull", {})
        if pull.get("state") == "cut":
            return str(pull.get("reason", ""))
        return "" if pull.get("state") == "whole" else None
