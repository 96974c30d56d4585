"""The hosts of the cloud as their operator sees and handles them. Reads and writes rows; talks to no host."""

from __future__ import annotations

from typing import Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, func, not_, or_, select, true, update

from skysail.contract.facts import HostFacts
from skysail.hosts import admission, desired, outages, overlay
from skysail.hosts.outages import Outage
from skysail.kit.errors import SkysailError
from skysail.store.schema import (
    disks,
    domains,
    guests,
    host_zones,
    hosts,
    images,
    leaving_addresses,
    moves,
    remains,
    sample_cursors,
    snapshots,
    zone_reports,
)
from skysail.store.schema import outages as failures

# How many of the things that keep a host are named.
NAMED = 5

# ``expected``: it has not answered yet. ``away``: it does not any more. ``failed``: it has not for too long. ``fenced``: it
# is off for certain. ``refused``: it speaks too old or too new a contract.
State = Literal["expected", "ready", "away", "failed", "fenced", "refused"]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One host. ``since`` is when it fell silent, ``reason`` why it is refused, ``outage`` what is done about its failure.
    ``promised_mib`` is the memory of the guests that it holds, whether they run or not."""

    id: str
    address: str
    state: State
    cordoned: bool
    reason: str
    since: float | None
    zones: tuple[str, ...]
    seen_at: float | None
    generation: int
    observed_generation: int
    vcpus: int
    memory_mib: int
    disk_gib: int
    accelerator: str
    guests: int
    promised_vcpus: int
    promised_mib: int
    promised_gib: int
    snapshots: int
    images: tuple[str, ...]
    facts: HostFacts | None
    outage: Outage | None = None


def listed(connection: Connection) -> list[Host]:
    """Every host, by id."""
    zones: dict[str, list[str]] = {}
    for row in connection.execute(select(host_zones).order_by(host_zones.c.region, host_zones.c.zone)):
        zones.setdefault(row.host_id, []).append(row.region + row.zone)
    stocked: dict[str, list[str]] = {}
    for row in connection.execute(select(images.c.host_id, images.c.blueprint).order_by(images.c.blueprint)):
        stocked.setdefault(row.host_id, []).append(row.blueprint)
    promised = {row.host_id: row for row in connection.execute(
        select(guests.c.host_id, func.count().label("guests"), func.sum(guests.c.vcpus).label("vcpus"),
               func.sum(guests.c.memory_mib).label("mib"), func.sum(guests.c.disk_gib).label("gib"))
        .group_by(guests.c.host_id))}
    stored = {row[0]: row[1] for row in connection.execute(
        select(disks.c.host_id, func.sum(disks.c.size_gib)).group_by(disks.c.host_id))}
    copies = {row[0]: row[1] for row in connection.execute(
        select(snapshots.c.host_id, func.count()).group_by(snapshots.c.host_id))}

    failed = outages.seen(connection)

    def shape(row: RowMapping) -> Host:
        load = promised.get(row["id"])
        return Host(
            id=row["id"], address=row["address"], state=state(row, failed.get(row["id"])),
            outage=failed.get(row["id"]), cordoned=row["cordoned"], reason=row["refused"],
            since=row["away_since"], zones=tuple(zones.get(row["id"], ())), seen_at=row["seen_at"],
            generation=row["generation"], observed_generation=row["observed_generation"], vcpus=row["vcpus"],
            memory_mib=row["memory_mib"], disk_gib=row["disk_gib"], accelerator=row["accelerator"],
            guests=load.guests if load else 0, promised_vcpus=load.vcpus if load else 0,
            promised_mib=load.mib if load else 0, promised_gib=(load.gib if load else 0) + stored.get(row["id"], 0),
            snapshots=copies.get(row["id"], 0), images=tuple(stocked.get(row["id"], ())),
            facts=msgspec.convert(row["facts"], HostFacts | None))

    return [shape(row) for row in connection.execute(select(hosts).order_by(hosts.c.id)).mappings()]


def cordon(connection: Connection, host_id: str, cordoned: bool) -> None:
    """Give the host nothing new, or something again. What it holds stays as it is. Raises SkysailError."""
    if not connection.execute(update(hosts).where(hosts.c.id == host_id).values(cordoned=cordoned)).rowcount:
        raise _unknown(host_id)


def held(connection: Connection, host_id: str) -> list[str]:
    """In words, all that somebody owns on the host. Raises SkysailError when there is no such host."""
    if connection.execute(select(hosts.c.id).where(hosts.c.id == host_id)).first() is None:
        raise _unknown(host_id)
    # What only waits for the host to say that it is gone is nobody's, where the host never will say anything.
    over = outages.is_fenced(connection, host_id)
    owned = guests.c.role != "gone" if over else true()
    going = not_(_left(host_id)) if over else true()
    found = [f"instance {row.instance_name} ({row.observed_state or row.role})" for row in connection.execute(
        select(guests).where(guests.c.host_id == host_id, owned).order_by(guests.c.instance_name))]
    found += [f"instance {row.instance_name} on its way" for row in connection.execute(
        select(guests.c.instance_name).join(moves, moves.c.instance_id == guests.c.instance_id).where(
            or_(moves.c.source == host_id, moves.c.target == host_id), guests.c.host_id != host_id, going)
        .order_by(guests.c.instance_name))]
    found += [f"disk {row.name}" for row in connection.execute(
        select(disks.c.name).where(disks.c.host_id == host_id).order_by(disks.c.name))]
    copies = select(snapshots).where(snapshots.c.host_id == host_id).order_by(snapshots.c.name)
    found += [f"what is left of instance {row.instance_name}" for row in connection.execute(
        select(remains.c.instance_name).where(remains.c.host_id == host_id, remains.c.how == "snapshot",
                                              remains.c.unwanted.is_(False)).order_by(remains.c.instance_name))]
    return found + [f"snapshot {row.name or row.auto_day}" + (" (deleted, others stand on it)" if row.deleted else "")
                    for row in connection.execute(copies)]


def _left(host_id: str) -> ColumnElement[bool]:
    """Attempts to move a guest of which nothing but that host has anything left: to it, and failed; from it, and through."""
    return or_(and_(moves.c.phase == "failed", moves.c.target == host_id),
               and_(moves.c.phase == "clearing", moves.c.source == host_id))


def sees(connection: Connection, host_id: str, other_id: str) -> bool:
    """Whether a host has the disks of another one, too: it is that one, or both are in one pool."""
    if host_id == other_id:
        return True
    pools = set(connection.execute(select(hosts.c.pool).where(hosts.c.id.in_((host_id, other_id)))).scalars())
    return len(pools) == 1 and "" not in pools


def let_go(connection: Connection, host_id: str) -> None:
    """Disks that are attached to nothing, and snapshots, are other hosts' from here on where those have them, too: each is
    given to one of its zone, or its region, that answers and is not cordoned. Nothing of them moves."""
    others = connection.execute(select(hosts.c.id, host_zones.c.region, host_zones.c.zone)
                                .join(host_zones, host_zones.c.host_id == hosts.c.id)
                                .where(hosts.c.id != host_id, hosts.c.cordoned.is_(False), hosts.c.refused == "",
                                       hosts.c.away_since.is_(None), hosts.c.pool != "", hosts.c.pool.in_(
                                           select(hosts.c.pool).where(hosts.c.id == host_id)))
                                .order_by(hosts.c.id)).all()
    # What is being made, or is on its way out, is looked after to its end by who has begun.
    resting = {
        disks: (disks.c.role == "keep", disks.c.made.is_(True), disks.c.instance_id.is_(None), disks.c.attachment == ""),
        snapshots: (snapshots.c.role == "keep", snapshots.c.deleted.is_(False), snapshots.c.observed_state == "available")}
    for table, conditions in resting.items():
        for row in connection.execute(select(table).where(table.c.host_id == host_id, *conditions)).mappings().all():
            zone = row.get("zone")
            taker = next((one.id for one in others if one.region == row["region"] and zone in (None, one.zone)), None)
            if taker is not None:
                connection.execute(update(table).where(table.c.id == row["id"]).values(host_id=taker))
                desired.bump(connection, taker)
                desired.bump(connection, host_id)


def remove(connection: Connection, host_id: str) -> None:
    """The host is no part of the cloud any more: it is called no more. Raises SkysailError while it holds anything, and for
    the last one that answers for domains while there are any. Of one that is off for certain nobody waits any longer to hear
    that something is gone: should the machine come back, it starts nothing, since no controller calls it."""
    if left := held(connection, host_id):
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        raise SkysailError(f"host {host_id} still holds {', '.join(left[:NAMED])}{more}", "delete what is there first")
    others = connection.execute(select(func.count()).select_from(hosts).where(hosts.c.id != host_id, hosts.c.name_server))
    if not others.scalar_one() and connection.execute(select(domains.c.id)).first() is not None:
        raise SkysailError(f"host {host_id} is the only one that answers for the cloud's domains", "delete them first")
    for move in connection.execute(select(moves).where(_left(host_id))).mappings().all():
        desired.bump(connection, move["source"])
        connection.execute(delete(moves).where(moves.c.id == move["id"]))
    connection.execute(delete(guests).where(guests.c.host_id == host_id))
    for table in (host_zones, images, zone_reports, sample_cursors, failures, remains, leaving_addresses):
        connection.execute(delete(table).where(table.c.host_id == host_id))
    admission.forget_tokens(connection, host_id)
    connection.execute(delete(hosts).where(hosts.c.id == host_id))
    overlay.bump(connection)


def _unknown(host_id: str) -> SkysailError:
    return SkysailError(f"there is no host {host_id}", "see: sudo ./skysail host list")


def state(row: RowMapping, outage: Outage | None = None) -> State:
    """Whether the host of this row can be reckoned with."""
    if row["refused"]:
        return "refused"
    if row["seen_at"] is None:
        return "expected"
    if row["away_since"] is None:
        return "ready"
    return "away" if outage is None else "failed" if outage.fenced_at is None else "fenced"
