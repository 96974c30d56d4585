"""Regions and their availability zones: GetRegions, where a zone is, and which host serves it.

Source: Lightsail API reference, data type Region. What is in a region is known only there: names, key pairs, networks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, inspect, select

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError, invalid_input
from skysail.resources.names import GLOBAL
from skysail.resources.request import Request
from skysail.store.schema import contact_methods, disks, host_zones, instances, names, networks

# By the first part of a region's name.
CONTINENTS = {"us": "NA", "ca": "NA", "sa": "SA", "eu": "EU", "ap": "AS"}
# How many of the things that keep a region in the configuration are named.
NAMED = 5


class Regions:
    """The catalogue of regions."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetRegions": self.list}

    def list(self, connection: Connection, request: Request) -> dict[str, Any]:
        zoned = request.params.get("includeAvailabilityZones")
        return {"regions": [{
            "name": name, "displayName": f"Skysail {name}", "description": "This region runs on your own machines.",
            "continentCode": CONTINENTS[name.partition("-")[0]],
            "availabilityZones": [{"zoneName": name + letter, "state": "available"} for letter in letters] if zoned else [],
            "relationalDatabaseAvailabilityZones": [],
        } for name, letters in self._config.regions.items()]}


def zone(config: Config, request: Request, name: str) -> str:
    """The letter of the availability zone ``name`` of the caller's region; raises InvalidInputException."""
    letters = config.regions[request.region]
    there = ", ".join(request.region + letter for letter in letters)
    for region, others in config.regions.items():
        if name in {region + letter for letter in others}:
            if region == request.region:
                return name.removeprefix(region)
            raise invalid_input(f"The availability zone {name} is in the region {region}; this request is for "
                                f"{request.region}.", f"Zones of {request.region}: {there}")
    raise invalid_input(f"The availability zone {name[:60]} does not exist here.", f"Zones of {request.region}: {there}")


def zones_of(connection: Connection, among: Collection[str] | None = None) -> dict[str, frozenset[str]]:
    """The names of the zones that each host, or each of those ``among``, serves."""
    found: dict[str, set[str]] = {}
    query = select(host_zones)
    if among is not None:
        query = query.where(host_zones.c.host_id.in_(among))
    for row in connection.execute(query):
        found.setdefault(row.host_id, set()).add(row.region + row.zone)
    return {host: frozenset(names) for host, names in found.items()}


def serves(host_id: ColumnElement[str], region: str) -> ColumnElement[bool]:
    """Whether the host of a row serves a zone of the region."""
    return select(host_zones.c.host_id).where(host_zones.c.host_id == host_id, host_zones.c.region == region).exists()


def places(connection: Connection, host_id: str) -> set[tuple[str, str]]:
    """Region and letter of each zone that the host serves."""
    return {(row.region, row.zone) for row in connection.execute(select(host_zones).where(host_zones.c.host_id == host_id))}


def in_zone(name: str) -> ColumnElement[bool]:
    """Which rows of ``host_zones`` are of the availability zone called so: a region and a letter."""
    return and_(host_zones.c.region == name[:-1], host_zones.c.zone == name[-1:])


def serve(connection: Connection, host_id: str, regions: Mapping[str, Sequence[str]]) -> None:
    """The host serves exactly these zones from now on. Raises SkysailError while rows hold something elsewhere."""
    refuse_abandoning(connection, regions)
    wanted = {(region, letter) for region, letters in regions.items() for letter in letters}
    held = places(connection, host_id)
    for region, letter in held - wanted:
        connection.execute(delete(host_zones).where(host_zones.c.host_id == host_id, host_zones.c.region == region,
                                                    host_zones.c.zone == letter))
    for region, letter in sorted(wanted - held):
        connection.execute(insert(host_zones).values(host_id=host_id, region=region, zone=letter))


def refuse_abandoning(connection: Connection, regions: Mapping[str, Sequence[str]]) -> None:
    """Raises SkysailError when a region or zone that is not among ``regions`` still holds what is somebody's. Reads databases
    of older schemas too."""
    known = set(inspect(connection).get_table_names())
    held: dict[str, list[str]] = {}
    if names.name in known:
        for row in connection.execute(select(names).where(names.c.region.not_in((*regions, GLOBAL)))):
            held.setdefault(f"the region {row.region}", []).append(f"{row.resource_type} {row.name}")
    if contact_methods.name in known:
        for row in connection.execute(select(contact_methods).where(contact_methods.c.region.not_in(regions))):
            held.setdefault(f"the region {row.region}", []).append(f"contact method {row.protocol}")
    if networks.name in known:
        for row in connection.execute(select(networks).where(networks.c.region.not_in(regions), networks.c.peered)):
            held.setdefault(f"the region {row.region}", []).append(f"peered network vpc-{row.number}")
    for table in (instances, disks):
        if table.name not in known:
            continue
        for row in connection.execute(select(table.c.region, table.c.zone, table.c.name)):
            if row.zone not in regions.get(row.region, (row.zone,)):
                held.setdefault(f"the zone {row.region}{row.zone}", []).append(row.name)
    for place, found in sorted(held.items()):
        told = ", ".join(sorted(found)[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        raise SkysailError(f"{place} cannot leave the configuration, for it holds {told}",
                           "put it back into skysail.toml, or delete what is there first")
