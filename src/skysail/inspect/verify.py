"""Verify: the rows against each other, and against what their hosts really hold. Names every difference; changes nothing.

What is in motion is not a difference: a look that finds any is repeated, and only what stays is told.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import httpx
import msgspec
from cryptography.exceptions import InvalidTag
from sqlalchemy import Connection, RowMapping, select

from skysail.contract import VERSION
from skysail.contract.document import HostDocument, Zone
from skysail.contract.report import HeldZone, Inventory
from skysail.dns.sim import SIMULATED
from skysail.hosts import credentials, desired
from skysail.hosts.authority import Authority
from skysail.hosts.client import look
from skysail.images.library import Library, file_digest
from skysail.inspect import blocks, networks
from skysail.inspect.difference import Difference
from skysail.kit.config import Config
from skysail.metadata import tree
from skysail.resources import catalog
from skysail.resources.names import GLOBAL
from skysail.resources.snapshot_rows import WHOLE
from skysail.store.database import flaws
from skysail.store.schema import (
    access_keys,
    accounts,
    alarms,
    authorities,
    contact_methods,
    deliveries,
    disks,
    domain_entries,
    domains,
    guests,
    hosts,
    instances,
    key_pairs,
    measurements,
    meters,
    names,
    operations,
    ports,
    snapshots,
    static_ips,
    tags,
)
from skysail.store.vault import Vault
from skysail.store.visit import visit

# Longer than the slowest cold boot under emulation: an operation that is still open then is stuck.
STUCK_SECONDS = 900.0
LOOKS = 4
PAUSE_SECONDS = 1.5


def verify(config: Config, pause_seconds: float = PAUSE_SECONDS) -> list[Difference]:
    """Every difference of the cloud in ``config.data`` that lasts over looks ``pause_seconds`` apart; empty when all is well.

    Raises :class:`SkysailError` when there is no cloud there, or its database cannot be read.
    """
    found = _look(config)
    for _ in range(LOOKS - 1):
        if not found:
            break
        time.sleep(pause_seconds)
        again = set(_look(config))
        found = [difference for difference in found if difference in again]
    return found


def _look(config: Config) -> list[Difference]:
    found = visit(config, lambda connection: _rows(connection, config), list[Difference])
    kept = blocks.files(config.snapshots_dir) if config.engines == "real" else ()
    return [*found, *_images(config), *kept]


def _rows(connection: Connection, config: Config) -> list[Difference]:
    found = [*_database(connection), *_names(connection), *_instances(connection), *_addresses(connection),
             *_owners(connection), *_metrics(connection), *blocks.rows(connection), *blocks.automatic(connection),
             *networks.rows(connection),
             *_work(connection, time.time()), *_secrets(connection, Vault.at(config.master_key))]
    try:
        context = _context(connection, config)
    except InvalidTag:
        return [*found, Difference(subject="authority of hosts", saw="does not open with this cloud's master key",
                                   wanted="a secret sealed here")]
    for host in connection.execute(select(hosts)).mappings().all():
        found += _host(connection, host, config, context)
    return found


def _database(connection: Connection) -> Iterator[Difference]:
    """The database itself: its own checks, and the schema's version."""
    for subject, saw, wanted in flaws(connection):
        yield Difference(subject=subject, saw=saw, wanted=wanted)


def _names(connection: Connection) -> Iterator[Difference]:
    """Each named resource holds its name, and each name is held by a resource."""
    held = {(row.account_id, row.region, row.name): row.resource_id for row in connection.execute(select(names))}
    real: dict[tuple[str, str, str], str] = {}
    for kind, table in (("Instance", instances), ("KeyPair", key_pairs), ("StaticIp", static_ips), ("Alarm", alarms)):
        for row in connection.execute(select(table.c.account_id, table.c.region, table.c.name, table.c.id)):
            key = (row.account_id, row.region, row.name)
            real[key] = row.id
            if held.get(key) != row.id:
                yield Difference(subject=f"{kind} {row.name}", saw="its name is not registered", wanted="a row in names")
    stored = [("Disk", select(disks).where(disks.c.role == "keep")),
              ("Snapshot", select(snapshots).where(snapshots.c.deleted.is_(False), snapshots.c.auto_day == ""))]
    for kind, query in stored:
        for row in connection.execute(query):
            key = (row.account_id, row.region, row.name)
            real[key] = row.id
            if held.get(key) != row.id:
                yield Difference(subject=f"{kind} {row.name}", saw="its name is not registered", wanted="a row in names")
    for row in connection.execute(select(domains).where(domains.c.role == "serve")):
        key = (row.account_id, GLOBAL, row.name)
        real[key] = row.id
        if held.get(key) != row.id:
            yield Difference(subject=f"Domain {row.name}", saw="its name is not registered", wanted="a row in names")
    for key in held.keys() - real.keys():
        yield Difference(subject=f"name {key[2]}", saw="taken, but nothing has it", wanted="a free name")


