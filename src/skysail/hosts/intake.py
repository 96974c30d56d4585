"""The intake: writes what the samples of hosts say, each exactly once, those of several hosts together.

What a sample changes and the note that it was taken in are one commit, so neither a lost answer nor a kill -9 of either side
counts one twice or leaves one out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert, select

from skysail.contract.samples import Sample, SamplePage
from skysail.hosts.threads import SAMPLES
from skysail.store.database import Database
from skysail.store.leases import Confirm
from skysail.store.schema import sample_cursors

log = logging.getLogger(__name__)
# How long pages are gathered: to write one takes a dozen statements, and to write those of many hosts hardly more.
GATHER_SECONDS = 0.5
# So many samples, of guests and of hosts, at the most are written in one transaction, unless one host has more: others wait
# to write, too.
TOGETHER = 250
# Writes what new samples of hosts say, by the hosts' ids.
TakeIn = Callable[[Connection, Mapping[str, Sequence[Sample]]], None]
_CURSORS = select(sample_cursors).where(sample_cursors.c.host_id.in_(bindparam("of_hosts", expanding=True)))
_MOVE_ON = insert(sample_cursors)
_LET_GO = delete(sample_cursors).where(sample_cursors.c.host_id.in_(bindparam("of_hosts", expanding=True)))


class _Told(NamedTuple):
    """A page of what a host told, ``size`` samples in all; by whose leave it is written, and who waits for it."""

    host_id: str
    page: SamplePage
    size: int
    confirm: Confirm
    fresh: asyncio.Future[int]


class Intake:
    """Writes by ``take_in`` what comes within ``gather_seconds``. Shared by all hosts; used from one event loop."""

    def __init__(self, database: Database, take_in: TakeIn, gather_seconds: float = GATHER_SECONDS) -> None:
        self._database = database
        self._take_in = take_in
        self._gather_seconds = gather_seconds
        self._waiting: list[_Told] = []
        self._writer: asyncio.Task[None] | None = None

    async def take(self, host_id: str, page: SamplePage, confirm: Confirm) -> int:
        """Write one page of the host's samples; how many of them were not written before. Raises what ``confirm`` or
        ``take_in`` raises."""
        fresh: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        size = sum(1 + len(sample.guests) for sample in page.samples)
        self._waiting.append(_Told(host_id, page, size, confirm, fresh))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        return await fresh

    async def cursor(self, host_id: str) -> tuple[str, int]:
        """Ring and number of the last sample of the host that was taken in."""
        return await SAMPLES.run(self._cursor, host_id)

    def _cursor(self, host_id: str) -> tuple[str, int]:
        with self._database.transaction(write=False) as connection:
            return _cursors(connection, [host_id]).get(host_id, ("", 0))

    async def _write_all(self) -> None:
        """Ends when nothing waits any more."""
        while self._waiting:
            await asyncio.sleep(self._gather_seconds)
            while several := self._next():
                outcomes: Sequence[int | BaseException] = []
                try:
                    outcomes = await SAMPLES.run(self._write, several)
                except BaseException as failed:
                    outcomes = [failed] * len(several)
                    raise
                finally:
                    for told, outcome in zip(several, outcomes, strict=True):
                        if told.fresh.done():  # nobody waits any longer
                            continue
                        if isinstance(outcome, BaseException):
                            told.fresh.set_exception(outcome)
                        else:
                            told.fresh.set_result(outcome)

    def _next(self) -> list[_Told]:
        """Those that waited longest, of one host one page. What nobody waits for any more is not begun: its host is left, or
        is another controller's."""
        self._waiting = [told for told in self._waiting if not told.fresh.done()]
        chosen: dict[str, _Told] = {}
        size = 0
        for told in self._waiting:
            if chosen and size + told.size > TOGETHER:
                break
            if chosen.setdefault(told.host_id, told) is told:
                size += told.size
        self._waiting = [told for told in self._waiting if chosen.get(told.host_id) is not told]
        return [*chosen.values()]

    def _write(self, several: Sequence[_Told]) -> list[int | BaseException]:
        """How many samples of each were new. Where they cannot be written together, each half is by itself: one that cannot
        be written, or is another controller's by now, keeps nobody from writing the others."""
        begun = False
        try:
            with self._database.transaction() as connection:
                begun = True
                return [*self._write_together(connection, several)]
        except BaseException as failed:
            if not begun or len(several) == 1:  # a database that is away is not asked for each of them
                return [failed] * len(several)
            log.debug("the samples of %d hosts are not written together: %s", len(several), failed)
        half = len(several) // 2
        return self._write(several[:half]) + self._write(several[half:])

    def _write_together(self, connection: Connection, several: Sequence[_Told]) -> list[int]:
        for confirm in {told.confirm for told in several}:
            confirm(connection)
        # Read again: another controller, which is being replaced by us, may have taken them in meanwhile.
        known = _cursors(connection, [told.host_id for told in several])
        new: dict[str, list[Sample]] = {}
        for told in several:
            ring, after = known.get(told.host_id, ("", 0))
            new[told.host_id] = [one for one in told.page.samples if told.page.ring != ring or one.sequence > after]
        fresh = [told for told in several if new[told.host_id]]
        if fresh:
            self._take_in(connection, {told.host_id: new[told.host_id] for told in fresh})
            connection.execute(_LET_GO, {"of_hosts": [told.host_id for told in fresh]})
            connection.execute(_MOVE_ON, [{"host_id": told.host_id, "ring": told.page.ring,
                                           "sequence": new[told.host_id][-1].sequence} for told in fresh])
        return [len(new[told.host_id]) for told in several]


def _cursors(connection: Connection, host_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
    return {row.host_id: (row.ring, row.sequence) for row in connection.execute(_CURSORS, {"of_hosts": host_ids})}
