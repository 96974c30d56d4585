"""The watch: the only part of the controller that talks to agents. One task sends each host its newest document, one
takes in its reports. Before either, and now and then, the host is asked what it is; one that speaks too old or too new a
version of the contract is sent nothing and not listened to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import random
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import httpx
import msgspec
from sqlalchemy import Connection, Select, Table, bindparam, delete, func, insert, or_, select, update

from skysail import contract
from skysail.contract.document import HostDocument
from skysail.contract.facts import HostFacts
from skysail.contract.report import HostReport
from skysail.hosts import desired, overlay, remains
from skysail.hosts.client import UNTOLD, AgentClient, Foreign
from skysail.hosts.threads import DOCUMENTS, REPORTS
from skysail.hosts.zones import ZoneCompiler
from skysail.kit.clock import Clock
from skysail.kit.errors import SkysailError
from skysail.store.database import Database
from skysail.store.leases import Confirm, LeaseLost, alone
from skysail.store.look import WouldWrite, look
from skysail.store.schema import (
    disks,
    domains,
    guests,
    hosts,
    images,
    leaving_addresses,
    moves,
    reverse_zones,
    snapshots,
    zone_reports,
)
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
Told = TypeVar("Told")
RETRY_SECONDS, FOREIGN_SECONDS = 0.5, 5.0
# How often at least a host is asked whether it is still what it was: its QEMU may be upgraded under its agent. Where there
# are many, not so often that more than one is asked in so long.
FACTS_SECONDS, HOST_SECONDS = 300.0, 0.2
# Within which time from its start on a controller sends each host its document, also one that says that it holds it: not in
# the first half of it, when there is enough to do, and not all at once. How often it does so after that. Where hosts are
# many, so long for each of them.
AGAIN_SECONDS, HOURLY_SECONDS, AGAIN_HOST_SECONDS = 600.0, 3600.0, 0.2
# How long the moment at which a host was last heard may stay as it is in the rows while nothing else changes.
SEEN_SECONDS = 60.0
# So many generations at the most a database was ever behind its agents.
MOST_BEHIND = 1 << 32
# How long changes are gathered for the next document where they come faster than documents are made. One that comes alone
# does not wait.
CROWDED_SECONDS = 0.1
# What a report may change of a guest's row.
_OBSERVED = (guests.c.id, guests.c.instance_id, guests.c.observed_state, guests.c.observed_starts,
             guests.c.observed_reboots, guests.c.reason, guests.c.host_keys, guests.c.observed_disks,
             guests.c.observed_refused, guests.c.observed_mounts, guests.c.origin, guests.c.observed_metadata,
             guests.c.observed_addresses, guests.c.observed_qemu, guests.c.ours, guests.c.heir, guests.c.witnessed_at)
_UPDATE_GUEST = update(guests).where(guests.c.id == bindparam("of_id")).values({
    column: bindparam(f"of_{column.name}") for column in _OBSERVED if column.name not in ("id", "instance_id")})
# Made once: each report comes by, and to put a statement together takes longer than to run it.
_GUESTS_OF = select(*_OBSERVED).where(guests.c.host_id == bindparam("of_host"))
_IMAGES_OF = select(images.c.digest).where(images.c.host_id == bindparam("of_host"))
_LEAVING = select(leaving_addresses).where(leaving_addresses.c.host_id == bindparam("of_host"))
_MOVES_OF = select(moves).where(or_(moves.c.source == bindparam("of_host"), moves.c.target == bindparam("of_host")))
_ZONES_OF = select(zone_reports).where(zone_reports.c.host_id == bindparam("of_host"))


class Watch:
    """Keeps host ``host_id`` and its rows together. ``observed`` is called after each report that was written, with the ids
    of the resources that it told something new of; ``confirm`` says that it is still this controller that does so, ``count``
    how many hosts it watches."""

    def __init__(self, host_id: str, client: AgentClient, database: Database, clock: Clock, vault: Vault,
                 observed: Callable[[Collection[str]], None], confirm: Confirm = alone,
                 count: Callable[[], int] = lambda: 1) -> None:
        self._host_id = host_id
        self._client = client
        self._database = database
        self._clock = clock
        self._vault = vault
        self._zones = ZoneCompiler()
        self._observed = observed
        self._confirm = confirm
        self._count = count
        self._changed = asyncio.Event()
        self._changed.set()
        # The version that host and controller speak; no document goes out before it is known.
        self._version = contract.VERSION
        self._agreed = asyncio.Event()
        self._pause = FACTS_SECONDS
        self._asked = asyncio.Event()
        # The agent's present life, as its last report said; the generation that it holds whole, as far as we know.
        self._boot = ""
        self._held = 0
        # Whether the rows say that it does not answer, and nobody heard it since.
        self._missed = False
        # What was taken in last, but for what is written nowhere.
        self._taken = b""

    def touch(self) -> None:
        """Rows of this host may have changed: send its document if it has another generation (call from the event loop)."""
        self._changed.set()

    async def run(self) -> None:
        """Send and listen until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            tasks.create_task(self._listen())
            tasks.create_task(self._ask_again())
            tasks.create_task(self._send_again())

    async def _send(self) -> None:
        while True:
            await self._changed.wait()
            await self._agreed.wait()
            self._changed.clear()
            boot, held = self._boot, self._held
            if not boot:  # what it holds is not known before it has reported
                continue
            try:
                document = await DOCUMENTS.run(self._compile, held)
                if document is None:
                    continue
                if not await self._client.put(msgspec.structs.replace(document, version=self._version, life=boot)):
                    log.warning("host %s holds a newer document; moving past it", self._host_id)
                    await DOCUMENTS.run(self._overtake)
                    self._changed.set()
                    continue
                if boot == self._boot:  # else it began anew meanwhile, and what it holds is looked at again
                    self._held = document.generation
                if 0 < held < document.generation - 1:  # crowded
                    await asyncio.sleep(CROWDED_SECONDS)
            except LeaseLost as lost:
                log.info("%s", lost)
            except httpx.HTTPStatusError as refused:
                log.warning("host %s does not take its document: %s", self._host_id, refused.response.text)
                await asyncio.sleep(FOREIGN_SECONDS)
                self._changed.set()
            except (httpx.HTTPError, OSError):
                await self._again()  # the one who listens says that it is away
            except Exception:
                # A database that is busy or full for a while must not end the only one who talks to this host.
                log.exception("host %s was not sent its document", self._host_id)
                await self._again()

    async def _again(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        self._changed.set()

    def _compile(self, held: int) -> HostDocument | None:
        with self._database.transaction(write=False) as connection:
            generation = connection.execute(
                select(hosts.c.generation).where(hosts.c.id == self._host_id)).scalar()
            # A host without a row is about to be left. One whose generation went back is of a restored database.
            if generation is None or generation == held:
                return None
            return desired.compile(connection, self._host_id, self._vault, self._zones)

    def _overtake(self) -> None:
        # After a restored database our generation may be behind the agent's; the rows are the truth, so move ahead. Not by
        # any step: a host that is wrong about it, or lies, would soon have the number that has none behind it.
        with self._database.transaction() as connection:
            self._confirm(connection)
            row = connection.execute(select(hosts).where(hosts.c.id == self._host_id)).one()
            connection.execute(update(hosts).where(hosts.c.id == self._host_id).values(
                generation=max(row.generation, min(row.observed_generation, row.generation + MOST_BEHIND)) + 1))

    async def _listen(self) -> None:
        trouble = ""  # that was logged
        while True:
            try:
                await self._ask()
                async for report in self._client.reports():
                    if trouble:
                        log.info("host %s reports again", self._host_id)
                    trouble = ""
                    told = await REPORTS.run(self._take_in, report)
                    if told is not None:
                        self._observed(told)
                    if report.boot != self._boot:
                        self._begin(report)
            except Foreign as foreign:
                if trouble != str(foreign):
                    log.warning("host %s is refused: %s", self._host_id, foreign)
                trouble = str(foreign)
                await asyncio.sleep(FOREIGN_SECONDS)
            except LeaseLost as lost:
                log.info("%s", lost)
            except (httpx.HTTPError, OSError) as broken:
                if not trouble:  # once, not twice a second for as long as it lasts
                    log.warning("reports of host %s broke off: %s", self._host_id, str(broken) or type(broken).__name__)
                trouble = str(broken) or "it broke off"
                await self._miss()
            except Exception:
                log.exception("a report of host %s could not be taken in", self._host_id)
            self._agreed.clear()  # who answers next may be another program
            await asyncio.sleep(RETRY_SECONDS)

    def _begin(self, report: HostReport) -> None:
        """The agent is one that we have not heard before. One that started again may have lost of its document what it does
        not know of, and gets it whatever it says; one that waits, too. A controller that starts itself takes the word of all
        others for now: it does not send thousands of hosts at once what they have."""
        self._held = 0 if self._boot or report.waits else report.generation
        self._boot = report.boot
        self._changed.set()

    async def _send_again(self) -> None:
        """Some time after the start and then now and then, whatever the agent says that it holds: rows of a database that was
        restored may have come to the same generation by another way."""
        longest = AGAIN_SECONDS
        while True:
            longest = max(longest, AGAIN_HOST_SECONDS * self._count())
            await asyncio.sleep(random.uniform(longest / 2, longest))
            longest = HOURLY_SECONDS
            self._held = 0
            self._changed.set()

    async def _ask(self) -> None:
        """Learn what the host is, and by which version to speak with it; raises Foreign."""
        try:
            facts = await self._client.facts()
        except Foreign as foreign:
            self._agreed.clear()
            try:
                await REPORTS.run(self._write, {"refused": str(foreign), "away_since": None})
            finally:
                self._missed = False
            raise
        self._version = contract.common(facts.contract if facts else UNTOLD) or contract.VERSION
        try:
            await REPORTS.run(self._learn, facts)
        finally:
            self._missed = False
        self._agreed.set()
        # All hosts met a controller that started at about the same time, and are not asked again at the same time.
        self._pause = max(FACTS_SECONDS, HOST_SECONDS * self._count()) * random.uniform(0.5, 1.0)
        if facts is not None:
            try:
                self._pause = min(self._pause, await self._client.renew(facts))
            except (httpx.HTTPError, SkysailError) as refused:
                # The one that it has is good for days: nothing breaks off for that.
                log.warning("the certificate of host %s is not renewed yet: %s", self._host_id, refused)
        self._asked.set()

    async def _ask_again(self) -> None:
        while True:
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause):
                    await self._asked.wait()
                continue  # what was learned may be that it is to be asked sooner
            try:
                # One that does not answer is noticed by the one who listens.
                with contextlib.suppress(httpx.HTTPError, OSError, Foreign, LeaseLost):
                    if self._agreed.is_set():
                        await self._ask()
            except Exception:
                log.exception("what host %s is could not be written; it is asked again", self._host_id)

    async def _miss(self) -> None:
        """It does not answer. Tried until that is in the rows: whether it is fenced, and all else, follows from it."""
        if self._missed:
            return
        try:
            await REPORTS.run(self._write, {
                "away_since": func.coalesce(hosts.c.away_since, self._clock.now()), "refused": ""})
            self._missed = True
        except LeaseLost as lost:
            log.info("%s", lost)
        except Exception:
            log.exception("that host %s is away could not be written", self._host_id)

    def _learn(self, facts: HostFacts | None) -> None:
        self._change(lambda connection: write_facts(connection, self._host_id, facts, self._clock.now()))

    def _write(self, values: dict[str, object]) -> None:
        with self._database.transaction() as connection:
            self._confirm(connection)
            connection.execute(update(hosts).where(hosts.c.id == self._host_id).values(values))

    def _take_in(self, report: HostReport) -> Collection[str] | None:
        """The resources that it says anything new of; None where it says nothing new at all."""
        # Most reports tell of nothing but bytes, which are metered by samples.
        told = hashlib.blake2b(msgspec.json.encode(msgspec.structs.replace(report, sequence=0, guests=tuple(
            msgspec.structs.replace(guest, rx_bytes=0, tx_bytes=0, stages={}) for guest in report.guests))),
            digest_size=16).digest()
        if told == self._taken:
            return None
        # The first one may say nothing new, as those of all hosts do when a controller starts. What differs from one that was
        # taken in does.
        changed = self._change(lambda connection: self._write_report(connection, report), sure=bool(self._taken))
        self._taken = told
        return changed

    def _write_report(self, connection: Connection, report: HostReport) -> set[str]:
        told = write_report(connection, self._host_id, report, self._clock.now())
        # Operations that wait for that may be another controller's.
        self._database.tell(connection, told)
        return told

    def _change(self, write: Callable[[Connection], Told], sure: bool = False) -> Told | None:
        """Have it write what is not in the rows yet; its answer, None where there was nothing. Whether there is anything is
        looked at first, unless that is ``sure``."""
        if not sure:
            try:
                with self._database.transaction(write=False) as connection:
                    write(look(connection))
                    return None
            except WouldWrite:
                pass
        with self._database.transaction() as connection:
            self._confirm(connection)
            return write(connection)


