"""Turns: how many questions to hosts begin at a time.

A controller that starts has something to ask of all hosts at once. Thousands of questions that are under way together all
take longer than any of them may, and are asked again, all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

# A host that does not answer keeps nobody from asking the others: after this it is waited for without a turn.
TURN_SECONDS = 1.0


class Turns:
    """So many at a time, in the order in which they come; but those that go on with what was begun come before others. A
    controller that meets thousands of hosts has done all there is to do for the first of them when it asks the last."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._going_on: deque[asyncio.Future[None]] = deque()
        self._beginning: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, goes_on: bool = False) -> AsyncIterator[None]:
        """Begins when one is free, which it is again at the end of the context, or after TURN_SECONDS."""
        await self._take(self._going_on if goes_on else self._beginning)
        held = True

        def give() -> None:
            nonlocal held
            if held:
                held = False
                self._give()

        timer = asyncio.get_running_loop().call_later(TURN_SECONDS, give)
        try:
            yield
        finally:
            timer.cancel()
            give()

    async def _take(self, queue: deque[asyncio.Future[None]]) -> None:
        if self._free:  # and nobody waits
            self._free -= 1
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(given)
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():  # it was ours already
                self._give()
            raise

    def _give(self) -> None:
        for queue in (self._going_on, self._beginning):
            while queue:
                given = queue.popleft()
                if not given.done():  # else nobody waits for it any more
                    given.set_result(None)
                    return
        self._free += 1
