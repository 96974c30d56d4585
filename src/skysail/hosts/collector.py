"""The collector: fetches a host's samples and hands each on exactly once.

What a sample changes and the note that it was taken in are one commit, so neither a lost answer nor a kill -9 of either side
counts one twice or leaves one out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx
from sqlalchemy import Connection, delete, insert, select

from skysail.contract.samples import Sample, SamplePage
from skysail.hosts.client import AgentClient
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone
from skysail.store.schema import sample_cursors

log = logging.getLogger(__name__)
TakeIn = Callable[[Connection, str, list[Sample]], None]


class Collector:
    """Follows the samples of ``host_id``; ``take_in`` writes what they say; ``confirm`` says that it is still this controller
    that does so."""

    def __init__(self, host_id: str, client: AgentClient, database: Database, take_in: TakeIn,
                 pause_seconds: float, confirm: Confirm = alone) -> None:
        self._host_id = host_id
        self._client = client
        self._database = database
        self._take_in = take_in
        self._pause = pause_seconds
        self._confirm = confirm

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            try:
                while await self.collect():
                    continue
            except LeaseLost as lost:
                log.info("%s", lost)
            except (httpx.HTTPError, OSError) as unreachable:
                log.info("samples of host %s: %s", self._host_id, unreachable)
            except Exception:
                log.exception("samples of host %s could not be taken in; they are asked for again", self._host_id)
            await asyncio.sleep(self._pause)

    async def collect(self) -> bool:
        """Take in one page; whether there was anything on it."""
        ring, after = await asyncio.to_thread(self._cursor)
        page = await self._client.samples(ring, after)
        return bool(page.samples) and await asyncio.to_thread(self._commit, page) > 0

    def _cursor(self) -> tuple[str, int]:
        with self._database.transaction(write=False) as connection:
            return cursor(connection, self._host_id)

    def _commit(self, page: SamplePage) -> int:
        with self._database.transaction() as connection:
            self._confirm(connection)
            # Read again: another controller, which is being replaced by us, may have taken them in meanwhile.
            ring, after = cursor(connection, self._host_id)
            new = [sample for sample in page.samples if page.ring != ring or sample.sequence > after]
            if new:
                self._take_in(connection, self._host_id, new)
                connection.execute(delete(sample_cursors).where(sample_cursors.c.host_id == self._host_id))
                connection.execute(insert(sample_cursors).values(
                    host_id=self._host_id, ring=page.ring, sequence=new[-1].sequence))
            return len(new)


def cursor(connection: Connection, host_id: str) -> tuple[str, int]:
    """Ring and number of the last sample of the host that was taken in."""
    row = connection.execute(select(sample_cursors).where(sample_cursors.c.host_id == host_id)).first()
    return ("", 0) if row is None else (row.ring, row.sequence)
