"""What a host measured of its guests: one sample per interval, numbered without gaps within one *ring*."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

# ``silent``: its process runs, and its agent, which has answered since the process was started, does not any more.
# ``down``: it ran, shall run, and has no process. ``off``: its owner has it off, or it is on its way: no failure.
Condition = Literal["up", "silent", "down", "off"]
# Numbers that can be reckoned with and kept: samples of many hosts are written together, and what one of them makes up must
# not undo what the others say.
Count = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)]
Amount = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class GuestSample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one guest did since its last sample: processor seconds over ``seconds`` of time (0: it had no process), bytes as
    it sees them. ``balance_seconds`` of ``capacity_seconds``: the processor seconds that it may burn above its baseline,
    after this sample; a capacity of 0 means that its plan has no baseline.
    ``tokenless``: how often it asked for its metadata without a token."""

    id: str
    condition: Condition
    seconds: Amount = 0.0
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1
    cpu_seconds: Amount = 0.0
    rx_bytes: Count = 0
    tx_bytes: Count = 0
    balance_seconds: Amount = 0.0
    capacity_seconds: Amount = 0.0
    tokenless: Count = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at every guest of a host. ``at``: when the interval began that it speaks of, in seconds since the epoch."""

    sequence: Count
    at: Moment
    guests: tuple[GuestSample, ...] = ()


class SamplePage(msgspec.Struct, frozen=True, kw_only=True):
    """Samples behind the one that was asked for, oldest first. A ``ring`` is one numbering: a host that lost its disk begins
    another one."""

    ring: Annotated[str, msgspec.Meta(max_length=32)]
    samples: tuple[Sample, ...] = ()