def write_facts(connection: Connection, host_id: str, facts: HostFacts | None, now: float) -> None:
    """The host answered, with these facts. Where other hosts reach it is what their documents say, too."""
    told = msgspec.json.decode(msgspec.json.encode(facts))  # as it comes out of a row
    if overlay.moved(connection, host_id, told):
        overlay.bump(connection)
    pool = facts.pool if facts is not None else ""
    _see(connection, host_id, {"facts": told, "pool": pool, "refused": "", "away_since": None}, now)


def write_report(connection: Connection, host_id: str, report: HostReport, now: float) -> set[str]:
    """Write what the host observes into the rows; states of instances follow in the workflows, not here. The ids of the
    resources whose rows changed: whoever waits for something of them can be asked again."""
    told: set[str] = set()
    if not _see(connection, host_id, {
            "observed_generation": report.generation, "networked_generation": report.networked, "vcpus": report.vcpus,
            "memory_mib": report.memory_mib, "disk_gib": report.disk_gib, "accelerator": report.accelerator,
            "entrance_state": report.entrance.state if report.entrance else "",
            "entrance_reason": report.entrance.reason if report.entrance else ""}, now):
        return told  # its row went while the report was on its way
    # Something of what is here was flattened, or has come into what its failed host left: its document says so no longer.
    weaned = False
    changed: list[dict[str, object]] = []
    known = {row["id"]: row for row in connection.execute(_GUESTS_OF, {"of_host": host_id}).mappings()}
    for guest in report.guests:
        row = known.get(guest.id)
        if row is None:
            continue
        values: dict[str, object] = {
            "observed_state": guest.state, "observed_starts": guest.starts, "observed_reboots": guest.reboots,
            "reason": guest.reason, "observed_disks": list(guest.disks), "observed_refused": guest.refused,
            "observed_mounts": guest.mounts,
            "observed_metadata": msgspec.to_builtins(guest.metadata_options),
            "observed_addresses": list(guest.public_addresses), "observed_qemu": guest.qemu}
        if guest.alone and row["origin"] is not None:
            values["origin"] = None
            weaned = True
        if guest.ours is not None:
            values["ours"] = guest.ours
        if row["heir"] and guest.state in ("running", "stopped"):
            values["heir"] = False
            weaned = True
        if guest.host_keys and list(guest.host_keys) != row["host_keys"]:
            values |= {"host_keys": list(guest.host_keys), "witnessed_at": now}
        # A report names every guest of its host, most of them as they were.
        if any(row[name] != value for name, value in values.items()):
            changed.append({f"of_{name}": value for name, value in {**row, **values}.items()})
            told.update((row["instance_id"], *(row["observed_disks"] or ()), *guest.disks))
    if changed:  # all with one statement: a host that starts ten guests tells of each
        connection.execute(_UPDATE_GUEST, changed)
    told.update(_write_moves(connection, host_id, report))
    remains.write(connection, host_id, report)
    for disk in report.disks:
        # It was flattened: whatever is asked of it from here on has nothing to do with the snapshot that it was made of.
        alone: dict[str, object] = {"origin": None} if disk.alone else {}
        written = _write(connection, disks, disk.id, host_id, {"observed_state": disk.state, "reason": disk.reason} | alone)
        weaned = weaned or "origin" in written
        told.update((disk.id,) if written else ())
    for snapshot in report.snapshots:
        written = _write(connection, snapshots, snapshot.id, host_id, {
            "observed_state": snapshot.state, "progress": snapshot.progress, "consistency": snapshot.consistency,
            "frozen_ms": snapshot.frozen_ms, "parents": list(snapshot.parents), "reason": snapshot.reason})
        told.update((snapshot.id,) if written else ())
    held = {row.digest for row in connection.execute(_IMAGES_OF, {"of_host": host_id})}
    reported = {image.digest: image for image in report.images}
    for digest in held - reported.keys():
        connection.execute(delete(images).where(images.c.host_id == host_id, images.c.digest == digest))
    for digest in reported.keys() - held:
        image = reported[digest]
        connection.execute(insert(images).values(
            host_id=host_id, digest=digest, blueprint=image.blueprint, name=image.name, user=image.user,
            version=image.version, size_gib=image.size_gib))
    _write_zones(connection, host_id, report)
    _release(connection, host_id, report)
    if weaned:
        desired.bump(connection, host_id)
    return told


