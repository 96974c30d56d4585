"""The fleet: whoever is in the rows of ``hosts`` is watched, and its samples are collected, for as long as it is there.

Where several controllers work on the rows, each host is watched by the one that has its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import func, select

from skysail.hosts.client import AgentClient
from skysail.hosts.collector import Collector
from skysail.hosts.intake import Intake
from skysail.hosts.watch import Watch
from skysail.kit.clock import Clock
from skysail.store.database import Database
from skysail.store.leases import Lease
from skysail.store.schema import hosts
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
# How long nobody notices a host that appears, where nothing says that rows have changed; longer only where there are so many
# that looking at them would take more than that part of the time.
FOLLOW_SECONDS, LOOKING = 1.0, 0.05
# How often is tried to watch one that cannot be watched.
UNFIT_SECONDS = 60.0
# Into so many parts hosts are divided among controllers: leases are renewed each second, however many hosts there are.
PARTS = tuple(f"hosts:{number}" for number in range(64))
# All hosts with their addresses in one text. In the order of a subquery, since SQLite sorts within an aggregate only from
# 3.44 on; in another order it is another text, and all that costs is to read them.
_ALL = select(func.aggregate_strings(
    select((hosts.c.id + " " + hosts.c.address).label("host")).order_by(hosts.c.id).subquery().c.host, "\n"))


def lease_name(host_id: str) -> str:
    """What the lease is called by which a host is watched."""
    return PARTS[zlib.crc32(host_id.encode()) % len(PARTS)]


class _Host(NamedTuple):
    """A host as it is to be watched: another address, or another lease, makes it another one."""

    address: str
    lease: Lease


@dataclass
class _Tended:
    """A host that is talked to, until ``work`` is cancelled; of ``generation`` when its watch was last told to look."""

    host: _Host
    watch: Watch
    work: asyncio.Task[None]
    generation: int = 0


class Fleet:
    """Holds a watch and a collector for each host that this controller has the lease of (``find_lease``). ``connect`` makes
    the client of an address; ``observed`` is called after each report that was written, with the ids of the resources that it
    told something new of; ``intake`` writes samples, which hosts take every ``sample_seconds``."""

    def __init__(self, database: Database, clock: Clock, vault: Vault, find_lease: Callable[[str], Lease | None],
                 connect: Callable[[str], AgentClient], observed: Callable[[Collection[str]], None], intake: Intake,
                 sample_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._vault = vault
        self._find_lease = find_lease
        self._connect = connect
        self._observed = observed
        self._intake = intake
        self._sample_seconds = sample_seconds
        self._tended: dict[str, _Tended] = {}
        # Those that are ours and cannot be watched as they are, and when it is tried again.
        self._unfit: dict[str, tuple[_Host, float]] = {}
        self._changed = asyncio.Event()
        # What rows and leases said when they were last looked at, and those that were ours then.
        self._said: tuple[object, ...] = ()
        self._ours: dict[str, _Host] = {}

    def touch(self) -> None:
        """Rows may have changed: every host whose generation grew gets its document (call from the event loop)."""
        self._changed.set()

    async def run(self) -> None:
        """Follow the rows until cancelled. What changes makes documents of a few hosts new: those alone are looked at then,
        and all now and then."""
        now = asyncio.get_running_loop().time
        due = 0.0
        try:
            while True:
                self._changed.clear()
                began = now()
                try:
                    behind = await asyncio.to_thread(self._behind)
                    if began >= due or not self._tell(behind):
                        await self._follow(await asyncio.to_thread(self._hosts), behind)
                        self._tell(await asyncio.to_thread(self._behind))
                        due = now() + max(FOLLOW_SECONDS, (now() - began) / LOOKING)
                except Exception:
                    log.exception("the hosts could not be looked at; it is tried again")
                    due = now() + FOLLOW_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._changed.wait()
        finally:
            await self._leave(list(self._tended))

    def _hosts(self) -> dict[str, _Host]:
        """Those that are ours."""
        leases = {name: self._find_lease(name) for name in PARTS}
        with self._database.transaction(write=False) as connection:
            # Looked at each second or so, and hardly ever another: rows by the ten thousand come as one text first.
            said = (connection.execute(_ALL).scalar(), *leases.values())
            if said != self._said:
                rows = connection.execute(select(hosts.c.id, hosts.c.address)).all()
                self._ours = {row.id: _Host(row.address, lease) for row in rows
                              if (lease := leases[lease_name(row.id)]) is not None}
                self._said = said
        return self._ours

    def _behind(self) -> dict[str, int]:
        """The generation of each host that has not said that it holds it."""
        with self._database.transaction(write=False) as connection:
            return {row.id: row.generation for row in connection.execute(
                select(hosts.c.id, hosts.c.generation).where(hosts.c.generation != hosts.c.observed_generation))}

    def _tell(self, behind: Mapping[str, int]) -> bool:
        """Have them send what is new; whether all that are ours are known."""
        for host_id, generation in behind.items():
            tended = self._tended.get(host_id)
            if tended is None:
                if host_id not in self._unfit and self._find_lease(lease_name(host_id)) is not None:
                    return False
            elif tended.generation != generation:
                tended.generation = generation
                tended.watch.touch()
        return True

    async def _follow(self, found: Mapping[str, _Host], behind: Collection[str]) -> None:
        """Watch all that are found, and no others. Who is ``behind`` comes first: to meet thousands takes minutes, and what
        is new for those somebody waits for."""
        await self._leave([host_id for host_id, tended in self._tended.items()
                           if tended.host != found.get(host_id) or tended.work.done()])
        now = asyncio.get_running_loop().time()
        self._unfit = {host_id: (host, due) for host_id, (host, due) in self._unfit.items()
                       if host == found.get(host_id) and now < due}
        new = [host_id for host_id in found if host_id not in self._tended and host_id not in self._unfit]
        for host_id in sorted(new, key=lambda host_id: host_id not in behind):
            host = found[host_id]
            try:
                self._tended[host_id] = self._tend(host_id, host)
            except Exception:  # one address that nobody can call keeps nobody from the others
                log.exception("host %s at %s cannot be watched", host_id, host.address)
                self._unfit[host_id] = host, now + UNFIT_SECONDS

    def _tend(self, host_id: str, host: _Host) -> _Tended:
        client = self._connect(host.address)
        watch = Watch(host_id, client, self._database, self._clock, self._vault, self._observed, host.lease.confirm,
                      lambda: len(self._tended))
        collector = Collector(host_id, client, self._intake, self._sample_seconds, lambda: len(self._tended),
                              host.lease.confirm)

        async def work() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watch.run())
                    tasks.create_task(collector.run())
            finally:
                await client.close()

        log.info("host %s at %s is watched", host_id, host.address)
        return _Tended(host, watch, asyncio.create_task(work()))

    async def _leave(self, host_ids: list[str]) -> None:
        """Returns when nothing that was begun for them is under way any more, but for a transaction in its thread, which the
        lease guards."""
        left = [self._tended.pop(host_id).work for host_id in host_ids]
        for work in left:
            work.cancel()
        for host_id, outcome in zip(host_ids, await asyncio.gather(*left, return_exceptions=True), strict=True):
            unexpected = None if isinstance(outcome, asyncio.CancelledError) else outcome
            log.info("host %s is watched no more", host_id, exc_info=unexpected)