def _instances(connection: Connection) -> Iterator[Difference]:
    """Each instance has one guest, of its bundle's size, in the role that its state says."""
    running = Counter(row.instance_id for row in connection.execute(select(guests.c.instance_id)))
    busy = set(connection.execute(select(operations.c.resource_id).where(operations.c.done.is_(False))).scalars())
    known = set()
    for row in connection.execute(
            select(instances, guests.c.role, guests.c.vcpus, guests.c.memory_mib, guests.c.disk_gib, guests.c.observed_state,
                   guests.c.public_ipv4, guests.c.public_ipv6, guests.c.observed_addresses)
            .outerjoin(guests, guests.c.instance_id == instances.c.id)).mappings():
        known.add(row["id"])
        subject = f"instance {row['name']}"
        if running[row["id"]] != 1:
            yield Difference(subject=subject, saw=f"{running[row['id']]} guests", wanted="one guest")
            continue
        bundle = catalog.BUNDLES.get(row["bundle_id"])
        if bundle is None:
            yield Difference(subject=subject, saw=f"bundle {row['bundle_id']}", wanted="a bundle of the catalogue")
        elif (row["vcpus"], row["memory_mib"]) != (bundle["cpuCount"], round(bundle["ramSizeInGb"] * 1024)):
            yield Difference(subject=subject, saw=f"{row['vcpus']} processors, {row['memory_mib']} MiB",
                             wanted=f"what {row['bundle_id']} has")
        elif (row["public_ipv4"] is not None) != bool(bundle["publicIpv4AddressCount"]):
            yield Difference(subject=subject, saw=f"public IPv4 address {row['public_ipv4'] or 'none'}",
                             wanted=f"as many as {row['bundle_id']} has")
        if row["public_ipv4"] is None and row["public_ipv6"] is None:
            yield Difference(subject=subject, saw="no public address", wanted="one at least")
        if row["id"] in busy:
            continue
        if row["observed_addresses"] != [*filter(None, (row["public_ipv4"], row["public_ipv6"]))]:
            yield Difference(subject=subject, wanted="its public addresses",
                             saw=f"its host leads {', '.join(row['observed_addresses'] or ()) or 'nothing'} to it")
        role = {"running": "run", "pending": "run", "rebooting": "run", "stopped": "stop"}.get(row["state"])
        if row["role"] != role:
            yield Difference(subject=subject, saw=f"{row['state']}, its guest's role is {row['role']}",
                             wanted="state and role that agree")
        if row["state"] == "running" and row["observed_state"] != "running":
            yield Difference(subject=subject, saw=f"running, its host says {row['observed_state'] or 'nothing'}",
                             wanted="the state that the host observes")
    for row in connection.execute(select(guests.c.id, guests.c.role, guests.c.instance_id)).mappings():
        if row["instance_id"] not in known and row["role"] != "gone":
            yield Difference(subject=f"guest {row['id']}", saw="no instance owns it", wanted="an instance, or the role gone")


def _addresses(connection: Connection) -> Iterator[Difference]:
    """An attached static IP is its instance's public address, any other one is nobody's."""
    holders = {row.public_ipv4: row.instance_id for row in connection.execute(
        select(guests.c.public_ipv4, guests.c.instance_id))}
    for row in connection.execute(select(static_ips)):
        if holders.get(row.ipv4) != row.instance_id:
            yield Difference(subject=f"static IP {row.name}", wanted=f"instance {row.instance_id or 'none'}",
                             saw=f"instance {holders.get(row.ipv4) or 'none'} has its address")