def _release(connection: Connection, host_id: str, report: HostReport) -> None:
    """Addresses that led to guests of the host, and lead there no more, are free."""
    for row in connection.execute(_LEAVING, {"of_host": host_id}).all():
        if report.generation > row.generation and not any(row.address in guest.public_addresses for guest in report.guests):
            connection.execute(delete(leaving_addresses).where(
                leaving_addresses.c.host_id == host_id, leaving_addresses.c.address == row.address))


@functools.cache
def _seen(names: tuple[str, ...]) -> Select[tuple[Any, ...]]:
    return select(hosts.c.seen_at, *(hosts.c[name] for name in names)).where(hosts.c.id == bindparam("of_host"))


def _see(connection: Connection, host_id: str, values: dict[str, object], now: float) -> bool:
    """Change the host's row, where it is not so already, or it is a while ago that the host was last heard; whether there is
    one."""
    row = connection.execute(_seen(tuple(values)), {"of_host": host_id}).mappings().first()
    if row is not None and (now - (row["seen_at"] or 0.0) >= SEEN_SECONDS or any(
            row[name] != value for name, value in values.items())):
        connection.execute(update(hosts).where(hosts.c.id == host_id).values(seen_at=now, **values))
    return row is not None


def _write(connection: Connection, table: Table, identifier: str, host_id: str, values: dict[str, object]) -> set[str]:
    """Change the row, if there is one of this host, where it is not so already; the names of what changed. What went to
    another host with its guest is told of by that one."""
    row = connection.execute(select(table).where(table.c.id == identifier, table.c.host_id == host_id)).mappings().first()
    changed = {name: value for name, value in values.items() if row is not None and row[name] != value}
    if changed:
        connection.execute(update(table).where(table.c.id == identifier).values(**changed))
    return set(changed)


