"""Metering: samples become measurements, meters and transfers; what is older than Lightsail keeps it goes.

A sample is rolled up into its minute and its five minutes as it comes, so that nothing has to be rolled up later, and a row
is written a few times and read as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import (
    BindParameter,
    Column,
    Connection,
    RowMapping,
    Select,
    String,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from skysail.contract.samples import GuestSample, Sample
from skysail.store.schema import guests, instances, measurements, meters, moves, remains, transfers

DAY_SECONDS = 86400
# How long rows of each resolution are kept (CloudWatch user guide, "Metrics retention").
KEPT_SECONDS = {60: 15 * DAY_SECONDS, 300: 455 * DAY_SECONDS}


class Stats(msgspec.Struct, gc=False):
    """What is kept of a metric's values in some time. Thousands are made at a time, and none refers to anything: Python's
    collector of garbage need not look at them."""

    count: int
    sum: float
    minimum: float
    maximum: float

    def add(self, other: Stats) -> None:
        """Take in the values that ``other`` is of."""
        self.count += other.count
        self.sum += other.sum
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)


Rolled = dict[str, Stats]
# A row has a metric's number in place of its name: there are 150,000 rows of an instance. Numbers are never given again.
NUMBERS = {"CPUUtilization": 1, "NetworkIn": 2, "NetworkOut": 3, "StatusCheckFailed": 4, "StatusCheckFailed_Instance": 5,
           "StatusCheckFailed_System": 6, "BurstCapacityPercentage": 7, "BurstCapacityTime": 8, "MetadataNoToken": 9}
_NAMES = {number: name for name, number in NUMBERS.items()}
_decoder = msgspec.msgpack.Decoder(dict[int, tuple[int, float, float, float]])
# Run for all guests of several hosts at once: every one of them is measured each minute.
_INSERT_MEASUREMENT = insert(measurements).values(
    instance_id=bindparam("of_instance"), seconds=bindparam("of_seconds"), at=bindparam("of_at"),
    stats=bindparam("new_stats"))
_UPDATE_MEASUREMENT = update(measurements).where(
    measurements.c.instance_id == bindparam("of_instance"), measurements.c.seconds == bindparam("of_seconds"),
    measurements.c.at == bindparam("of_at")).values(stats=bindparam("new_stats"))
_INSERT_METER = insert(meters).values(
    instance_id=bindparam("of_instance"), cpu_seconds=bindparam("more_cpu"), rx_bytes=bindparam("more_rx"),
    tx_bytes=bindparam("more_tx"), sampled_at=bindparam("seen_at"))
_UPDATE_METER = update(meters).where(meters.c.instance_id == bindparam("of_instance")).values(
    cpu_seconds=meters.c.cpu_seconds + bindparam("more_cpu"), rx_bytes=meters.c.rx_bytes + bindparam("more_rx"),
    tx_bytes=meters.c.tx_bytes + bindparam("more_tx"), sampled_at=bindparam("seen_at"))
_TRANSFERS = select(transfers.c.instance_id, transfers.c.month).where(
    transfers.c.instance_id.in_(bindparam("of_instances", expanding=True)))
_INSERT_TRANSFER = insert(transfers).values(
    instance_id=bindparam("of_instance"), month=bindparam("of_month"), account_id=bindparam("of_account"),
    instance_name=bindparam("new_name"), bundle_id=bindparam("new_bundle"), region=bindparam("new_region"),
    rx_bytes=bindparam("more_rx"), tx_bytes=bindparam("more_tx"))
_BUNDLE: BindParameter[str] = bindparam("new_bundle", type_=String)
# An instance that was deleted meanwhile has what was noted of it before.
_UPDATE_TRANSFER = update(transfers).where(
    transfers.c.instance_id == bindparam("of_instance"), transfers.c.month == bindparam("of_month")).values(
    instance_name=bindparam("new_name"),
    bundle_id=case((_BUNDLE == "", transfers.c.bundle_id), else_=_BUNDLE),
    region=case((_BUNDLE == "", transfers.c.region), else_=bindparam("new_region", type_=String)),
    rx_bytes=transfers.c.rx_bytes + bindparam("more_rx"), tx_bytes=transfers.c.tx_bytes + bindparam("more_tx"))
_HOSTS: BindParameter[Any] = bindparam("of_hosts", expanding=True)
# What hosts may speak of: their guests.
_KNOWN = select(
    guests.c.id, guests.c.instance_id, guests.c.instance_name, guests.c.account_id, instances.c.bundle_id, instances.c.region,
    guests.c.host_id).outerjoin(instances, instances.c.id == guests.c.instance_id).where(guests.c.host_id.in_(_HOSTS))


def _moving(name: Column[Any], host: Column[Any]) -> Select[Any]:
    """Guests that move, by the name that they have at one of the ends, and the host there."""
    return select(name.label("id"), guests.c.instance_id, guests.c.instance_name, guests.c.account_id,
                  instances.c.bundle_id, instances.c.region, host.label("host_id")).join(
        guests, guests.c.instance_id == moves.c.instance_id).outerjoin(
        instances, instances.c.id == guests.c.instance_id).where(host.in_(_HOSTS), guests.c.id != name)


# What a guest used at its source before it went, or at its target before its row followed it, comes behind its back.
_WENT, _CAME = _moving(moves.c.guest, moves.c.source), _moving(moves.c.id, moves.c.target)
# So does what it used before its host failed, and it went on elsewhere.
_LEFT = select(
    remains.c.id, remains.c.instance_id, remains.c.instance_name, remains.c.account_id, instances.c.bundle_id,
    instances.c.region, remains.c.host_id).outerjoin(instances, instances.c.id == remains.c.instance_id).where(
    remains.c.host_id.in_(_HOSTS))


def _encode(row: Rolled) -> bytes:
    # A whole number takes fewer bytes as one.
    return msgspec.msgpack.encode({NUMBERS[metric]: [int(part) if part == int(part) else part for part in (
        stats.count, stats.sum, stats.minimum, stats.maximum)] for metric, stats in row.items()})


def _decode(encoded: bytes) -> Rolled:
    return {_NAMES[number]: Stats(*parts) for number, parts in _decoder.decode(encoded).items() if number in _NAMES}


def values(sample: GuestSample) -> dict[str, float]:
    """What a sample says of each metric; a metric that it says nothing of is a gap."""
    found: dict[str, float] = {}
    if sample.seconds > 0:
        # Emulation burns a little beside the processors of the guest.
        found["CPUUtilization"] = min(100.0, sample.cpu_seconds / (sample.seconds * sample.vcpus) * 100)
    if sample.seconds > 0 or sample.rx_bytes or sample.tx_bytes:
        found |= {"NetworkIn": sample.rx_bytes, "NetworkOut": sample.tx_bytes}
    if sample.condition != "off" or sample.tokenless:
        found["MetadataNoToken"] = sample.tokenless
    if sample.condition != "off":
        instance, system = float(sample.condition == "silent"), float(sample.condition == "down")
        found |= {"StatusCheckFailed": max(instance, system), "StatusCheckFailed_Instance": instance,
                  "StatusCheckFailed_System": system}
    if sample.capacity_seconds > 0 and sample.condition != "off":
        found |= {"BurstCapacityPercentage": sample.balance_seconds / sample.capacity_seconds * 100,
                  "BurstCapacityTime": sample.balance_seconds / sample.vcpus}
    return found


def take_in(connection: Connection, samples: Mapping[str, Sequence[Sample]]) -> None:
    """Write what new samples say, by the ids of the hosts that took them."""
    known = {(row["host_id"], row["id"]): row for statement in (_KNOWN, _WENT, _CAME, _LEFT)
             for row in connection.execute(statement, {"of_hosts": [*samples]}).mappings()}
    # By resolution and moment, then by instance.
    rolled: dict[tuple[int, int], dict[str, Rolled]] = {}
    totals: dict[str, dict[str, Any]] = {}
    flows: dict[tuple[str, str], dict[str, Any]] = {}
    for host_id, sample in ((host_id, sample) for host_id, several in samples.items() for sample in several):
        for measured in sample.guests:
            guest = known.get((host_id, measured.id))
            if guest is None:
                continue
            _count(totals, flows, guest, measured, sample.at)
            if guest["bundle_id"] is None:
                continue  # its instance is deleted: its bytes are counted, nobody asks for its metrics
            found = values(measured)
            for seconds in KEPT_SECONDS if found else ():
                together = rolled.setdefault((seconds, int(sample.at // seconds) * seconds), {})
                row = together.setdefault(guest["instance_id"], {})
                for metric, value in found.items():
                    _add(row, metric, Stats(1, value, value, value))
    for (seconds, at), rows in rolled.items():
        _roll(connection, seconds, at, rows)
    _meter(connection, totals)
    _transfer(connection, flows)


def note_failure(connection: Connection, instance_ids: Sequence[str], at: int) -> None:
    """The system status check of these instances failed in the minute that began ``at``: nobody can say more of them. To be
    said once of each minute."""
    for seconds in KEPT_SECONDS if instance_ids else ():
        _roll(connection, seconds, at // seconds * seconds, {instance_id: {
            metric: Stats(1, 1.0, 1.0, 1.0) for metric in ("StatusCheckFailed", "StatusCheckFailed_System")}
            for instance_id in instance_ids})
    connection.execute(update(meters).where(meters.c.instance_id.in_(instance_ids)).values(sampled_at=at))


def _roll(connection: Connection, seconds: int, at: int, rows: dict[str, Rolled]) -> None:
    """Add to the measurements of many instances that begin ``at`` that moment."""
    held = {row.instance_id: row.stats for row in connection.execute(
        select(measurements.c.instance_id, measurements.c.stats).where(
            measurements.c.instance_id.in_(rows), measurements.c.seconds == seconds, measurements.c.at == at))}
    for instance_id, stats in held.items():
        for metric, before in _decode(stats).items():
            _add(rows[instance_id], metric, before)
    for known, statement in ((True, _UPDATE_MEASUREMENT), (False, _INSERT_MEASUREMENT)):
        written = [{"of_instance": one, "of_seconds": seconds, "of_at": at, "new_stats": _encode(row)}
                   for one, row in rows.items() if (one in held) is known]
        if written:
            connection.execute(statement, written)


def _meter(connection: Connection, totals: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the meters of many instances."""
    held = set(connection.execute(select(meters.c.instance_id).where(meters.c.instance_id.in_(totals))).scalars())
    for known, statement in ((True, _UPDATE_METER), (False, _INSERT_METER)):
        rows = [{"of_instance": one, **more} for one, more in totals.items() if (one in held) is known]
        if rows:
            connection.execute(statement, rows)


