"""A round: what one of the controllers does every so often, each time in one transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import Connection

from skysail.store.database import Database
from skysail.store.leases import BEAT_SECONDS, LeaseLost, Shares

log = logging.getLogger(__name__)


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
            pause = BEAT_SECONDS
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
            await asyncio.sleep(pause)

    def _go(self) -> int | None:
        """How much was done; None when another controller does it."""
        confirm = self._shares.claim(self.name)
        if confirm is None:
            return None
        with self._database.transaction() as connection:
            confirm(connection)
            return self._act(connection)
