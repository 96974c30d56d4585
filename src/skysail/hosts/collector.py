"""The collector: asks a host for its samples, and hands each on to be written exactly once."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import zlib
from collections.abc import Callable

import httpx

from skysail.hosts.client import AgentClient
from skysail.hosts.intake import Intake
from skysail.store.leases import Confirm, LeaseLost, alone

log = logging.getLogger(__name__)
# For how long after a sample was taken hosts are asked for it, however few there are, and how soon one is asked again that
# did not have it.
SPREAD_SECONDS, LATE_SECONDS = 10.0, 5.0
# All have been asked before the next samples are taken, with time left for some to be late.
OF_INTERVAL = 0.8
# So long it takes, on average, until the next host is asked. Where there are so many that an interval is too short for all,
# each is asked for the samples of several at once: what a host costs, it costs once then.
HOST_SECONDS = 0.02


class Collector:
    """Follows the samples of ``host_id``, which takes one every ``interval_seconds``; ``intake`` writes them; ``count``
    says how many hosts there are, ``confirm`` that it is still this controller that does so."""

    def __init__(self, host_id: str, client: AgentClient, intake: Intake, interval_seconds: float,
                 count: Callable[[], int] = lambda: 1, confirm: Confirm = alone) -> None:
        self._host_id = host_id
        self._client = client
        self._intake = intake
        self._interval = interval_seconds
        self._count = count
        self._confirm = confirm
        # Up to where samples were taken in, once that was read or written: it is nobody else's to move on. When the last of
        # them began.
        self._taken: tuple[str, int] | None = None
        self._newest = 0.0

    async def run(self) -> None:
        """Collect until cancelled: soon after a sample is taken, which all hosts do at about the same time, from one somewhat
        later than from another."""
        place = zlib.crc32(self._host_id.encode()) / 2**32
        pause = place * within(self._interval, self._count())
        while True:
            await asyncio.sleep(pause)
            late = True
            try:
                while await self.collect():
                    late = False
                    if time.time() < self._newest + 2 * self._interval:
                        break  # the next one is not taken yet
            except LeaseLost as lost:
                log.info("%s", lost)
            except (httpx.HTTPError, OSError) as unreachable:
                log.info("samples of host %s: %s", self._host_id, str(unreachable) or type(unreachable).__name__)
            except Exception:
                log.exception("samples of host %s could not be taken in; they are asked for again", self._host_id)
            every = rhythm(self._interval, self._count())
            since = (time.time() - place * within(self._interval, self._count())) % every
            pause = min(LATE_SECONDS, every) if late and since < 3 * LATE_SECONDS else every - since

    async def collect(self) -> bool:
        """Take in one page; whether there was anything on it."""
        if self._taken is None:
            self._taken = await self._intake.cursor(self._host_id)
        page = await self._client.samples(*self._taken)
        if not page.samples:
            return False
        self._taken = None  # until it is written
        fresh = await self._intake.take(self._host_id, page, self._confirm)
        self._taken, self._newest = (page.ring, page.samples[-1].sequence), page.samples[-1].at
        return fresh > 0


def rhythm(interval: float, count: int) -> float:
    """Every how many seconds each of ``count`` hosts is asked for its samples, of which it takes one each ``interval``."""
    return interval * max(1, math.ceil(count * HOST_SECONDS / interval))


def within(interval: float, count: int) -> float:
    """Seconds, after a sample was taken, in which all of them are asked."""
    every = rhythm(interval, count)
    return min(max(SPREAD_SECONDS, min(HOST_SECONDS * count, OF_INTERVAL * every)), every)


def delay(interval: float, count: int) -> float:
    """How many seconds after it was taken a sample of one of them is asked for at the latest."""
    every = rhythm(interval, count)
    return every if every > interval else within(interval, count)
