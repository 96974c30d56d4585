"""The courier: takes what is in the outbox to its receivers, as often as it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from skysail.hosts.threads import Threads
from skysail.kit.clock import Clock
from skysail.notices import Carrier, Notice, Undeliverable
from skysail.resources import outbox
from skysail.resources.contact_methods import is_webhook
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
# Threads of their own: a relay that does not answer holds each for half a minute, and what everything else runs in are few.
CARRIERS = Threads(outbox.PORTION, "notices")
# What the lease is called by which notices go out.
COURIER = "courier"


class Courier:
    """Works on one outbox, where ``claim`` says that it is ours to do; holds nothing in memory that matters."""

    def __init__(self, database: Database, clock: Clock, mail: Carrier, webhook: Carrier,
                 claim: Callable[[], Confirm | None] = lambda: alone) -> None:
        self._database = database
        self._clock = clock
        self._mail = mail
        self._webhook = webhook
        self._claim = claim

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            try:
                await self.deliver()
            except LeaseLost as lost:
                log.info("%s", lost)
            except Exception:
                log.exception("the outbox could not be worked on; it is tried again")
            await asyncio.sleep(LOOK_SECONDS)

    async def deliver(self) -> None:
        """Send what is due: side by side, for one receiver may be slow."""
        confirm = self._claim()
        if confirm is not None:
            notices = await asyncio.to_thread(self._due, confirm)
            for outcome in await asyncio.gather(*(CARRIERS.run(self._take, notice, confirm) for notice in notices),
                                                return_exceptions=True):
                # Not before all of them have ended: one that is still under way would be sent a second time.
                if isinstance(outcome, BaseException):
                    raise outcome

    def _due(self, confirm: Confirm) -> list[Notice]:
        with self._database.transaction(write=False) as connection:
            confirm(connection)
            return outbox.due(connection, self._clock.now())

    def _take(self, notice: Notice, confirm: Confirm) -> None:
        with self._database.transaction(write=False) as connection:
            confirm(connection)  # it may have had to wait for a thread
        try:
            (self._webhook if is_webhook(notice.endpoint) else self._mail).send(notice)
        except Undeliverable as failure:
            log.warning("notice %s was not delivered: %s", notice.id, failure)
            with self._database.transaction() as connection:
                outbox.failed(connection, notice.id, failure, self._clock.now())
            return
        with self._database.transaction() as connection:
            outbox.delivered(connection, notice.id)
