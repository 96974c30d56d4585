"""GET /metrics: counters and gauges for the operator's Prometheus.

Source: Prometheus documentation, "Exposition formats" (text format 0.0.4). Written by hand: its few lines need no library,
and a client library would keep in memory what stands in the rows.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sqlalchemy import Connection, func, select
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from skysail.hosts import roster
from skysail.kit.config import Config
from skysail.resources import metering, migration
from skysail.resources.migration import Migration
from skysail.store.database import Database
from skysail.store.schema import alarms, deliveries, guests, hosts, instances, meters, transfers

Labels = dict[str, str]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def route(config: Config, database: Database) -> Route:
    """The endpoint: for this machine alone, or, with a token file, for whoever shows the token."""

    def text() -> str:
        with database.transaction(write=False) as connection:
            return page(connection, time.time())

    async def metrics(request: Request) -> Response:
        if not await asyncio.to_thread(_allowed, config, request):
            return PlainTextResponse("not for you\n", 401 if config.metrics_token_file else 403)
        return Response(await asyncio.to_thread(text), headers={"content-type": CONTENT_TYPE})

    return Route("/metrics", metrics)


def _allowed(config: Config, request: Request) -> bool:
    if not config.metrics_token_file:
        # A proxy on this machine makes everybody local: it says so, and then nobody is.
        return request.client is not None and _is_loopback(request.client.host) and not any(
            header in request.headers for header in ("forwarded", "x-forwarded-for", "via"))
    try:
        token = Path(config.metrics_token_file).read_bytes().strip()
    except OSError:
        return False
    shown = request.headers.get("authorization", "").encode("latin-1", "replace")
    return bool(token) and hmac.compare_digest(shown, b"Bearer " + token)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def page(connection: Connection, now: float) -> str:
    """Every metric of this cloud in the text format."""
    return "".join(f"# HELP {name} {words}\n# TYPE {name} {kind}\n"
                   + "".join(f"{name}{_labels(labels)} {value!r}\n" for labels, value in samples)
                   for name, kind, words, samples in _families(connection, now))


def _families(connection: Connection, now: float) -> Iterator[tuple[str, str, str, Iterable[tuple[Labels, float]]]]:
    machines = connection.execute(select(hosts).order_by(hosts.c.id)).mappings().all()

    def of_host(column: str, factor: int = 1) -> list[tuple[Labels, float]]:
        return [({"host": row["id"]}, row[column] * factor) for row in machines if row[column] is not None]

    yield "skysail_host_seen_timestamp_seconds", "gauge", "When the host last reported.", of_host("seen_at")
    yield ("skysail_host_up", "gauge", "Whether the host answers.",
           [({"host": row["id"]}, int(roster.state(row) == "ready")) for row in machines])
    yield ("skysail_host_cordoned", "gauge", "Whether the host is given nothing new.",
           [({"host": row["id"]}, int(row["cordoned"])) for row in machines])
    yield "skysail_host_vcpus", "gauge", "Processors of the host.", of_host("vcpus")
    yield "skysail_host_memory_bytes", "gauge", "Memory of the host.", of_host("memory_mib", 1 << 20)
    yield "skysail_host_disk_bytes", "gauge", "Disk of the host.", of_host("disk_gib", 1 << 30)
    promised = connection.execute(select(guests.c.host_id, func.count(), func.sum(guests.c.memory_mib))
                                  .where(guests.c.role == "run").group_by(guests.c.host_id)).all()
    yield ("skysail_host_guests", "gauge", "Guests that shall run on the host.",
           [({"host": row[0]}, row[1]) for row in promised])
    yield ("skysail_host_promised_memory_bytes", "gauge", "Memory of these guests.",
           [({"host": row[0]}, row[2] << 20) for row in promised])

    rows = connection.execute(
        select(instances.c.id, instances.c.name, instances.c.account_id, instances.c.region, instances.c.bundle_id,
               instances.c.state, guests.c.host_id, meters.c.cpu_seconds, meters.c.rx_bytes, meters.c.tx_bytes,
               meters.c.sampled_at)
        .join(guests, guests.c.instance_id == instances.c.id).outerjoin(meters, meters.c.instance_id == instances.c.id)
        .order_by(instances.c.id)).mappings().all()
    named = {row["id"]: {"instance": row["name"], "account": row["account_id"], "region": row["region"],
                         "host": row["host_id"]} for row in rows}

    def of_instance(column: str) -> list[tuple[Labels, float]]:
        return [(named[row["id"]], row[column]) for row in rows if row[column] is not None]

    yield ("skysail_instance_info", "gauge", "An instance; its plan and state are labels.",
           [(named[row["id"]] | {"bundle": row["bundle_id"], "state": row["state"]}, 1) for row in rows])
    yield ("skysail_instance_cpu_seconds_total", "counter", "Processor seconds that the instance used.",
           of_instance("cpu_seconds"))
    yield ("skysail_instance_network_receive_bytes_total", "counter", "Bytes that the instance received.",
           of_instance("rx_bytes"))
    yield ("skysail_instance_network_transmit_bytes_total", "counter", "Bytes that the instance sent.",
           of_instance("tx_bytes"))
    yield ("skysail_instance_sampled_timestamp_seconds", "gauge", "When the instance was last measured.",
           of_instance("sampled_at"))
    month = connection.execute(select(transfers).where(transfers.c.month == metering.month(now))).mappings().all()
    yield ("skysail_instance_month_transfer_bytes", "gauge", "Bytes that count against this month's allowance.",
           [(named[row["instance_id"]] | {"direction": direction}, row[column]) for row in month
            if row["instance_id"] in named for direction, column in (("in", "rx_bytes"), ("out", "tx_bytes"))])
    minutes = metering.latest(connection)
    for metric, name, words in (
            ("StatusCheckFailed", "skysail_instance_status_check_failed", "Whether its latest status check failed."),
            ("BurstCapacityPercentage", "skysail_instance_burst_capacity_percent", "Burst capacity that is left.")):
        measured = [(row["id"], minutes[row["id"]].get(metric)) for row in rows if row["id"] in minutes]
        yield (name, "gauge", words, [(named[identifier], stats.minimum if "Burst" in metric else stats.maximum)
                                      for identifier, stats in measured if stats is not None])

    yield from _of_migrations(migration.seen(connection))
    yield ("skysail_alarms", "gauge", "Alarms by state.",
           [({"state": row[0]}, row[1]) for row in connection.execute(
               select(alarms.c.state, func.count()).group_by(alarms.c.state).order_by(alarms.c.state))])
    waiting = connection.execute(select(func.count()).select_from(deliveries)).scalar_one()
    yield "skysail_notices_waiting", "gauge", "Notices that no receiver took yet.", [({}, waiting)]


def _of_migrations(found: list[Migration]) -> Iterator[tuple[str, str, str, Iterable[tuple[Labels, float]]]]:
    over = [one for one in found if one.state == "succeeded"]
    states = Counter(one.state for one in found)
    yield ("skysail_migrations", "gauge", "Instances that wait to go to another host, or are on their way.",
           [({"state": state.replace(" ", "_")}, states[state]) for state in ("waiting", "under way")])
    yield ("skysail_migrations_total", "counter", "Instances that went to another host, or stayed where they were.",
           [({"outcome": outcome}, states[outcome]) for outcome in ("succeeded", "failed")])
    yield ("skysail_migration_bytes_total", "counter", "Bytes that went over with those that went.",
           [({"of": "memory"}, sum(one.report.memory_bytes for one in over)),
            ({"of": "disks"}, sum(one.report.disk_bytes for one in over))])
    yield ("skysail_migrations_by_post_copy_total", "counter", "Those that ran before all of their memory was there.",
           [({"memory": "whole"}, sum(one.report.post_copy and not one.report.cut for one in over)),
            ({"memory": "cut"}, sum(bool(one.report.cut) for one in over))])
    for kind, words, values in (
            ("pause", "Pauses of those that went, by QEMU's count; the gap of those that stood still.",
             [one.report.pause_ms for one in over]),
            ("gap", "From the stop at the source until it ran at the target.", [one.report.gap_ms for one in over]),
            ("outside", "Pauses as a probe saw them, where there was one.",
             [one.report.outside_ms for one in over if one.report.outside_ms is not None])):
        yield (f"skysail_migration_{kind}_seconds_sum", "counter", words, [({}, round(sum(values) / 1000, 6))])
        yield (f"skysail_migration_{kind}_seconds_count", "counter", "How many these are.", [({}, len(values))])
        yield (f"skysail_migration_{kind}_seconds_max", "gauge", "The longest of these.",
               [({}, round(max(values, default=0.0) / 1000, 6))])


def _labels(labels: Labels) -> str:
    told = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{told}}}" if told else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