def _add(row: Rolled, metric: str, stats: Stats) -> None:
    if metric in row:
        row[metric].add(stats)
    else:
        row[metric] = stats


def _transfer(connection: Connection, flows: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Add to what many instances transferred in a month."""
    held = {(row.instance_id, row.month) for row in connection.execute(
        _TRANSFERS, {"of_instances": [*{instance_id for instance_id, _ in flows}]})} if flows else set()
    for known, statement in ((True, _UPDATE_TRANSFER), (False, _INSERT_TRANSFER)):
        rows = [{"of_instance": one, "of_month": month, **more} for (one, month), more in flows.items()
                if ((one, month) in held) is known]
        if rows:
            connection.execute(statement, rows)


def _count(totals: dict[str, dict[str, Any]], flows: dict[tuple[str, str], dict[str, Any]], guest: RowMapping,
           measured: GuestSample, at: float) -> None:
    """Into the totals of the instance and of its month."""
    if guest["bundle_id"] is not None:
        total = totals.setdefault(guest["instance_id"], {"more_cpu": 0.0, "more_rx": 0, "more_tx": 0})
        total["more_cpu"] += measured.cpu_seconds
        total["more_rx"] += measured.rx_bytes
        total["more_tx"] += measured.tx_bytes
        total["seen_at"] = at
    if measured.rx_bytes or measured.tx_bytes:
        flow = flows.setdefault((guest["instance_id"], month(at)), {
            "more_rx": 0, "more_tx": 0, "of_account": guest["account_id"], "new_name": guest["instance_name"],
            "new_bundle": guest["bundle_id"] or "", "new_region": guest["region"] or ""})
        flow["more_rx"] += measured.rx_bytes
        flow["more_tx"] += measured.tx_bytes


def month(at: float) -> str:
    """The calendar month (UTC) of a moment."""
    return time.strftime("%Y-%m", time.gmtime(at))


def read(connection: Connection, instance_id: str, metric: str, seconds: int, start: float, end: float,
         ) -> list[tuple[int, Stats]]:
    """The instance's rolled-up values of ``metric`` that begin from ``start`` to before ``end``, oldest first."""
    found = []
    for row in connection.execute(select(measurements.c.at, measurements.c.stats).where(
            measurements.c.instance_id == instance_id, measurements.c.seconds == seconds, measurements.c.at >= start,
            measurements.c.at < end).order_by(measurements.c.at)):
        stats = _decode(row.stats).get(metric)
        if stats is not None:
            found.append((row.at, stats))
    return found


def latest(connection: Connection) -> dict[str, Rolled]:
    """The last minute of each instance that was measured."""
    query = select(measurements.c.instance_id, measurements.c.stats).join(meters, and_(
        measurements.c.instance_id == meters.c.instance_id, measurements.c.seconds == 60,
        measurements.c.at > meters.c.sampled_at - 60, measurements.c.at <= meters.c.sampled_at))
    return {row.instance_id: _decode(row.stats) for row in connection.execute(query)}


def sweep(connection: Connection, now: float, limit: int = 500) -> int:
    """Delete up to ``limit`` rows that are too old, or of instances that are gone; how many. Called again until it is 0, each
    time in a transaction of its own: requests get between."""
    living = select(instances.c.id).where(instances.c.id == meters.c.instance_id).exists()
    for seconds, kept in KEPT_SECONDS.items():
        # Each instance's rows lie together, the oldest first: what there is to delete is found without looking at the rest.
        oldest = select(func.min(measurements.c.at)).where(
            measurements.c.instance_id == meters.c.instance_id, measurements.c.seconds == seconds).scalar_subquery()
        deleted = 0
        for row in connection.execute(select(meters.c.instance_id, living.label("lives")).where(
                or_(oldest < now - kept, and_(~living, oldest.is_not(None)))).limit(limit)).all():
            mine = (measurements.c.instance_id == row.instance_id, measurements.c.seconds == seconds)
            old = select(measurements.c.at).where(*mine).order_by(measurements.c.at).limit(limit - deleted)
            if row.lives:
                old = old.where(measurements.c.at < now - kept)
            deleted += connection.execute(delete(measurements).where(*mine, measurements.c.at.in_(old))).rowcount
            if deleted >= limit:
                break
        if deleted:
            return deleted
    gone = connection.execute(select(meters.c.instance_id).where(~living).limit(limit)).scalars().all()
    if gone:
        return int(connection.execute(delete(meters).where(meters.c.instance_id.in_(gone))).rowcount)
    return int(connection.execute(delete(transfers).where(transfers.c.month < month(now - KEPT_SECONDS[300]))).rowcount)