def _owners(connection: Connection) -> Iterator[Difference]:
    """What belongs to a resource goes with it."""
    known = set(connection.execute(select(domains.c.id).where(domains.c.role == "serve")).scalars())
    for owners in (instances, key_pairs, static_ips, alarms, contact_methods):
        known |= set(connection.execute(select(owners.c.id)).scalars())
    known |= set(connection.execute(select(disks.c.id).where(disks.c.role == "keep")).scalars())
    known |= set(connection.execute(select(snapshots.c.id).where(snapshots.c.deleted.is_(False))).scalars())
    for table, column in ((tags, tags.c.resource_id), (ports, ports.c.instance_id),
                          (domain_entries, domain_entries.c.domain_id)):
        for owner in set(connection.execute(select(column)).scalars()) - known:
            yield Difference(subject=f"{table.name} of {owner}", saw="their resource is gone", wanted="none")


def _metrics(connection: Connection) -> Iterator[Difference]:
    """What is measured can be swept, and notices reach somebody."""
    swept = select(meters.c.instance_id)
    for owner in connection.execute(select(measurements.c.instance_id).where(
            measurements.c.instance_id.not_in(swept)).distinct()).scalars():
        yield Difference(subject=f"measurements of {owner}", saw="no meter, so that they never go", wanted="none")
    for row in connection.execute(select(deliveries).where(deliveries.c.due_at.is_(None))):
        yield Difference(subject=f"notice {row.subject!r} to {row.endpoint}", wanted="a receiver",
                         saw=f"given up after {row.attempts} attempts: {row.error}")
    senders = select(contact_methods.c.id)
    for row in connection.execute(select(deliveries.c.id).where(deliveries.c.contact_method_id.not_in(senders))):
        yield Difference(subject=f"notice {row.id}", saw="its contact method is gone", wanted="none")


def _work(connection: Connection, now: float) -> Iterator[Difference]:
    """No operation stays open for ever, and none is open without a workflow to carry it on."""
    for row in connection.execute(select(operations).where(operations.c.done.is_(False))).mappings():
        subject = f"operation {row['id']} ({row['type']} {row['resource_name']})"
        if not row["workflow"]:
            yield Difference(subject=subject, saw="open, and nothing carries it on", wanted="a workflow")
        elif now - row["created_at"] > STUCK_SECONDS:
            yield Difference(subject=subject, saw=f"open since {_moment(row['created_at'])}", wanted="an end")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _secrets(connection: Connection, vault: Vault) -> Iterator[Difference]:
    """Each sealed secret opens with the cloud's master key."""
    sealed = [(f"access key {row.id}", row.secret_sealed, f"access-key:{row.id}")
              for row in connection.execute(select(access_keys))]
    sealed += [(f"authority of {row.region}", row.private_sealed, f"authority:{row.region}")
               for row in connection.execute(select(authorities))]
    sealed += [(f"key pair {row.name}", row.private_sealed, f"default-key:{row.account_id}:{row.region}")
               for row in connection.execute(select(key_pairs).where(key_pairs.c.private_sealed.is_not(None)))]
    sealed += [(f"zone key of {row.name}", row.signing_sealed, f"zone:{row.id}")
               for row in connection.execute(select(domains).where(domains.c.signing_sealed.is_not(None)))]
    for subject, secret, purpose in sealed:
        try:
            vault.open(secret, purpose)
        except InvalidTag:
            yield Difference(subject=subject, saw="does not open with this cloud's master key", wanted="a secret sealed here")
    if not connection.execute(select(accounts.c.id)).first():
        yield Difference(subject="accounts", saw="none", wanted="at least the admin's")


def _context(connection: Connection, config: Config) -> ssl.SSLContext | None:
    """By which hosts elsewhere are looked at; None where there never was any."""
    by = Authority.find(connection, Vault.at(config.master_key), config.certificate_seconds)
    if by is None:
        return None
    made = credentials.calling(by)
    credentials.show_controller(made, by, time.time())
    return made


