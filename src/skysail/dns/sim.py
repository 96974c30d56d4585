"""Zones in memory, which nobody can ask for."""

from __future__ import annotations

from collections.abc import Mapping

from skysail.contract.document import Zone
from skysail.contract.report import HeldZone
from skysail.dns import next_serial

SIMULATED = ("simulated",)


class SimZones:
    """Remembers which zones there are. A signed one has a delegation signer record in name only."""

    def __init__(self) -> None:
        self._zones: dict[str, HeldZone] = {}

    async def apply(self, zone: Zone, believing: bool = False) -> HeldZone:
        held = self._zones.get(zone.name)
        sets = tuple(sorted(zone.record_sets, key=lambda found: (found.name, found.type)))
        serial = zone.serial if held is None else next_serial(zone, held.serial, held.record_sets != sets)
        made = HeldZone(name=zone.name, serial=serial, record_sets=sets, ds=SIMULATED if zone.signing_key else ())
        self._zones[zone.name] = made
        return made

    async def remove(self, name: str) -> None:
        self._zones.pop(name, None)

    async def serials(self) -> Mapping[str, int]:
        return {zone.name: zone.serial for zone in self._zones.values()}

    async def observe(self) -> list[HeldZone]:
        return [self._zones[name] for name in sorted(self._zones)]

    async def check(self) -> list[str]:
        return []
