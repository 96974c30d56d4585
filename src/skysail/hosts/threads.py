"""The threads in which rows are read and written for hosts.

They are few, and no others: when thousands of hosts report at once, their reports wait for each other here, while requests,
documents, and whatever else the controller does, go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """So many of them, called so."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call`` in one of them, once one is free."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(call, *args, **kwargs))


# Python runs only one of all at a time; but those that wait for the disk share its sync. Samples can wait, and of thousands
# of hosts there are always some: one thread's turn among all that write is theirs.
REPORTS, DOCUMENTS, SAMPLES = Threads(4, "reports"), Threads(2, "documents"), Threads(1, "samples")
