"""The intake: writes what the samples of hosts say, each exactly once, those of several hosts together.

What a sample changes and the note that it was taken in are one commit, so neither a lost answer nor a kill -9 of either side
counts one twice or leaves one out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert, select

from skysail.contract.samples import Sample, SamplePage
from skysail.hosts.threads import SAMPLES
from skysail.store.database import Database
from skysail.store.leases import Confirm
from skysail.store.schema import sample_cursors

# How long pages are gathered: to write one takes a dozen statements, and to write those of many hosts hardly more.
GATHER_SECONDS = 0.5
# So many samples of guests at the most are written in one transaction, unless one host has more: others wait to write, too.
TOGETHER = 250
# Writes what new samples of hosts say, by the hosts' ids.
TakeIn = Callable[[Connection, Mapping[str, Sequence[Sample]]], None]
_CURSORS = select(sample_cursors).where(sample_cursors.c.host_id.in_(bindparam("of_hosts", expanding=True)))
_MOVE_ON = insert(sample_cursors)
_LET_GO = delete(sample_cursors).where(sample_cursors.c.host_id.in_(bindparam("of_hosts", expanding=True)))


class _Page(NamedTuple):
    """What a host told, by whose leave it is written, and who waits for it."""

    host_id: str
    page: SamplePage
    confirm: Confirm
    fresh: asyncio.Future[int]

    @property
    def size(self) -> int:
        return sum(len(sample.guests) for sample in self.page.samples)


class Intake:
    """Writes by ``take_in`` what comes within ``gather_seconds``. Shared by all hosts; used from one event loop."""

    def __init__(self, database: Database, take_in: TakeIn, gather_seconds: float = GATHER_SECONDS) -> None:
        self._database = database
        self._take_in = take_in
        self._gather_seconds = gather_seconds
        self._waiting: list[_Page] = []
        self._writer: asyncio.Task[None] | None = None

    async def take(self, host_id: str, page: SamplePage, confirm: Confirm) -> int:
        """Write one page of the host's samples; how many of them were not written before. Raises what ``confirm`` or
        ``take_in`` raises."""
        fresh: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Page(host_id, page, confirm, fresh))
        if self._writer is None:
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
        try:
            while self._waiting:
                await asyncio.sleep(self._gather_seconds)
                while self._waiting:
                    pages = self._next()
                    for page, outcome in zip(pages, await SAMPLES.run(self._write, pages), strict=True):
                        if page.fresh.done():  # nobody waits any longer
                            continue
                        if isinstance(outcome, BaseException):
                            page.fresh.set_exception(outcome)
                        else:
                            page.fresh.set_result(outcome)
        finally:
            self._writer = None

    def _next(self) -> list[_Page]:
        """Those that waited longest; of one host one page."""
        chosen: dict[str, _Page] = {}
        size = 0
        for page in self._waiting:
            if chosen and size + page.size > TOGETHER:
                break
            if chosen.setdefault(page.host_id, page) is page:
                size += page.size
        self._waiting = [page for page in self._waiting if chosen.get(page.host_id) is not page]
        return [*chosen.values()]

    def _write(self, pages: Sequence[_Page]) -> list[int | BaseException]:
        """How many samples of each were new. Where they cannot be written together, each is by itself: one that cannot be
        written, or is another controller's by now, keeps nobody from writing the others."""
        try:
            return [*self._write_together(pages)]
        except BaseException as failed:
            if len(pages) == 1:
                return [failed]
            return [outcome for page in pages for outcome in self._write([page])]

    def _write_together(self, pages: Sequence[_Page]) -> list[int]:
        with self._database.transaction() as connection:
            for confirm in {page.confirm for page in pages}:
                confirm(connection)
            # Read again: another controller, which is being replaced by us, may have taken them in meanwhile.
            known = _cursors(connection, [page.host_id for page in pages])
            new: dict[str, list[Sample]] = {}
            for host_id, page, *_ in pages:
                ring, after = known.get(host_id, ("", 0))
                new[host_id] = [sample for sample in page.samples if page.ring != ring or sample.sequence > after]
            told = [page for page in pages if new[page.host_id]]
            if told:
                self._take_in(connection, {page.host_id: new[page.host_id] for page in told})
                connection.execute(_LET_GO, {"of_hosts": [page.host_id for page in told]})
                connection.execute(_MOVE_ON, [{"host_id": page.host_id, "ring": page.page.ring,
                                               "sequence": new[page.host_id][-1].sequence} for page in told])
            return [len(new[page.host_id]) for page in pages]


def _cursors(connection: Connection, host_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
    return {row.host_id: (row.ring, row.sequence) for row in connection.execute(_CURSORS, {"of_hosts": host_ids})}
