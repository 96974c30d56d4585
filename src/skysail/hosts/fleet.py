"""The fleet: whoever is in the rows of ``hosts`` is watched, and its samples are collected, for as long as it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select

from skysail.hosts.client import AgentClient
from skysail.hosts.collector import Collector, TakeIn
from skysail.hosts.watch import Watch
from skysail.kit.clock import Clock
from skysail.store.database import Database
from skysail.store.schema import hosts
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
FOLLOW_SECONDS = 1.0


@dataclass(frozen=True)
class _Tended:
    """A host that is talked to at ``address``, until ``work`` is cancelled."""

    address: str
    watch: Watch
    work: asyncio.Task[None]


class Fleet:
    """Holds a watch and a collector for each host. ``connect`` makes the client of an address; ``observed`` is called after
    each report that was written; ``take_in`` writes what samples say, which are asked for every ``collect_seconds``."""

    def __init__(self, database: Database, clock: Clock, vault: Vault, connect: Callable[[str], AgentClient],
                 observed: Callable[[], None], take_in: TakeIn, collect_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._vault = vault
        self._connect = connect
        self._observed = observed
        self._take_in = take_in
        self._collect_seconds = collect_seconds
        self._tended: dict[str, _Tended] = {}

    def touch(self) -> None:
        """Rows may have changed: every host whose generation grew gets its document (call from the event loop)."""
        for tended in self._tended.values():
            tended.watch.touch()

    async def run(self) -> None:
        """Follow the rows until cancelled."""
        try:
            while True:
                try:
                    await self._follow(await asyncio.to_thread(self._addresses))
                except Exception:
                    log.exception("the hosts could not be looked at; it is tried again")
                await asyncio.sleep(FOLLOW_SECONDS)
        finally:
            await self._leave(list(self._tended))

    def _addresses(self) -> dict[str, str]:
        with self._database.transaction(write=False) as connection:
            return {row.id: row.address for row in connection.execute(select(hosts.c.id, hosts.c.address))}

    async def _follow(self, addresses: dict[str, str]) -> None:
        await self._leave([host_id for host_id, tended in self._tended.items()
                           if tended.address != addresses.get(host_id) or tended.work.done()])
        for host_id in addresses.keys() - self._tended.keys():
            self._tended[host_id] = self._tend(host_id, addresses[host_id])

    def _tend(self, host_id: str, address: str) -> _Tended:
        client = self._connect(address)
        watch = Watch(host_id, client, self._database, self._clock, self._vault, self._observed)
        collector = Collector(host_id, client, self._database, self._take_in, self._collect_seconds)

        async def work() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watch.run())
                    tasks.create_task(collector.run())
            finally:
                await client.close()

        log.info("host %s at %s is watched", host_id, address)
        return _Tended(address, watch, asyncio.create_task(work()))

    async def _leave(self, host_ids: list[str]) -> None:
        """Returns when nothing that was begun for them is under way any more, but for a transaction in its thread."""
        left = [self._tended.pop(host_id).work for host_id in host_ids]
        for work in left:
            work.cancel()
        for host_id, outcome in zip(host_ids, await asyncio.gather(*left, return_exceptions=True), strict=True):
            unexpected = None if isinstance(outcome, asyncio.CancelledError) else outcome
            log.info("host %s is watched no more", host_id, exc_info=unexpected)
