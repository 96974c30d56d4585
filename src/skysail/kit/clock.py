"""Time as a door: the real clock, and one that tests drive by hand."""

from __future__ import annotations

import logging
import time
from typing import Protocol

log = logging.getLogger(__name__)
LEFT_ALONE_SECONDS = 0.5


class Clock(Protocol):
    """Source of the current time."""

    def now(self) -> float:
        """Seconds since the epoch (UTC)."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()


class SharedClock:
    """The clock that several machines have in common: this machine's, put right by what was read there last. Small
    differences are left alone, so that it does not go back for them."""

    def __init__(self) -> None:
        self._off = 0.0

    def now(self) -> float:
        return time.time() + self._off

    def agree(self, now: float) -> None:
        """It was ``now`` there, just now."""
        off = now - time.time()
        if abs(off - self._off) > LEFT_ALONE_SECONDS:
            log.warning("this machine's clock is %.1f s away from the database's, which counts", -off)
            self._off = off


class HandClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the time forward by ``seconds``."""
        self._now += seconds