def _host(connection: Connection, host: RowMapping, config: Config, context: ssl.SSLContext | None) -> Iterator[Difference]:
    """The rows of one host against the machine."""
    subject = f"host {host['id']}"
    try:
        document = desired.compile(connection, host["id"], Vault.at(config.master_key))
    except InvalidTag:  # a zone's key, of which the secrets' look has told
        yield Difference(subject=subject, saw="no document can be made for it", wanted="secrets that open")
        return
    try:
        with look(host["address"], context) as agent:
            there = msgspec.json.decode(agent.get("/inventory").raise_for_status().content, type=Inventory)
            held = msgspec.json.decode(agent.get("/document").raise_for_status().content, type=HostDocument | None)
    except (httpx.HTTPError, OSError):
        # Without the reason, which is another one from look to look: host show has it.
        yield Difference(subject=subject, saw="its agent does not answer", wanted="an agent that runs")
        return
    if held is None or held.generation != document.generation:
        yield Difference(subject=subject, saw=f"its agent holds generation {held.generation if held else 'none'}",
                         wanted=f"generation {document.generation}")
    elif _ordered(held) != _ordered(document):
        yield Difference(subject=subject, saw=f"its agent's generation {held.generation} is another document",
                         wanted="the document that the rows say")
    wanted = {guest.id: guest for guest in document.guests if guest.role != "gone"}
    leaving = {guest.id for guest in document.guests if guest.role == "gone"}
    called = {guest.id: f"guest {guest.id} of {guest.instance}" for guest in document.guests}
    for identifier in sorted(identifier for identifier, guest in wanted.items() if guest.volume.id not in there.volumes):
        yield Difference(subject=called[identifier], saw="its host has no volume of it", wanted="a volume")
    for kind, found in (("guest", there.guests), ("port", there.ports)):
        for identifier in sorted(wanted.keys() - set(found)):
            if kind == "port" and wanted[identifier].stranded:
                continue  # it has no place in the network
            yield Difference(subject=called[identifier], saw=f"its host has no {kind} of it", wanted=f"a {kind}")
        for identifier in sorted(set(found) - wanted.keys() - leaving):
            yield Difference(subject=f"{kind} {identifier}", saw=f"there on {host['id']}, but no row knows it", wanted="none")
    for identifier, guest in sorted(wanted.items()):
        # One that moves runs here or elsewhere, and may change from one to the other at this moment.
        if guest.role in ("run", "stop") and (guest.role == "run") != (identifier in there.running):
            yield Difference(subject=called[identifier],
                             saw=f"its process {'runs' if identifier in there.running else 'does not run'}",
                             wanted=f"the role {guest.role}")
    whole = set(connection.execute(select(snapshots.c.id).where(
        snapshots.c.host_id == host["id"], snapshots.c.role == "keep", snapshots.c.state.in_(WHOLE.values()))).scalars())
    yield from blocks.host(document, there, whole, _pooled(connection, host, config))
    yield from networks.host(document, there, bool(config.peer_subnets))
    for stray in there.strays:
        yield Difference(subject=subject, saw=stray, wanted="only what the rows know")
    yield from _entrance(host, document, there)
    yield from _metadata(document, there.metadata)
    signers = {row.name + ".": row.ds for row in connection.execute(select(domains))}
    yield from _zones(document.zones, there.zones, signers)


def _pooled(connection: Connection, host: RowMapping, config: Config) -> list[HostDocument]:
    """The documents of all other hosts that have their disks where this one has."""
    found = connection.execute(select(hosts.c.id).where(hosts.c.pool != "", hosts.c.pool == host["pool"],
                                                        hosts.c.id != host["id"])).scalars().all()
    return [desired.compile(connection, other, Vault.at(config.master_key)) for other in found]


def _ordered(document: HostDocument) -> HostDocument:
    """The document with zones and record sets by name: those that came in parts are in the parts' order. The version is that
    of the controller that wrote it, the life the agent's that it was written for."""
    return msgspec.structs.replace(document, version=VERSION, life="", zones=tuple(
        msgspec.structs.replace(zone, record_sets=tuple(sorted(zone.record_sets, key=lambda one: (one.name, one.type))))
        for zone in sorted(document.zones, key=lambda zone: zone.name)))


