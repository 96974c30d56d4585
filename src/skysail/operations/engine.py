"""The engine: claims open operations, runs their steps, resumes them after a crash, unwinds what failed.

One engine works on one database. It holds nothing in memory that matters: all positions stand in the rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from sqlalchemy import select, update

from skysail.kit.clock import Clock
from skysail.operations import history
from skysail.operations.workflow import StepFailed, Workflow
from skysail.store.database import Database
from skysail.store.schema import operations

log = logging.getLogger(__name__)
# After a look that found nothing to do: each request wakes the engine, and many come at once.
REST_SECONDS = 0.01


class Engine:
    """Drives every open operation as far as the world allows.

    ``touched`` is called after a pass in which any step committed, so that hosts get their new documents.
    """

    def __init__(self, database: Database, workflows: Mapping[str, Workflow], clock: Clock,
                 touched: Callable[[], None] = lambda: None) -> None:
        self._database = database
        self._workflows = workflows
        self._clock = clock
        self._touched = touched
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
            try:
                await asyncio.wait_for(self._wake.wait(), timeout=1.0)
            except TimeoutError:
                continue

    def drive(self) -> int:
        """One pass over the open operations; how many steps committed. One that cannot be carried on now, whatever its
        reason, does not hold up the others."""
        with self._database.transaction(write=False) as connection:
            open_ids = connection.execute(select(operations.c.id).where(operations.c.done.is_(False))
                                          .order_by(operations.c.created_at)).scalars().all()
        committed = 0
        for identifier in open_ids:
            try:
                while self._advance(identifier):
                    committed += 1
            except Exception:
                log.exception("operation %s is tried again with the next pass", identifier)
        return committed

    def _advance(self, identifier: str) -> bool:
        """Run the operation's current step in one transaction; whether it got on and has more to do."""
        now = self._clock.now()
        try:
            with self._database.transaction() as connection:
                row = history.find(connection, identifier)
                if row["done"]:
                    return False
                workflow = self._workflows[row["workflow"]]
                if row["unwinding"]:
                    workflow.steps[row["step"]].undo(connection, row, now)
                    values = {"step": row["step"] - 1} if row["step"] else {"done": True}
                elif not workflow.steps[row["step"]].do(connection, row, now):
                    return False
                elif row["step"] + 1 < len(workflow.steps):
                    values = {"step": row["step"] + 1}
                else:
                    values = {"done": True}
                    history.settle(connection, identifier, "Succeeded", now)
                connection.execute(update(operations).where(operations.c.id == identifier).values(**values))
                return True
        except StepFailed as failure:
            # The failed step's own writes are rolled back; its undo and those of the steps before it run next.
            with self._database.transaction() as connection:
                history.settle(connection, identifier, "Failed", now, error_code=failure.code,
                               error_details=str(failure))
                connection.execute(update(operations).where(operations.c.id == identifier).values(unwinding=True))
            return True
