"""Python's collector of cyclic garbage in a process that lives long and holds much.

A full collection looks at every object that there is. That stops all threads for a second where a controller watches a
thousand hosts, again and again, for objects that stay anyway.

Source: Python documentation, module gc (freeze, callbacks, set_threshold).
"""

from __future__ import annotations

import gc
import time
from typing import Any

# A collection that takes more of a processor than this looked at more than it should.
LONG_SECONDS = 0.02
# New objects until the youngest are looked at, and how often those are before the next older ones: requests make thousands.
THRESHOLDS = (10_000, 10, 10)


def settle() -> None:
    """What is there now, and later what outlived a full collection that took long, is not looked at again: it goes when
    nothing refers to it. Only a circle that there was at such a moment, and that is let go of later, stays for good: each
    time, of some hundred thousand objects, the tasks and connections that were under way."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.callbacks.append(_Watch())


class _Watch:
    def __init__(self) -> None:
        self._began = 0.0

    def __call__(self, phase: str, about: dict[str, Any]) -> None:
        if about["generation"] < 2:
            return
        if phase == "start":
            self._began = time.thread_time()
        elif time.thread_time() - self._began > LONG_SECONDS:
            gc.freeze()
