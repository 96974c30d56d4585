"""Whether guests move from one version of QEMU to another with all that they have: what was tried, and what was seen."""

from __future__ import annotations

from typing import Literal

import msgspec

Way = Literal["paused", "live", "described"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One guest of a ``shape`` and in a ``condition`` that went over, ``paused`` or ``live``; or what both versions say of
    their devices themselves (``described``). ``differences`` are what was not as before, in words: there are none where all
    is well. ``notes`` may matter to guests that this one is none of."""

    shape: str
    condition: str
    way: Way
    seconds: float = 0.0
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Qualification(msgspec.Struct, frozen=True, kw_only=True):
    """All trials of one direction, for guests of one machine type under one accelerator. ``sender`` and ``receiver`` are
    versions as in :class:`skysail.contract.facts.HostFacts`, ``kernel`` that of the machine that they were tried on, ``at``
    when that was, in seconds since the epoch. ``quick``: not all that could be tried was."""

    sender: str
    receiver: str
    machine: str
    accelerator: str
    kernel: str
    at: float
    quick: bool
    trials: tuple[Trial, ...]

    @property
    def good(self) -> bool:
        return bool(self.trials) and not any(one.differences for one in self.trials)