def _metadata(document: HostDocument, held: Mapping[str, str] | None) -> Iterator[Difference]:
    """What guests are told of themselves is what the rows say, and nobody else is told anything."""
    wanted = {one.id: tree.digest(one) for one in map(tree.record, document.guests) if one is not None}
    if held is None:
        if wanted:
            yield Difference(subject=f"host {document.host}", saw="nobody answers instances that ask for their metadata",
                             wanted="a process that does")
        return
    for guest in document.guests:
        if guest.id in wanted and held.get(guest.id) != wanted[guest.id]:
            yield Difference(subject=f"metadata of guest {guest.id} of {guest.instance}", wanted="what the rows say",
                             saw="it is told something else" if guest.id in held else "it is told nothing")
    for identifier in sorted(held.keys() - wanted.keys()):
        yield Difference(subject=f"metadata of guest {identifier}", saw="told to nobody that the rows know", wanted="none")


def _entrance(host: RowMapping, document: HostDocument, there: Inventory) -> Iterator[Difference]:
    """The names that the rows say against those that lead to guests."""
    subject = f"entrance of {host['id']}"
    state = host["entrance_state"] if document.entrance else "served"
    if state != "served":
        yield Difference(subject=subject, saw=f"{state or 'nothing said of it'} {host['entrance_reason']}".strip(),
                         wanted="one that serves")
    addresses = {guest.id: guest.port.private_ipv4 for guest in document.guests}
    wanted = {one.name: addresses[one.guest] for one in document.entrance.names} if document.entrance else {}
    for name in sorted(wanted.keys() | there.names.keys()):
        if wanted.get(name) != there.names.get(name):
            yield Difference(subject=f"{subject}, {name}", saw=f"leads to {there.names.get(name, 'nobody')}",
                             wanted=wanted.get(name, "nobody"))


def _zones(wanted: Sequence[Zone], held: Sequence[HeldZone], signers: Mapping[str, str]) -> Iterator[Difference]:
    """The zones that the rows say against those that the name server has."""
    there = {zone.name: zone for zone in held}
    for zone in wanted:
        found = there.pop(zone.name, None)
        if zone.role == "gone":
            continue
        subject = f"zone {zone.name}"
        if found is None:
            yield Difference(subject=subject, saw="its host's name server does not have it", wanted="a zone")
            continue
        if found.serial < zone.serial:
            yield Difference(subject=subject, saw=f"serial {found.serial}", wanted=f"serial {zone.serial} or more")
        sets = {(one.name, one.type): one for one in zone.record_sets}
        for one in found.record_sets:
            other = sets.pop((one.name, one.type), None)
            if one != other:
                yield Difference(subject=f"{subject}, {one.type} {one.name}", saw=f"{one.ttl} {', '.join(one.records)[:200]}",
                                 wanted=f"{other.ttl} {', '.join(other.records)[:200]}" if other else "no such record")
        for name, kind in sets:
            yield Difference(subject=f"{subject}, {kind} {name}", saw="not there", wanted="the records that the rows say")
        signer = signers.get(zone.name, "")
        if bool(signer) != bool(found.ds) or (signer not in found.ds and found.ds not in ((), SIMULATED)):
            yield Difference(subject=subject, saw=f"keys with the DS records {', '.join(found.ds) or 'none'}",
                             wanted=f"{signer or 'no key'}")
    for name in sorted(there):
        yield Difference(subject=f"zone {name}", saw="served, but no row knows it", wanted="none")


def _images(config: Config) -> Iterator[Difference]:
    """Each image is still the file that its name says."""
    if config.engines != "real":
        return
    library = Library(config.images_dir)
    for image in library.list():
        try:
            saw = "" if file_digest(library.path(image.digest)) == image.digest else "its content has changed"
        except FileNotFoundError:  # perhaps it is being removed: the next look shows
            saw = "its file is missing"
        if saw:
            yield Difference(subject=f"image {image.blueprint} {image.digest[:12]}", saw=saw,
                             wanted="the content that its digest names")
