"""The engine: claims open operations, runs their steps, resumes them after a crash, unwinds what failed.

It holds nothing in memory that matters: all positions stand in the rows. Where several engines work on one database, each
drives the operations of the resources that it has claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Callable, Mapping

from sqlalchemy import select, update

from skysail.kit.clock import Clock
from skysail.operations import history
from skysail.operations.workflow import StepFailed, Workflow
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone
from skysail.store.schema import operations

log = logging.getLogger(__name__)
# After a look that found nothing to do: each request wakes the engine, and many come at once.
REST_SECONDS = 0.01
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

    def wake(self) -> None:
        """The world changed: look at the open operations again (call from the event loop)."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. The short poll is the safety net for a wake that was lost with a crash."""
        while True:
            self._wake.clear()
            try:
                if await asyncio.to_thread(self.drive):
                    self._touched()
                else:
                    await asyncio.sleep(REST_SECONDS)
            except Exception:
                log.exception("the engine's pass failed; it is repeated")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()

    def drive(self) -> int:
        """One pass over the open operations; how many steps committed. One that cannot be carried on now, whatever its
        reason, does not hold up the others."""
        with self._database.transaction(write=False) as connection:
            open_ = connection.execute(select(operations.c.id, operations.c.resource_id).where(operations.c.done.is_(False))
                                       .order_by(operations.c.created_at)).all()
        committed = 0
        for identifier, resource_id in open_:
            confirm = self._claim(resource_id)
            try:
                while confirm is not None and self._advance(identifier, confirm):
                    committed += 1
            except LeaseLost as lost:
                log.info("operation %s: %s", identifier, lost)
            except Exception:
                log.exception("operation %s is tried again with the next pass", identifier)
        return committed

    def _advance(self, identifier: str, confirm: Confirm) -> bool:
        """Run the operation's current step in one transaction; whether it got on and has more to do."""
        now = self._clock.now()
        try:
            with self._database.transaction() as connection:
                confirm(connection)
                row = history.find(connection, identifier)
                if row["done"]:
                    return False
                step = row["step"]
                workflow = self._workflows[row["workflow"]]
                if row["unwinding"]:
                    workflow.steps[step].undo(connection, row, now)
                    values = {"step": step - 1} if step else {"done": True}
                elif not workflow.steps[step].do(connection, row, now):
                    return False
                elif step + 1 < len(workflow.steps):
                    values = {"step": step + 1}
                else:
                    values = {"done": True}
                    history.settle(connection, identifier, "Succeeded", now)
                connection.execute(update(operations).where(operations.c.id == identifier).values(**values))
                return True
        except StepFailed as failure:
            # The failed step's own writes are rolled back; its undo and those of the steps before it run next.
            with self._database.transaction() as connection:
                confirm(connection)  # between the two, the operation may have come into other hands
                history.settle(connection, identifier, "Failed", now, error_code=failure.code,
                               error_details=str(failure))
                connection.execute(update(operations).where(operations.c.id == identifier).values(unwinding=True))
            return True
