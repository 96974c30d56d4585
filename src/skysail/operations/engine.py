"""The engine: claims open operations, runs their steps, resumes them after a crash, unwinds what failed.

It holds nothing in memory that matters: all positions stand in the rows. Where several engines work on one database, each
drives the operations of the resources that it has claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Literal

from sqlalchemy import Connection, RowMapping, bindparam, select, tuple_, update

from skysail.kit.clock import Clock
from skysail.operations import history
from skysail.operations.workflow import StepFailed, Workflow
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone
from skysail.store.look import look
from skysail.store.schema import operations

log = logging.getLogger(__name__)
# After each pass: every request and every report wakes the engine, and many come at once.
REST_SECONDS, REST_AT_MOST_SECONDS = 0.01, 1.0
# So many resources' operations are driven at a time, each by a thread: their steps share commits (store/database.py), each of
# which takes a sync of the disk.
DRIVERS = 8
# So many operations are read at once, and of so many resources at the most a driver asks whether they wait before it drives
# those that need not: while it waits for a commit, others ask.
LOOKED_AT_ONCE, ASKED_TOGETHER = 500, 50
# So many of those that need not wait are carried on in one transaction: each statement of one that writes may have to wait
# for Python's lock, and what all of them need is asked once.
DRIVEN_TOGETHER = 10
# Where more are open than that, how long those that nothing is told of are left alone after none of so many could go on: so
# long, or so many times as long as it took to ask them.
ROUND_SECONDS, ROUND_TIMES = 1.0, 3.0
# A step waits for the world, went on and there is more to do, or was the operation's last.
Way = Literal["waits", "on", "over"]
# Nothing is older.
_FIRST = (0.0, "")
_OPEN = select(operations).where(operations.c.done.is_(False))
_GO_ON = update(operations).where(operations.c.id == bindparam("of_id")).values(
    step=bindparam("at_step"), done=bindparam("is_done"))
# Into so many parts operations are divided among engines: whatever concerns one resource is in one.
PARTS = tuple(f"operations:{number}" for number in range(16))


def part(resource_id: str) -> str:
    """The part that the operations of a resource are in."""
    return PARTS[zlib.crc32(resource_id.encode()) % len(PARTS)]


class Engine:
    """Drives every open operation as far as the world allows.

    ``touched`` is called after a pass in which any step committed, so that hosts get their new documents. ``claim`` says
    whether operations of a resource are driven here, and by what.
    """

    def __init__(self, database: Database, workflows: Mapping[str, Workflow], clock: Clock,
                 touched: Callable[[], None] = lambda: None,
                 claim: Callable[[str], Confirm | None] = lambda resource_id: alone) -> None:
        self._database = database
        self._workflows = workflows
        self._clock = clock
        self._touched = touched
        self._claim = claim
        self._wake = asyncio.Event()
        self._told: set[str] = set()
        self._threads = ThreadPoolExecutor(DRIVERS, "operations")
        # Where many are open: behind which one the round goes on, when, and when the newest was made that was asked.
        self._many, self._place, self._due = False, _FIRST, 0.0
        self._newest: float | None = None

    def wake(self, resources: Collection[str] = ()) -> None:
        """The world changed: look at the open operations again, and first at those of ``resources``, where many are open
        (call from the event loop)."""
        self._told.update(resources)
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. The short poll is the safety net for a wake that was lost with a crash."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            told, self._told = self._told, set()
            try:
                began = loop.time()
                went_on = await asyncio.to_thread(self.drive, told)
                if went_on:
                    self._touched()
                # Where thousands of operations wait for the world, looking at them again and again would leave nothing of
                # the processor to those who ask.
                rest = (loop.time() - began) / (4 if went_on else 1)
                await asyncio.sleep(min(max(REST_SECONDS, rest), REST_AT_MOST_SECONDS))
                if went_on and self._many:
                    continue  # there may be more that nobody tells of
            except Exception:
                log.exception("the engine's pass failed; it is repeated")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()

    def drive(self, told: Collection[str] = ()) -> int:
        """One pass over the open operations; how many steps committed. One that cannot be carried on now, whatever its
        reason, does not hold up the others.

        Where more are open than are asked at once, those that are new, and those of the resources ``told``, are asked in each
        pass, and the others in turn: a hint that is lost, or that another controller had, costs time and nothing else."""
        committed = 0
        if not self._many or time.monotonic() >= self._due:
            began = time.monotonic()
            committed = self._drive(self._next())
            took = time.monotonic() - began
            self._due = 0.0 if committed else began + took + max(ROUND_SECONDS, ROUND_TIMES * took)
        if self._many:
            committed += self._drive(self._urgent(told))
        return committed

    def _next(self) -> Sequence[RowMapping]:
        """The next ones in the order of their age; behind the last comes the first."""
        begins = self._place == _FIRST
        with self._database.transaction(write=False) as connection:
            found = connection.execute(_OPEN.where(tuple_(operations.c.created_at, operations.c.id) > self._place).order_by(
                operations.c.created_at, operations.c.id).limit(LOOKED_AT_ONCE)).mappings().all()
        whole = len(found) < LOOKED_AT_ONCE
        self._many = not (whole and begins)
        self._place = _FIRST if whole else (found[-1]["created_at"], found[-1]["id"])
        return found

    def _urgent(self, told: Collection[str]) -> Sequence[RowMapping]:
        """Those of the resources ``told``, and the newest that were not asked yet."""
        asked = sorted(told)
        with self._database.transaction(write=False) as connection:
            found = [row for first in range(0, len(asked), LOOKED_AT_ONCE) for row in connection.execute(_OPEN.where(
                operations.c.resource_id.in_(asked[first:first + LOOKED_AT_ONCE]))).mappings()]
            newer = () if self._newest is None else (operations.c.created_at > self._newest,)
            fresh = connection.execute(_OPEN.where(*newer).order_by(operations.c.created_at.desc()).limit(
                LOOKED_AT_ONCE)).mappings().all()
        if fresh:
            self._newest = fresh[0]["created_at"]
        return sorted({row["id"]: row for row in (*found, *fresh)}.values(), key=itemgetter("created_at"))

    def _drive(self, rows: Sequence[RowMapping]) -> int:
        """Carry on those of them that are driven here; how many steps committed."""
        of_resource: dict[str, list[tuple[RowMapping, Confirm]]] = {}
        for row in rows:
            if (confirm := self._claim(row["resource_id"])) is not None:
                of_resource.setdefault(row["resource_id"], []).append((row, confirm))
        together = [*of_resource.values()]  # those of one resource, in their order
        size = min(ASKED_TOGETHER, -(-len(together) // DRIVERS)) or 1
        return sum(self._threads.map(self._carry_on, (
            [one for several in together[first:first + size] for one in several] for first in range(0, len(together), size))))

    def _carry_on(self, some: Sequence[tuple[RowMapping, Confirm]]) -> int:
        """Drive those of these operations that need not wait, some at a time; how many steps committed."""
        committed = 0
        ready = self._ready(some)
        for begin in range(0, len(ready), DRIVEN_TOGETHER):
            together = ready[begin:begin + DRIVEN_TOGETHER]
            ways = self._advance_together(together) if len(together) > 1 else None
            if ways is not None:
                committed += sum(way != "waits" for way in ways)
                together = [one for one, way in zip(together, ways, strict=True) if way == "on"]
            committed += sum(self._advance_alone(identifier, confirm) for identifier, confirm in together)
        return committed

    def _advance_alone(self, identifier: str, confirm: Confirm) -> int:
        """Carry the operation on until it waits or is over; how many steps committed."""
        committed = 0
        try:
            while (way := self._advance(identifier, confirm)) == "on":
                committed += 1
            committed += way == "over"
        except LeaseLost as lost:
            log.info("operation %s: %s", identifier, lost)
        except Exception:
            log.exception("operation %s is tried again with the next pass", identifier)
        return committed

    def _advance_together(self, some: Sequence[tuple[str, Confirm]]) -> list[Way] | None:
        """Run the next step of each in one transaction: how each went. None, and nothing is changed, where one of them fails:
        then each is by itself."""
        now = self._clock.now()
        try:
            with self._database.transaction() as connection:
                for confirm in {confirm for _, confirm in some}:
                    confirm(connection)
                return [self._step(connection, identifier, now) for identifier, _ in some]
        except Exception as failed:  # the one that it was of says so again
            log.debug("%d operations are not carried on together: %s", len(some), failed)
            return None

    def _ready(self, some: Sequence[tuple[RowMapping, Confirm]]) -> list[tuple[str, Confirm]]:
        """Those of them that need not wait. Most have to: they are asked within one transaction, which only reads and keeps
        nobody from writing."""
        now = self._clock.now()
        with self._database.transaction(write=False) as connection:
            looking = look(connection)
            return [(row["id"], confirm) for row, confirm in some if not self._waits(looking, row, now)]

    def _waits(self, connection: Connection, row: RowMapping, now: float) -> bool:
        """Whether all that the operation's step does, as things stand, is to wait."""
        if row["unwinding"]:
            return False
        try:
            return not self._workflows[row["workflow"]].steps[row["step"]].do(connection, row, now)
        except Exception:  # WouldWrite, or what it will raise again when it is taken
            return False

    def _advance(self, identifier: str, confirm: Confirm) -> Way:
        """Run the operation's current step in one transaction, or let it unwind: how it went."""
        now = self._clock.now()
        try:
            with self._database.transaction() as connection:
                confirm(connection)
                return self._step(connection, identifier, now)
        except StepFailed as failure:
            # The failed step's own writes are rolled back; its undo and those of the steps before it run next.
            with self._database.transaction() as connection:
                confirm(connection)  # between the two, the operation may have come into other hands
                history.settle(connection, identifier, "Failed", now, error_code=failure.code,
                               error_details=str(failure))
                connection.execute(update(operations).where(operations.c.id == identifier).values(unwinding=True))
            return "on"

    def _step(self, connection: Connection, identifier: str, now: float) -> Way:
        """The operation's current step, or the undo of it, and its new position. Raises StepFailed."""
        row = history.find(connection, identifier)
        if row["done"]:
            return "waits"
        step, done = row["step"], False
        workflow = self._workflows[row["workflow"]]
        if row["unwinding"]:
            workflow.steps[step].undo(connection, row, now)
            step, done = max(step - 1, 0), step == 0
        elif not workflow.steps[step].do(connection, row, now):
            return "waits"
        elif step + 1 < len(workflow.steps):
            step += 1
        else:
            done = True
            history.settle(connection, identifier, "Succeeded", now)
        connection.execute(_GO_ON, {"of_id": identifier, "at_step": step, "is_done": done})
        return "over" if done else "on"
