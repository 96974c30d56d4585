"""The fencer: has the operator's program turn off hosts that have failed, until it says that one is off.

The program runs as the controller's user, who may do nothing: what it needs to turn a machine off, such as the password of
its management controller, its operator lets that user read. It may be run again at any moment, also while another controller,
which was taken for dead, still runs it: turning off what is off has to succeed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from skysail.hosts import outages
from skysail.hosts.client import AgentClient, Foreign
from skysail.hosts.outages import Due
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed
from skysail.kit.process import run_apart
from skysail.serve.programs import PATH
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
# So many hosts are fenced at a time.
AT_ONCE = 16
# How long the last question to a host may take, before it is turned off.
ANSWER_SECONDS = 10.0


class Fencer:
    """Fences the hosts that are due, side by side, where ``claim`` says that it is ours to do. What it knows stands in the
    rows; a result that comes when another controller does this is left to that one, which asks again. ``connect`` makes the
    client of an address."""

    def __init__(self, config: Config, database: Database, clock: Clock, claim: Callable[[], Confirm | None],
                 connect: Callable[[str], AgentClient]) -> None:
        self._config = config
        self._database = database
        self._clock = clock
        self._claim = claim
        self._connect = connect
        self._at_work: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Fence until cancelled."""
        try:
            while True:
                try:
                    if self._config.fence and (confirm := self._claim()) is not None:
                        self._at_work = {host: task for host, task in self._at_work.items() if not task.done()}
                        for wanted in await asyncio.to_thread(self._due):
                            if wanted.host_id not in self._at_work and len(self._at_work) < AT_ONCE:
                                self._at_work[wanted.host_id] = asyncio.create_task(self._fence(wanted, confirm))
                except Exception:
                    log.exception("which hosts are to be fenced could not be looked at; it is tried again")
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._at_work.values():
                task.cancel()
            await asyncio.gather(*self._at_work.values(), return_exceptions=True)

    async def _fence(self, wanted: Due, confirm: Confirm) -> None:
        try:
            if not await asyncio.to_thread(self._tries, wanted, confirm):
                return
            reason = await self._turned_off(wanted)
            await asyncio.to_thread(self._settle, wanted, confirm, reason)
        except LeaseLost as lost:
            log.info("%s", lost)
        except Exception:
            log.exception("host %s could not be fenced; it is tried again", wanted.host_id)

    async def _turned_off(self, wanted: Due) -> str:
        """'' when it is off for certain, else why that is not known."""
        if await self._answers(wanted.address):
            return "it answers this controller, though not the one that watches it"
        place = urlsplit(wanted.address).hostname or ""
        told = {"PATH": PATH, "LANG": "C.UTF-8", "SKYSAIL_HOST": wanted.host_id, "SKYSAIL_ADDRESS": place}
        try:
            await run_apart([*self._config.fence, wanted.host_id, place], env=told, timeout=self._config.fence_seconds)
        except ProcessFailed as failed:
            return failed.what
        return ""

    async def _answers(self, address: str) -> bool:
        """Whether it can be heard from here: the one that watches it may be another controller, with a cable of its own."""
        client = self._connect(address)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await client.facts()
        except Foreign:
            return True
        except (httpx.HTTPError, OSError, TimeoutError):
            return False
        finally:
            await client.close()
        return True

    def _due(self) -> list[Due]:
        with self._database.transaction(write=False) as connection:
            return outages.due(connection, self._clock.now())

    def _tries(self, wanted: Due, confirm: Confirm) -> bool:
        with self._database.transaction() as connection:
            confirm(connection)
            return outages.tries(connection, wanted, self._clock.now(), self._config.fence_seconds + ANSWER_SECONDS)

    def _settle(self, wanted: Due, confirm: Confirm, reason: str) -> None:
        """Note how it went; on the disk when this returns, before anybody acts on it."""
        with self._database.transaction() as connection:
            confirm(connection)
            if not reason:
                outages.fenced(connection, wanted.host_id, wanted.since, self._clock.now())
                return
            log.warning("host %s is not fenced: %s", wanted.host_id, reason)
            outages.fails(connection, wanted, reason, self._clock.now())
