"""Turns: how many questions to hosts begin at a time.

A controller that starts has something to ask of all hosts at once. Thousands of questions that are under way together all
take longer than any of them may, and are asked again, all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

# A host that does not answer keeps nobody from asking the others: after this it is waited for without a turn.
TURN_SECONDS = 1.0


class Turns:
    """So many at a time, in the order in which they come."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Begins when one is free, which it is again at the end of the context, or after TURN_SECONDS."""
        await self._free.acquire()
        held = True

        def give() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(TURN_SECONDS, give)
        try:
            yield
        finally:
            timer.cancel()
            give()
