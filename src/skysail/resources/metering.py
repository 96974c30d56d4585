"""Metering: samples become measurements, meters and transfers; what is older than Lightsail keeps it goes.

A sample is rolled up into its minute and its five minutes as it comes, so that nothing has to be rolled up later, and a row
is written a few times and read as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.contract.samples import GuestSample, Sample
from skysail.store.schema import guests, instances, measurements, meters, transfers

DAY_SECONDS = 86400
# How long rows of each resolution are kept (CloudWatch user guide, "Metrics retention").
KEPT_SECONDS = {60: 15 * DAY_SECONDS, 300: 455 * DAY_SECONDS}


class Stats(msgspec.Struct):
    """What is kept of a metric's values in some time."""

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


def take_in(connection: Connection, host_id: str, samples: Sequence[Sample]) -> None:
    """Write what new samples of a host say."""
    known = {row["id"]: row for row in connection.execute(
        select(guests.c.id, guests.c.instance_id, guests.c.instance_name, guests.c.account_id, instances.c.bundle_id,
               instances.c.region)
        .outerjoin(instances, instances.c.id == guests.c.instance_id).where(guests.c.host_id == host_id)).mappings()}
    rolled: dict[tuple[str, int, int], Rolled] = {}
    for sample in samples:
        for measured in sample.guests:
            guest = known.get(measured.id)
            if guest is None:
                continue
            _count(connection, guest, measured, sample.at)
            if guest["bundle_id"] is None:
                continue  # its instance is deleted: its bytes are counted, nobody asks for its metrics
            found = values(measured)
            for seconds in KEPT_SECONDS if found else ():
                row = rolled.setdefault((guest["instance_id"], seconds, int(sample.at // seconds) * seconds), {})
                for metric, value in found.items():
                    _add(row, metric, Stats(1, value, value, value))
    for (instance_id, seconds, at), row in rolled.items():
        held = connection.execute(select(measurements.c.stats).where(
            measurements.c.instance_id == instance_id, measurements.c.seconds == seconds,
            measurements.c.at == at)).scalar_one_or_none()
        for metric, stats in _decode(held).items() if held is not None else ():
            _add(row, metric, stats)
        if held is None:
            connection.execute(insert(measurements).values(
                instance_id=instance_id, seconds=seconds, at=at, stats=_encode(row)))
        else:
            connection.execute(update(measurements).where(
                measurements.c.instance_id == instance_id, measurements.c.seconds == seconds, measurements.c.at == at)
                .values(stats=_encode(row)))


def _add(row: Rolled, metric: str, stats: Stats) -> None:
    if metric in row:
        row[metric].add(stats)
    else:
        row[metric] = stats


def _count(connection: Connection, guest: RowMapping, measured: GuestSample, at: float) -> None:
    """Into the totals of the instance and of its month."""
    flow = {"rx_bytes": measured.rx_bytes, "tx_bytes": measured.tx_bytes}
    if guest["bundle_id"] is not None:
        _increase(connection, meters, {"instance_id": guest["instance_id"]}, flow | {"cpu_seconds": measured.cpu_seconds},
                  {"sampled_at": at})
    if any(flow.values()):
        # An instance that was deleted meanwhile has what was noted of it before.
        bundle = {"bundle_id": guest["bundle_id"], "region": guest["region"]} if guest["bundle_id"] else {}
        _increase(connection, transfers, {"instance_id": guest["instance_id"], "month": month(at)}, flow,
                  {"instance_name": guest["instance_name"]} | bundle, {"account_id": guest["account_id"]})


def _increase(connection: Connection, table: Any, key: Mapping[str, Any], more: Mapping[str, float],
              latest: Mapping[str, Any], first: Mapping[str, Any] = {}) -> None:
    done = connection.execute(update(table).where(*(table.c[name] == value for name, value in key.items())).values(
        **{name: table.c[name] + value for name, value in more.items()}, **latest))
    if not done.rowcount:
        connection.execute(insert(table).values(**key, **more, **latest, **first))


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


def sweep(connection: Connection, now: float, limit: int = 500) -> int:
    """Delete up to ``limit`` rows that are too old, or of instances that are gone; how many. Called again until it is 0, each
    time in a transaction of its own: requests get between."""
    living = set(connection.execute(select(instances.c.id)).scalars())
    for instance_id in connection.execute(select(meters.c.instance_id)).scalars().all():
        for seconds, kept in KEPT_SECONDS.items():
            mine = (measurements.c.instance_id == instance_id, measurements.c.seconds == seconds)
            old = select(measurements.c.at).where(*mine).order_by(measurements.c.at).limit(limit)
            if instance_id in living:
                old = old.where(measurements.c.at < now - kept)
            deleted = connection.execute(delete(measurements).where(*mine, measurements.c.at.in_(old))).rowcount
            if deleted:
                return int(deleted)
        if instance_id not in living:
            connection.execute(delete(meters).where(meters.c.instance_id == instance_id))
            return 1
    return int(connection.execute(delete(transfers).where(transfers.c.month < month(now - KEPT_SECONDS[300]))).rowcount)
