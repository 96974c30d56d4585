"""A document as it travels: large zones as outlines, with those of their parts that the agent does not have.

A record set is in the part that its name's checksum says, so a change of a zone with ten thousand of them makes one part of a
hundred or so new, and the rest is neither sent nor written again.
"""

from __future__ import annotations

import zlib
from collections.abc import Container
from typing import NamedTuple

import msgspec

from skysail.contract.document import Delivery, HostDocument, RecordSet, Zone, ZoneOutline, part_digest

# A zone of fewer record sets is said as a whole; of more, in so many parts that each has this many to twice as many of them.
PART_SETS = 64


class _Parted(NamedTuple):
    zone: Zone
    outline: ZoneOutline
    parts: dict[str, msgspec.Raw]


class Parting:
    """Takes documents of one host apart, and keeps the parts of zones that do not change."""

    def __init__(self) -> None:
        self._parted: dict[str, _Parted] = {}

    def delivery(self, document: HostDocument, held: Container[str] = ()) -> Delivery:
        """The document, with all parts of its zones but those that are ``held``."""
        former, self._parted = self._parted, {}
        whole = []
        for zone in document.zones:
            if zone.role == "gone" or len(zone.record_sets) < PART_SETS:
                whole.append(zone)
                continue
            parted = former.get(zone.id)
            self._parted[zone.id] = parted if parted is not None and parted.zone is zone else _part(zone)
        return Delivery(
            document=msgspec.structs.replace(document, zones=tuple(whole),
                                             outlines=tuple(parted.outline for parted in self._parted.values())),
            parts={digest: part for parted in self._parted.values() for digest, part in parted.parts.items()
                   if digest not in held})

    def digests(self) -> frozenset[str]:
        """The parts of the last document."""
        return frozenset(digest for parted in self._parted.values() for digest in parted.parts)


def _part(zone: Zone) -> _Parted:
    count = 1 << (len(zone.record_sets) // PART_SETS).bit_length() - 1
    sets: list[list[RecordSet]] = [[] for _ in range(count)]
    for one in zone.record_sets:
        sets[zlib.crc32(one.name.encode()) % count].append(one)
    encoded = [msgspec.json.encode(part) for part in sets]
    digests = tuple(map(part_digest, encoded))
    return _Parted(zone, ZoneOutline(id=zone.id, name=zone.name, serial=zone.serial, primary=zone.primary,
                                     hostmaster=zone.hostmaster, signing_key=zone.signing_key, parts=digests),
                   dict(zip(digests, map(msgspec.Raw, encoded), strict=True)))
