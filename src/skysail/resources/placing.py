"""The hosts as a placement sees them: what each has, what of it is promised, and what keeps it from taking more."""

from __future__ import annotations

import random
from collections.abc import Collection
from operator import itemgetter
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, and_, case, func, or_, select, true

from skysail.contract.facts import HostFacts
from skysail.hosts import placement
from skysail.hosts.placement import Candidate, Need, NoHost
from skysail.kit.config import Config
from skysail.resources import attachments, regions
from skysail.store.schema import guests, host_zones, hosts, images, moves, outages

_READ = (hosts.c.id, hosts.c.pool, hosts.c.vcpus, hosts.c.memory_mib, hosts.c.disk_gib, hosts.c.accelerator, hosts.c.cordoned,
         hosts.c.refused, hosts.c.away_since)


# Of a zone with more hosts, so many are looked at for each guest, others each time: the best of them is hardly worse than the
# best of all, and what it takes to find it does not grow with the zone. Source: A. Verma et al., "Large-scale cluster
# management at Google with Borg" (EuroSys 2015), 3.4, relaxed randomization.
LOOKED_AT = 32


def choose(connection: Connection, config: Config, account_id: str, now: float, need: Need, count: int = 1,
           host: str = "") -> list[str]:
    """The ids of the hosts that take ``count`` new guests of the account which all need the same: ``host``, where that is
    told. Raises NoHost."""
    among = [host] if host else _some(connection, need.zone)
    if among is not None:
        try:
            return placement.choose_several(candidates(connection, config, account_id, now, among=among), need, count)
        except NoHost:
            if host:
                raise
    return placement.choose_several(candidates(connection, config, account_id, now), need, count)


def _some(connection: Connection, zone: str) -> list[str] | None:
    """Neighbours in the order of ids, from a host of the zone on that is chosen by chance; None where all are to be looked
    at."""
    of_zone = regions.in_zone(zone)
    count = connection.execute(select(func.count()).select_from(host_zones).where(of_zone)).scalar_one()
    if count <= LOOKED_AT:
        return None
    ids = select(host_zones.c.host_id).where(of_zone).order_by(host_zones.c.host_id).limit(LOOKED_AT)
    first = random.randrange(count)
    found = connection.execute(ids.offset(first)).scalars().all()
    return [*found, *connection.execute(ids.limit(LOOKED_AT - len(found))).scalars()]


def candidates(connection: Connection, config: Config, account_id: str, now: float, without: Collection[str] = (),
               bound: bool = False, among: Collection[str] | None = None) -> list[Candidate]:
    """Every host, or those ``among``, for a guest of this account; as if the guests ``without`` were nowhere. With ``bound``
    also what a guest that runs is bound to, which each launch need not read of each host."""
    def there(host_id: ColumnElement[str]) -> ColumnElement[bool]:
        return true() if among is None else host_id.in_(among)

    owners = case((and_(guests.c.account_id == account_id, guests.c.role != "gone"), 1), else_=0)
    promised = {row.host_id: (row.vcpus, row.mib, row.gib, row.owned) for row in connection.execute(
        select(guests.c.host_id, func.sum(guests.c.vcpus).label("vcpus"), func.sum(guests.c.memory_mib).label("mib"),
               func.sum(guests.c.disk_gib).label("gib"), func.sum(owners).label("owned"))
        .where(guests.c.id.not_in(without), there(guests.c.host_id)).group_by(guests.c.host_id))}
    # A guest that moves takes its room at both ends, until nothing of it is left at one of them.
    moving = (select(moves.c.source, moves.c.target, guests.c.host_id, guests.c.vcpus, guests.c.memory_mib, guests.c.disk_gib)
              .join(guests, guests.c.instance_id == moves.c.instance_id)
              .where(or_(there(moves.c.source), there(moves.c.target))))
    for move in connection.execute(moving):
        other = move.source if move.host_id == move.target else move.target
        vcpus, mib, gib, owned = promised.get(other, (0, 0, 0, 0))
        promised[other] = (vcpus + move.vcpus, mib + move.memory_mib, gib + move.disk_gib, owned)
    failed = set(connection.execute(select(outages.c.host_id)).scalars())
    stored, served = attachments.promised_gib(connection, among), regions.zones_of(connection, among)
    held: dict[str, dict[str, int]] = {}
    for row in connection.execute(select(images.c.host_id, images.c.blueprint, images.c.size_gib)
                                  .where(there(images.c.host_id)).order_by(images.c.version)):
        held.setdefault(row.host_id, {})[row.blueprint] = row.size_gib

    def candidate(row: RowMapping) -> Candidate:
        vcpus, mib, gib, owned = promised.get(row["id"], (0, 0, 0, 0))
        gib = pooled[row["pool"]] if row["pool"] else gib + stored.get(row["id"], 0)
        facts = msgspec.convert(row["facts"], HostFacts | None) if bound else None
        return Candidate(
            id=row["id"], zones=served.get(row["id"], frozenset()), vcpus=row["vcpus"],
            promisable_vcpus=round(row["vcpus"] * config.cpu_overcommit), memory_mib=row["memory_mib"],
            disk_gib=round(row["disk_gib"] * config.disk_overcommit), promised_vcpus=vcpus,
            promised_mib=mib, promised_gib=gib, pool=row["pool"],
            images=held.get(row["id"], {}), of_owner=owned, cordoned=row["cordoned"],
            refused=row["refused"] or ("it has failed" if row["id"] in failed else ""),
            silent_seconds=now - row["away_since"] if row["away_since"] else 0.0,
            accelerator=row["accelerator"], cpu_models=frozenset(facts.cpu_models if facts else ()),
            machine_types=frozenset(facts.machine_types if facts else ()))

    read = select(*_READ, hosts.c.facts) if bound else select(*_READ)
    rows = connection.execute(read.where(there(hosts.c.id)).order_by(hosts.c.id)).mappings().all()
    pooled = {pool: attachments.pooled_gib(connection, pool, without) for pool in {row["pool"] for row in rows} - {""}}
    return [candidate(row) for row in rows]


def image(connection: Connection, host_id: str, blueprint: str) -> dict[str, Any]:
    """What the host makes guests of a blueprint of, which it holds. Each host has built its own image of it, or was given
    one."""
    # By the host's few images alone: SQLite would find all hosts' images of the blueprint in their order, and read them.
    held = connection.execute(select(images).where(images.c.host_id == host_id).order_by(images.c.digest)).mappings()
    return dict(max((row for row in held if row["blueprint"] == blueprint), key=itemgetter("version"), default={}))
