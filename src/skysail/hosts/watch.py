"""The watch: the only part of the controller that talks to agents. One task sends each host its newest document, one
takes in its reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx
import msgspec
from sqlalchemy import Connection, Table, delete, insert, select, update

from skysail.contract.document import HostDocument
from skysail.contract.report import HostReport
from skysail.hosts import desired
from skysail.hosts.client import AgentClient
from skysail.hosts.zones import ZoneCompiler
from skysail.kit.clock import Clock
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone
from skysail.store.schema import disks, domains, guests, hosts, images, reverse_zones, snapshots, zone_reports
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.5
# A host has the document of its generation after this at the latest, whatever became of the one that it was sent.
AGAIN_SECONDS = 20.0
# How long changes are gathered for the next document where they come faster than documents are made. One that comes alone
# does not wait.
CROWDED_SECONDS = 0.1
# What a report may change of a guest's row.
_OBSERVED = (guests.c.id, guests.c.observed_state, guests.c.observed_starts, guests.c.observed_reboots, guests.c.reason,
             guests.c.rx_bytes, guests.c.tx_bytes, guests.c.host_keys, guests.c.observed_disks,
             guests.c.observed_refused, guests.c.observed_mounts, guests.c.origin, guests.c.observed_metadata,
             guests.c.observed_addresses)


class Watch:
    """Keeps host ``host_id`` and its rows together. ``observed`` is called after each report that was written; ``confirm``
    says that it is still this controller that does so."""

    def __init__(self, host_id: str, client: AgentClient, database: Database, clock: Clock, vault: Vault,
                 observed: Callable[[], None], confirm: Confirm = alone) -> None:
        self._host_id = host_id
        self._client = client
        self._database = database
        self._clock = clock
        self._vault = vault
        self._zones = ZoneCompiler()
        self._observed = observed
        self._confirm = confirm
        self._changed = asyncio.Event()
        self._changed.set()
        # How often the host began to report.
        self._begun = 0

    def touch(self) -> None:
        """Rows of this host may have changed: send its document if it has another generation (call from the event loop)."""
        self._changed.set()

    async def run(self) -> None:
        """Send and listen until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            tasks.create_task(self._listen())

    async def _send(self) -> None:
        sent, to = 0, 0
        while True:
            try:
                async with asyncio.timeout(AGAIN_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                sent = 0
            self._changed.clear()
            begun = self._begun
            if begun != to:
                sent = 0
            try:
                document = await asyncio.to_thread(self._compile, sent)
                if document is None:
                    continue
                if not await self._client.put(document):
                    log.warning("host %s holds a newer document; moving past it", self._host_id)
                    await asyncio.to_thread(self._overtake)
                    self._changed.set()
                    continue
                crowded, sent, to = 0 < sent < document.generation - 1, document.generation, begun
                if crowded:
                    await asyncio.sleep(CROWDED_SECONDS)
            except LeaseLost as lost:
                log.info("%s", lost)
            except (httpx.HTTPError, OSError):
                await self._again()  # the one who listens says that it is away
            except Exception:
                # A database that is busy or full for a while must not end the only one who talks to this host.
                log.exception("host %s was not sent its document", self._host_id)
                await self._again()

    async def _again(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        self._changed.set()

    def _compile(self, sent: int) -> HostDocument | None:
        with self._database.transaction(write=False) as connection:
            generation = connection.execute(
                select(hosts.c.generation).where(hosts.c.id == self._host_id)).scalar()
            # A host without a row is about to be left. One whose generation went back is of a restored database.
            if generation is None or generation == sent:
                return None
            return desired.compile(connection, self._host_id, self._vault, self._zones)

    def _overtake(self) -> None:
        # After a restored database our generation may be behind the agent's; the rows are the truth, so move ahead.
        with self._database.transaction() as connection:
            self._confirm(connection)
            row = connection.execute(select(hosts).where(hosts.c.id == self._host_id)).one()
            connection.execute(update(hosts).where(hosts.c.id == self._host_id).values(
                generation=max(row.generation, row.observed_generation) + 1))

    async def _listen(self) -> None:
        away = False
        while True:
            first = True
            try:
                async for report in self._client.reports():
                    if first:  # it may have started again, and have lost of its document what it does not know of
                        first = False
                        self._begun += 1
                        self._changed.set()
                    if away:
                        log.info("host %s reports again", self._host_id)
                    away = False
                    await asyncio.to_thread(self._take_in, report)
                    self._observed()
            except LeaseLost as lost:
                log.info("%s", lost)
            except (httpx.HTTPError, OSError) as broken:
                if not away:  # once, not twice a second for as long as it lasts
                    log.warning("reports of host %s broke off: %s", self._host_id, broken)
                away = True
            except Exception:
                log.exception("a report of host %s could not be taken in", self._host_id)
            await asyncio.sleep(RETRY_SECONDS)

    def _take_in(self, report: HostReport) -> None:
        with self._database.transaction() as connection:
            self._confirm(connection)
            write_report(connection, self._host_id, report, self._clock.now())


def write_report(connection: Connection, host_id: str, report: HostReport, now: float) -> None:
    """Write what the host observes into the rows; states of instances follow in the workflows, not here."""
    there = connection.execute(update(hosts).where(hosts.c.id == host_id).values(
        observed_generation=report.generation, networked_generation=report.networked, vcpus=report.vcpus,
        memory_mib=report.memory_mib, disk_gib=report.disk_gib, accelerator=report.accelerator, seen_at=now,
        entrance_state=report.entrance.state if report.entrance else "",
        entrance_reason=report.entrance.reason if report.entrance else "")).rowcount
    if not there:  # its row went while the report was on its way
        return
    known = {row["id"]: row for row in connection.execute(select(*_OBSERVED).where(guests.c.host_id == host_id)).mappings()}
    for guest in report.guests:
        row = known.get(guest.id)
        if row is None:
            continue
        values: dict[str, object] = {
            "observed_state": guest.state, "observed_starts": guest.starts, "observed_reboots": guest.reboots,
            "reason": guest.reason, "rx_bytes": guest.rx_bytes, "tx_bytes": guest.tx_bytes,
            "observed_disks": list(guest.disks), "observed_refused": guest.refused, "observed_mounts": guest.mounts,
            "observed_metadata": msgspec.to_builtins(guest.metadata_options),
            "observed_addresses": list(guest.public_addresses)}
        if guest.alone and row["origin"] is not None:
            values["origin"] = None
        if guest.host_keys and list(guest.host_keys) != row["host_keys"]:
            values |= {"host_keys": list(guest.host_keys), "witnessed_at": now}
        # A report names every guest of its host, most of them as they were.
        if any(row[name] != value for name, value in values.items()):
            connection.execute(update(guests).where(guests.c.id == guest.id).values(**values))
    for disk in report.disks:
        # It was flattened: whatever is asked of it from here on has nothing to do with the snapshot that it was made of.
        alone: dict[str, object] = {"origin": None} if disk.alone else {}
        _write(connection, disks, disk.id, {"observed_state": disk.state, "reason": disk.reason} | alone)
    for snapshot in report.snapshots:
        _write(connection, snapshots, snapshot.id, {
            "observed_state": snapshot.state, "progress": snapshot.progress, "consistency": snapshot.consistency,
            "frozen_ms": snapshot.frozen_ms, "parents": list(snapshot.parents), "reason": snapshot.reason})
    held = {row.digest for row in connection.execute(select(images.c.digest).where(images.c.host_id == host_id))}
    reported = {image.digest: image for image in report.images}
    for digest in held - reported.keys():
        connection.execute(delete(images).where(images.c.host_id == host_id, images.c.digest == digest))
    for digest in reported.keys() - held:
        image = reported[digest]
        connection.execute(insert(images).values(
            host_id=host_id, digest=digest, blueprint=image.blueprint, name=image.name, user=image.user,
            version=image.version, size_gib=image.size_gib))
    _write_zones(connection, host_id, report)


def _write(connection: Connection, table: Table, identifier: str, values: dict[str, object]) -> None:
    """Change the row, if there is one, and it is not so already."""
    row = connection.execute(select(table).where(table.c.id == identifier)).mappings().first()
    if row is not None and any(row[name] != value for name, value in values.items()):
        connection.execute(update(table).where(table.c.id == identifier).values(**values))


def _write_zones(connection: Connection, host_id: str, report: HostReport) -> None:
    """Only what changed is written: a report comes with every guest's news, and zones may be many."""
    held = {row["domain_id"]: row for row in connection.execute(
        select(zone_reports).where(zone_reports.c.host_id == host_id)).mappings()}
    known = {identifier for table in (domains, reverse_zones) if report.zones or held
             for identifier in connection.execute(select(table.c.id)).scalars()}
    for zone in report.zones:
        values = {"state": zone.state, "serial": zone.serial, "ds": list(zone.ds), "reason": zone.reason}
        row = held.get(zone.id)
        if row is None and zone.id in known:
            connection.execute(insert(zone_reports).values(host_id=host_id, domain_id=zone.id, **values))
        elif row is not None and any(row[name] != value for name, value in values.items()):
            connection.execute(update(zone_reports).where(
                zone_reports.c.host_id == host_id, zone_reports.c.domain_id == zone.id).values(**values))
    for identifier in held.keys() - known:
        connection.execute(delete(zone_reports).where(
            zone_reports.c.host_id == host_id, zone_reports.c.domain_id == identifier))
