"""A round: what one of the controllers does every so often, in one transaction each time that there is something to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy import Connection

from skysail.store.database import Database
from skysail.store.leases import BEAT_SECONDS, LeaseLost, Shares
from skysail.store.look import WouldWrite, look

log = logging.getLogger(__name__)
# A round rests at least so many times as long as it took.
RESTS = 4.0


class Round:
    """``act`` is done every ``seconds`` by the controller that has the lease of ``name``; it says how much it did. Where it
    leaves more to do (``again_seconds``), it is done again after that pause until there is none. ``acted`` is called after
    something was done."""

    def __init__(self, name: str, seconds: float, act: Callable[[Connection], int], database: Database, shares: Shares, *,
                 acted: Callable[[], None] = lambda: None, again_seconds: float | None = None) -> None:
        self.name = name
        self._seconds = seconds
        self._act = act
        self._database = database
        self._shares = shares
        self._acted = acted
        self._again_seconds = again_seconds

    async def run(self) -> None:
        """Go round until cancelled."""
        while True:
            pause, began = BEAT_SECONDS, time.monotonic()
            try:
                done = await asyncio.to_thread(self._go)
                if done:
                    self._acted()
                if done is not None:
                    pause = self._again_seconds if done and self._again_seconds is not None else self._seconds
            except LeaseLost as lost:
                log.info("%s", lost)
            except Exception:
                log.exception("%s failed; it is tried again", self.name)
                pause = self._seconds
            # Where there is so much that to look at it takes long, it is looked at less often.
            await asyncio.sleep(max(pause, RESTS * (time.monotonic() - began)))

    def _go(self) -> int | None:
        """How much was done; None when another controller does it."""
        confirm = self._shares.claim(self.name)
        if confirm is None:
            return None
        try:
            # Mostly there is nothing to do, and to find that out keeps nobody from writing.
            with self._database.transaction(write=False) as connection:
                return self._act(look(connection))
        except WouldWrite:
            with self._database.transaction() as connection:
                confirm(connection)
                return self._act(connection)
