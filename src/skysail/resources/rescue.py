"""What becomes of instances whose host has failed: they are shown as such, and as the configuration says go on elsewhere.

Nothing goes on before the host is off for certain (:mod:`skysail.hosts.outages`). Then each instance is one transaction: its
guest's row goes to another host, a row of what is left of it stays (:mod:`skysail.hosts.remains`), and both hosts are told.
Since whoever hears a host again writes so before that host is sent anything, and this is looked at in the same transaction, a
host that is back is either told that the instance went on, or nothing of that ever happened.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, RowMapping, insert, or_, select, update

from skysail.contract.document import Origin
from skysail.hosts import desired, outages, placement, roster
from skysail.hosts.placement import Need
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import metering, placing
from skysail.resources.placing import LOOKED_AT
from skysail.store.schema import disks, guests, hosts, instances, meters, moves, operations, remains, snapshots
from skysail.store.schema import outages as failures

log = logging.getLogger(__name__)
# So many instances go on with each commit. Where none could, it is a while until they are looked at again.
PORTION, VAIN_SECONDS = 10, 10.0


class Prospect(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one instance, whose guest is ``guest``: it goes on with its disks, which are in a ``pool``, or anew
    from a ``snapshot``, on the host ``target``; or it ``waits`` for its host, and ``why`` says what for."""

    instance: str
    guest: str
    how: Literal["pool", "snapshot", "waits"] = "waits"
    target: str = ""
    snapshot: str = ""
    why: str = ""


