"""Block storage as instances see it: what is attached, what a deletion lets go, what a snapshot under way forbids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, bindparam, func, or_, select, true, update

from skysail.kit.config import Config
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.resources import add_ons, tags
from skysail.resources.request import Request
from skysail.store.schema import disks, guests, hosts, instances, snapshots

IOPS = 100

# Made once: whatever is shown of an instance comes by.
_ATTACHED = select(disks).where(disks.c.instance_id.in_(bindparam("of_instances", expanding=True))).order_by(disks.c.path)


def of(connection: Connection, instance_ids: Sequence[str], now: float) -> dict[str, list[dict[str, Any]]]:
    """The disks attached to each instance, in API shape, by path."""
    rows = connection.execute(_ATTACHED, {"of_instances": instance_ids}).mappings().all()
    found: dict[str, list[dict[str, Any]]] = {}
    for row, shape in zip(rows, shapes(connection, rows, now), strict=True):
        found.setdefault(row["instance_id"], []).append(shape)
    return found


def promised_gib(connection: Connection, among: Collection[str] | None = None) -> dict[str, int]:
    """What block storage takes of each host, or of those ``among``, were it full."""
    taken = select(disks.c.host_id, func.sum(disks.c.size_gib)).group_by(disks.c.host_id)
    if among is not None:
        taken = taken.where(disks.c.host_id.in_(among))
    return {row[0]: row[1] for row in connection.execute(taken)}


def pooled_gib(connection: Connection, pool: str, without: Collection[str] = ()) -> int:
    """What the hosts of a pool promise of it: a disk is in it once, wherever its guest is. As if the guests ``without`` had
    none."""
    seeing = select(hosts.c.id).where(hosts.c.pool == pool)
    return sum(connection.execute(select(func.sum(size)).where(table.c.host_id.in_(seeing), counted)).scalar_one() or 0
               for table, size, counted in ((guests, guests.c.disk_gib, guests.c.id.not_in(without)),
                                            (disks, disks.c.size_gib, true())))


def refuse_beyond_room(config: Config, connection: Connection, host_id: str, size_gib: int) -> None:
    """Raises InvalidInputException when the host cannot promise that much disk more."""
    held, pool = connection.execute(select(hosts.c.disk_gib, hosts.c.pool).where(hosts.c.id == host_id)).one()
    taken = pooled_gib(connection, pool) if pool else promised_gib(connection, [host_id]).get(host_id, 0) + (
        connection.execute(select(func.sum(guests.c.disk_gib)).where(guests.c.host_id == host_id)).scalar_one() or 0)
    left = max(round(held * config.disk_overcommit) - taken, 0)
    if size_gib > left:
        raise invalid_input(f"A disk of {size_gib} GB does not fit this cloud now: its host may promise {left} GB more.",
                            "Choose a smaller disk, or delete others.")


def shapes(connection: Connection, rows: Sequence[RowMapping], now: float) -> list[dict[str, Any]]:
    """Disks as the API shows them."""
    if not rows:  # as with most instances: nothing is asked
        return []
    identifiers = [row["id"] for row in rows]
    tagged, added = tags.of(connection, identifiers), add_ons.shapes(connection, identifiers, now)
    owners = {row.id: row.name for row in connection.execute(select(instances.c.id, instances.c.name).where(
        instances.c.id.in_([row["instance_id"] for row in rows])))}
    mounts = {row.instance_id: row.observed_mounts for row in connection.execute(
        select(guests.c.instance_id, guests.c.observed_mounts).where(guests.c.instance_id.in_(owners)))}
    return [{
        "name": row["name"], "arn": arn(row, "Disk"), "supportCode": f"{row['account_id']}/{row['id']}",
        "createdAt": row["created_at"],
        "location": {"availabilityZone": row["region"] + row["zone"], "regionName": row["region"]},
        "resourceType": "Disk", "tags": tagged.get(row["id"], []), "addOns": added.get(row["id"], []),
        "sizeInGb": row["size_gib"], "isSystemDisk": False, "iops": IOPS, "path": row["path"] or None, "state": row["state"],
        "attachedTo": owners.get(row["instance_id"]), "isAttached": row["instance_id"] is not None,
        "attachmentState": row["attachment"] or "detached",
        "autoMountStatus": _mounted(row, mounts),
    } for row in rows]


def _mounted(row: RowMapping, mounts: Mapping[str, Mapping[str, str]]) -> str | None:
    """Lightsail's autoMountStatus; None for a disk of no instance."""
    if row["instance_id"] is None:
        return None
    return mounts.get(row["instance_id"], {}).get(row["id"], "Pending") if row["auto_mount"] else "NotMounted"


def arn(row: RowMapping, kind: str) -> str:
    """The resource's Amazon-style name."""
    return f"arn:aws:lightsail:{row['region']}:{row['account_id']}:{kind}/{row['id']}"


def being_copied(leaving: str = "") -> Select[tuple[str, Any]]:
    """Name and volumes of each snapshot that is being made of somebody's disks. The automatic ones of ``leaving``, an
    instance or a disk, are not among them: they go with it."""
    return select(snapshots.c.name, snapshots.c.volumes).where(
        snapshots.c.state == "pending", snapshots.c.deleted.is_(False), snapshots.c.duplicates == "",
        snapshots.c.arrived.is_(False), or_(snapshots.c.auto_day == "", snapshots.c.source_id != leaving))


def refuse_while_copied(connection: Connection, guest_id: str, what: str, leaving: str = "") -> None:
    """Raises InvalidInputException while a snapshot of the guest's disks is being made; ``leaving`` as in
    :func:`being_copied`."""
    found = connection.execute(being_copied(leaving).where(snapshots.c.guest_id == guest_id)).first()
    if found is not None:
        raise invalid_input(f"You can't {what} right now: the snapshot {found.name} is being made of it.",
                            "Wait for the snapshot, or delete it.")


def detach_all(connection: Connection, request: Request, instance_id: str, guest_id: str,
               now: float) -> list[dict[str, Any]]:
    """An instance that is deleted lets its disks go; each can be attached elsewhere once its operation is through."""
    made = []
    for row in connection.execute(select(disks).where(disks.c.instance_id == instance_id)).mappings().all():
        connection.execute(update(disks).where(disks.c.id == row["id"]).values(
            instance_id=None, path="", attachment="detaching"))
        made.append(history.record(
            connection, request, now=now, type="DetachDisk", resource_name=row["name"], resource_type="Disk",
            resource_id=row["id"], zone=row["zone"], status="Started", workflow="detach disk",
            arguments={"disk": row["id"], "guest": guest_id}))
    return made
