"""The door to the name server of one host: the zones that it answers for. Engines: PowerDNS, and a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from skysail.contract.document import Zone
from skysail.contract.report import HeldZone
from skysail.kit.errors import SkysailError


class NameServerAway(SkysailError):
    """The name server cannot be asked at all: what fails with one zone would fail with each."""


class Zones(Protocol):
    """Holds zones. Every method raises :class:`NameServerAway`, or SkysailError when the name server refuses."""

    async def apply(self, zone: Zone, believing: bool = False) -> HeldZone:
        """Make the zone answer exactly what ``zone`` says, and say what is held then. All record sets that differ change
        together, with the serial, or none does; what is as it should be is not written. Idempotent. ``believing``: a zone
        that has the serial with which it was left is taken to be as it was left: a change costs what it changes."""
        ...

    async def remove(self, name: str) -> None:
        """Answer for the zone no more, and forget its records and keys; absent is fine."""
        ...

    async def serials(self) -> Mapping[str, int]:
        """The zones that are held, by absolute name, with the serials of their SOA records; a cheap look without effects."""
        ...

    async def observe(self) -> list[HeldZone]:
        """All that is held, sorted by name; no effects."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure."""
        ...


def next_serial(zone: Zone, held: int, differs: bool) -> int:
    """The serial that the zone gets where one with the serial ``held`` is: it grows with every change of the record sets."""
    return max(zone.serial, held + 1 if differs else held)