class Remnant(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of an instance at a host that failed. ``disks`` are volumes that are kept there."""

    host: str
    instance: str
    guest: str
    how: str
    went_to: str
    left_at: float
    snapshot: str
    snapshot_at: float | None
    disks: tuple[str, ...]
    unwanted: bool


def follow(connection: Connection, config: Config, now: float, began: float) -> int:
    """Note outages, and what their instances go through; have those go on that can. How much changed."""
    changed = outages.follow(connection, config, now, began)
    for row in connection.execute(select(failures)).mappings().all():
        _measure(connection, row, now)
        if config.on_host_failure == "wait" or row["fenced_at"] is None or now < row["vain_at"] + VAIN_SECONDS:
            continue
        failed = _failed(connection, row["host_id"])
        if not failed.fenced:
            continue
        done = _rescue(connection, config, failed, now)
        # What is attached to nothing is another host's, too, where it is in a pool.
        roster.let_go(connection, row["host_id"])
        if not done:
            connection.execute(update(failures).where(failures.c.host_id == row["host_id"]).values(vain_at=now))
        changed += done
    return changed


def prospects(connection: Connection, config: Config, host_id: str, now: float) -> list[Prospect]:
    """What becomes of each instance of a host that has failed, were it decided now."""
    failed = _failed(connection, host_id)
    return [_prospect(connection, config, failed, guest, now) for guest in failed.guests]


def left(connection: Connection, host_id: str = "") -> list[Remnant]:
    """What is left of instances at hosts that failed; at one of them."""
    found = select(remains).order_by(remains.c.host_id, remains.c.instance_name, remains.c.left_at)
    if host_id:
        found = found.where(remains.c.host_id == host_id)
    plain = ("how", "went_to", "left_at", "snapshot", "snapshot_at", "unwanted")
    return [Remnant(host=row["host_id"], instance=row["instance_name"], guest=row["id"],
                    disks=() if row["how"] == "pool" else (row["id"], *(one for one, _ in row["disks"])),
                    **{name: row[name] for name in plain}) for row in connection.execute(found).mappings()]


def discard(connection: Connection, host_id: str, instance: str) -> int:
    """Have the disks thrown away that are left of an instance, by its name or its guest's id, at a host that failed; of how
    many guests. Raises SkysailError where there are none."""
    here = (remains.c.host_id == host_id, remains.c.how == "snapshot",
            (remains.c.instance_name == instance) | (remains.c.id == instance))
    done = connection.execute(update(remains).where(*here).values(unwanted=True)).rowcount
    if not done:
        raise SkysailError(f"nothing is left of {instance} on {host_id}", f"see: sudo ./skysail host remains {host_id}")
    desired.bump(connection, host_id)
    return int(done)


# --- deciding


class _Failed(NamedTuple):
    """A host that has failed, with its guests (those that ran first), and of whom it is to be known at once: its instances
    by id, and those of them that move. ``fenced``: it is off for certain."""

    host: RowMapping
    fenced: bool
    guests: Sequence[RowMapping]
    instances: Mapping[str, RowMapping]
    moving: Collection[str]


def _failed(connection: Connection, host_id: str) -> _Failed:
    here = select(guests.c.instance_id).where(guests.c.host_id == host_id)
    return _Failed(
        host=connection.execute(select(hosts).where(hosts.c.id == host_id)).mappings().one(),
        fenced=outages.is_fenced(connection, host_id),
        guests=connection.execute(select(guests).where(guests.c.host_id == host_id)
                                  .order_by(guests.c.role, guests.c.instance_name)).mappings().all(),
        instances={row["id"]: row for row in connection.execute(
            select(instances).where(instances.c.id.in_(here))).mappings()},
        moving=set(connection.execute(select(moves.c.instance_id).where(moves.c.instance_id.in_(here))).scalars()))


def _prospect(connection: Connection, config: Config, failed: _Failed, guest: RowMapping, now: float) -> Prospect:
    def waits(why: str) -> Prospect:
        return Prospect(instance=guest["instance_name"], guest=guest["id"], why=why)

    host, instance = failed.host, failed.instances.get(guest["instance_id"])
    if config.on_host_failure == "wait":
        return waits("on_host_failure is \"wait\"")
    if not failed.fenced:
        return waits("its host is not known to be off")
    if not (host["facts"] or {}).get("boot"):
        return waits("its host's agent is too old: it would start it again by itself")
    if guest["instance_id"] in failed.moving:
        return waits("it was on its way to another host, and that is not over")
    if instance is None or guest["role"] == "gone":
        return waits("it is deleted")
    if not guest["observed_starts"]:
        return waits("it has not run yet: its host was making it")
    if host["pool"]:
        return _by_pool(connection, config, guest, instance, host["pool"], now)
    if config.on_host_failure == "restart":
        return waits(f"its disks are files of {host['id']}")
    if guest["role"] == "stop":
        return waits(f"it is stopped, and its disks are files of {host['id']}: nobody misses it yet")
    return _by_snapshot(connection, config, guest, instance, now)


def _by_pool(connection: Connection, config: Config, guest: RowMapping, instance: RowMapping, pool: str,
             now: float) -> Prospect:
    """On the host of the same pool that a placement takes."""
    stained = select(remains.c.host_id).where(remains.c.id == guest["id"])
    among = list(connection.execute(select(hosts.c.id).where(
        hosts.c.id != guest["host_id"], hosts.c.pool == pool, hosts.c.away_since.is_(None),
        hosts.c.seen_at.is_not(None), hosts.c.id.not_in(stained), or_(
            # Its agent knows how a guest goes on there.
            hosts.c.facts["boot"].as_string() != "", hosts.c.address.startswith("unix:"))).order_by(hosts.c.id)).scalars())
    among = random.sample(among, LOOKED_AT) if len(among) > LOOKED_AT else among
    return _placed(connection, config, guest, instance, among, now, Prospect(
        instance=guest["instance_name"], guest=guest["id"], how="pool"))


def _by_snapshot(connection: Connection, config: Config, guest: RowMapping, instance: RowMapping, now: float) -> Prospect:
    """On the host that has its last snapshot: what begins as one goes there."""
    plain = Prospect(instance=guest["instance_name"], guest=guest["id"])
    found = snapshot_elsewhere(connection, guest)
    if found is None:
        return msgspec.structs.replace(plain, why="no other host has a snapshot of it")
    have = {volume["id"] for volume in found["volumes"][1:]}
    if lacking := [row.name for row in _attached(connection, guest["instance_id"]) if row.id not in have]:
        return msgspec.structs.replace(plain, why=f"its disk {lacking[0]} is not in its last snapshot elsewhere")
    return _placed(connection, config, guest, instance, [found["host_id"]], now, msgspec.structs.replace(
        plain, how="snapshot", snapshot=found["id"]))


def _placed(connection: Connection, config: Config, guest: RowMapping, instance: RowMapping, among: Sequence[str], now: float,
            prospect: Prospect) -> Prospect:
    """The same on the best of these hosts; why on none, where none can take it."""
    # In a pool its disks take no more room than they do.
    more = 0 if prospect.how == "pool" else guest["disk_gib"] + sum(
        row.size_gib for row in _attached(connection, guest["instance_id"]))
    need = Need(zone=instance["region"] + instance["zone"], blueprint="", vcpus=guest["vcpus"],
                memory_mib=guest["memory_mib"], disk_gib=more)
    verdicts = placement.judge(placing.candidates(connection, config, guest["account_id"], now, without=[guest["id"]],
                                                  among=among), need)
    if verdicts and not verdicts[0].refusals:
        return msgspec.structs.replace(prospect, target=verdicts[0].host)
    why = "; ".join(f"{one.host} {', '.join(one.refusals)}" for one in verdicts) or "there is none that has its disks, too"
    return msgspec.structs.replace(prospect, how="waits", why=f"no host can take it: {why}")


def snapshot_elsewhere(connection: Connection, guest: RowMapping) -> RowMapping | None:
    """The newest whole snapshot of a guest's instance on a host that answers."""
    return connection.execute(select(snapshots).join(hosts, hosts.c.id == snapshots.c.host_id).where(
        snapshots.c.source_id == guest["instance_id"], snapshots.c.kind == "InstanceSnapshot", snapshots.c.deleted.is_(False),
        snapshots.c.state == "available", snapshots.c.host_id != guest["host_id"], hosts.c.away_since.is_(None),
        hosts.c.refused == "").order_by(snapshots.c.created_at.desc()).limit(1)).mappings().first()


def _attached(connection: Connection, instance_id: str) -> Sequence[Any]:
    return connection.execute(select(disks.c.id, disks.c.name, disks.c.size_gib).where(
        disks.c.instance_id == instance_id).order_by(disks.c.id)).all()


# --- doing


def _rescue(connection: Connection, config: Config, failed: _Failed, now: float) -> int:
    """A portion of the host's instances goes on elsewhere; how many. Where none can, no more than some are looked at, others
    each time."""
    done = vain = 0
    waiting = list(failed.guests)
    random.shuffle(waiting)
    for guest in sorted(waiting, key=lambda one: one["role"] != "run"):
        if done == PORTION or vain == LOOKED_AT:
            break
        found = _prospect(connection, config, failed, guest, now)
        if found.how == "waits":
            vain += bool(failed.host["pool"])  # what keeps one from a place there keeps most
            continue
        if found.how == "pool":
            _with_its_disks(connection, guest, found.target, now)
        else:
            _anew(connection, guest, found.snapshot, found.target, now)
        desired.bump(connection, guest["host_id"])
        desired.bump(connection, found.target)
        log.warning("instance %s, whose host %s has failed, goes on on %s %s", guest["instance_name"], guest["host_id"],
                    found.target, "with its disks" if found.how == "pool" else f"from its snapshot {found.snapshot}")
        done += 1
    return done


def _with_its_disks(connection: Connection, guest: RowMapping, target: str, now: float) -> None:
    """It is started elsewhere from its own disks."""
    _leave(connection, guest, "pool", target, now)
    connection.execute(update(guests).where(guests.c.id == guest["id"]).values(
        host_id=target, heir=True, reason="", observed_state="preparing", observed_disks=[], observed_refused={},
        observed_mounts={}))
    connection.execute(update(disks).where(disks.c.instance_id == guest["instance_id"]).values(host_id=target))
    for row in connection.execute(select(snapshots).where(
            snapshots.c.guest_id == guest["id"], snapshots.c.host_id == guest["host_id"])).mappings().all():
        if desired.waits(row):
            connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(host_id=target))