def _write_moves(connection: Connection, host_id: str, report: HostReport) -> set[str]:
    """What the two ends say of guests that move; the instances that one of them said anything new of."""
    told = set()
    seen = {guest.id: guest for guest in report.guests}
    gone = {disk.id for disk in report.disks if disk.state == "gone"}
    for row in connection.execute(_MOVES_OF, {"of_host": host_id}).mappings():
        going, coming = seen.get(row["guest"]), seen.get(row["id"])
        values: dict[str, object] = {}
        if row["source"] == host_id and going is not None:
            ours = going.progress is not None and going.progress.guest == row["id"]
            values |= {"source_state": going.state, "progress": msgspec.to_builtins(going.progress) if ours else None}
            if ours and going.passport is not None and row["passport"] is None:
                values["passport"] = msgspec.to_builtins(going.passport)
        if row["source"] == host_id and row["phase"] == "clearing":
            values["remains"] = [identifier for identifier in row["remains"] if identifier not in gone]
        if row["target"] == host_id and coming is not None:
            values |= {"target_state": coming.state, "target_reason": coming.reason}
            if coming.pull is not None:
                values["pull"] = msgspec.to_builtins(coming.pull)
            if coming.destination is not None and coming.state == "listening":
                values["destination"] = msgspec.to_builtins(coming.destination)
        if any(row[name] != value for name, value in values.items()):
            connection.execute(update(moves).where(moves.c.id == row["id"]).values(**values))
            told.add(row["instance_id"])
            # What the source is told follows from these words themselves, and not from a phase (hosts/transit.py).
            end = {"returning": "target_state", "clearing": "source_state"}.get(row["phase"], "")
            if end and values.get(end) == "gone" != row[end]:
                desired.bump(connection, host_id)
    return told


def _write_zones(connection: Connection, host_id: str, report: HostReport) -> None:
    """Only what changed is written: a report comes with every guest's news, and zones may be many."""
    held = {row["domain_id"]: row for row in connection.execute(_ZONES_OF, {"of_host": host_id}).mappings()}
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
