"""The courier: takes what is in the outbox to its receivers, as often as it takes."""

from __future__ import annotations

import asyncio
import logging

from skysail.kit.clock import Clock
from skysail.notices import Carrier, Notice, Undeliverable
from skysail.resources import outbox
from skysail.resources.contact_methods import is_webhook
from skysail.store.database import Database

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0


class Courier:
    """Works on one outbox; holds nothing in memory that matters."""

    def __init__(self, database: Database, clock: Clock, mail: Carrier, webhook: Carrier) -> None:
        self._database = database
        self._clock = clock
        self._mail = mail
        self._webhook = webhook

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            try:
                await self.deliver()
            except Exception:
                log.exception("the outbox could not be worked on; it is tried again")
            await asyncio.sleep(LOOK_SECONDS)

    async def deliver(self) -> None:
        """Send what is due: side by side, for one receiver may be slow."""
        notices = await asyncio.to_thread(self._due)
        await asyncio.gather(*(asyncio.to_thread(self._take, notice) for notice in notices))

    def _due(self) -> list[Notice]:
        with self._database.transaction(write=False) as connection:
            return outbox.due(connection, self._clock.now())

    def _take(self, notice: Notice) -> None:
        try:
            (self._webhook if is_webhook(notice.endpoint) else self._mail).send(notice)
        except Undeliverable as failure:
            log.warning("notice %s was not delivered: %s", notice.id, failure)
            with self._database.transaction() as connection:
                outbox.failed(connection, notice.id, failure, self._clock.now())
            return
        with self._database.transaction() as connection:
            outbox.delivered(connection, notice.id)