def _anew(connection: Connection, guest: RowMapping, snapshot_id: str, target: str, now: float) -> None:
    """It begins again elsewhere, as it was when the snapshot was taken."""
    snapshot = connection.execute(select(snapshots).where(snapshots.c.id == snapshot_id)).mappings().one()
    attached = _attached(connection, guest["instance_id"])
    _leave(connection, guest, "snapshot", target, now, snapshot=snapshot["name"] or snapshot["auto_day"],
           snapshot_at=snapshot["created_at"], disks=[(row.id, row.size_gib) for row in attached])
    identifier = "g-" + secrets.token_hex(5)
    connection.execute(update(guests).where(guests.c.id == guest["id"]).values(
        id=identifier, volume="", host_id=target, image=snapshot["source"]["image"], reason="", host_keys=[],
        witnessed_at=None, observed_state="preparing", observed_disks=[], observed_refused={}, observed_mounts={}, ours=None,
        heir=False, origin=msgspec.to_builtins(Origin(snapshot=snapshot_id, volume=snapshot["volumes"][0]["id"]))))
    for row in attached:
        connection.execute(update(disks).where(disks.c.id == row.id).values(
            host_id=target, made=False, observed_state="", reason="",
            origin=msgspec.to_builtins(Origin(snapshot=snapshot_id, volume=row.id))))
    # What was asked of it, and is not done, is asked of the one that it is now.
    for row in connection.execute(select(operations.c.id, operations.c.arguments).where(
            operations.c.done.is_(False), operations.c.arguments["guest"].as_string() == guest["id"])).all():
        connection.execute(update(operations).where(operations.c.id == row.id).values(
            arguments=row.arguments | {"guest": identifier}))


def _leave(connection: Connection, guest: RowMapping, how: str, target: str, now: float, **more: Any) -> None:
    kept = ("id", "host_id", "instance_id", "instance_name", "account_id", "vcpus", "memory_mib", "disk_gib", "image", "mac",
            "private_ipv4", "network")
    connection.execute(insert(remains).values(
        **{name: guest[name] for name in kept}, how=how, went_to=target, left_at=now, **more))


# --- showing


def _measure(connection: Connection, outage: RowMapping, now: float) -> None:
    """The system status check of the host's instances that shall run has failed in this minute."""
    minute = int(now // 60) * 60
    if outage["measured_at"] < minute:
        connection.execute(update(failures).where(failures.c.host_id == outage["host_id"]).values(measured_at=minute))
        metering.note_failure(connection, list(connection.execute(
            select(guests.c.instance_id).join(meters, meters.c.instance_id == guests.c.instance_id).where(
                guests.c.host_id == outage["host_id"], guests.c.role == "run")).scalars()), minute)
