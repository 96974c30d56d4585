"""Rows to document: what one host shall hold. Reads rows, decides nothing, touches no host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
from sqlalchemy import Connection, RowMapping, or_, select, update

from skysail.contract.document import (
    Attachment,
    Disk,
    FirewallRule,
    Guest,
    Heritage,
    HostDocument,
    Metadata,
    MetadataOptions,
    Network,
    Origin,
    Personality,
    Port,
    Snapshot,
    Volume,
)
from skysail.contract.migration import SYSTEM_DISK
from skysail.hosts import entrance, overlay, plans, remains, reverse, transit
from skysail.hosts.transit import Move
from skysail.hosts.zones import ZoneCompiler
from skysail.store.schema import (
    disks,
    domain_entries,
    guests,
    hosts,
    instances,
    moves,
    networks,
    ports,
    reverse_zones,
    snapshots,
)
from skysail.store.vault import Vault

_OF_INSTANCE = (instances.c.bundle_id, instances.c.region, instances.c.zone, instances.c.key_pair_name,
                instances.c.created_at, instances.c.metadata_options, instances.c.ssh_port)
_NEXT = {"generation": hosts.c.generation + 1}
_BUMP_NAME_SERVERS = update(hosts).where(hosts.c.name_server).values(_NEXT)
# Made once, for each launch comes by. Greater than '' is what an index answers.
_FOLLOWED = select(or_(select(domain_entries.c.id).where(domain_entries.c.alias > "").exists(),
                       select(reverse_zones.c.id).exists()))


def bump(connection: Connection, host_id: str) -> None:
    """The host's document changed: give it the next generation, and those whose guests come from it or go to it, which may be
    the ones that changed. Where there are aliases or reverse zones, that of every host that answers for zones did: they may
    follow what changed."""
    others = [select(there).where(here == host_id) for here, there in
              ((moves.c.source, moves.c.target), (moves.c.target, moves.c.source))]
    connection.execute(update(hosts).where(or_(
        hosts.c.id == host_id, *(hosts.c.id.in_(other) for other in others))).values(_NEXT))
    if connection.execute(_FOLLOWED).scalar_one():
        connection.execute(_BUMP_NAME_SERVERS.where(hosts.c.id != host_id))


def bump_zones(connection: Connection) -> None:
    """A zone changed: every host that answers for zones gets its next generation."""
    connection.execute(_BUMP_NAME_SERVERS)


def bump_networks(connection: Connection) -> dict[str, int]:
    """Networks were joined or parted: every host gets its next generation; which each has now."""
    connection.execute(update(hosts).values(_NEXT))
    return {row.id: row.generation for row in connection.execute(select(hosts.c.id, hosts.c.generation))}


def compile(connection: Connection, host_id: str, vault: Vault, zones: ZoneCompiler | None = None) -> HostDocument:
    """The desired document of ``host_id`` at its current generation; ``vault`` opens the zones' signing keys. ``zones`` keeps
    those that do not change from one document to the next."""
    host = connection.execute(select(hosts).where(hosts.c.id == host_id)).mappings().one()
    rules: dict[str, list[FirewallRule]] = {}
    under_way = _moves(connection, host_id)
    elsewhere = [move.instance_id for move in under_way]
    # Those of this host's guests, and of those that move: there may be a million of others.
    here = select(guests.c.instance_id).where(guests.c.host_id == host_id)
    for port in connection.execute(select(ports).where(or_(
            ports.c.instance_id.in_(here), ports.c.instance_id.in_(elsewhere))).order_by(
            ports.c.protocol, ports.c.from_port, ports.c.to_port)):
        rules.setdefault(port.instance_id, []).append(FirewallRule(
            protocol=port.protocol, from_port=port.from_port, to_port=port.to_port, cidrs=tuple(port.cidrs),
            ipv6_cidrs=tuple(port.ipv6_cidrs)))
    stored = connection.execute(select(disks).where(disks.c.host_id == host_id).order_by(disks.c.id)).mappings().all()
    attached: dict[str, list[Attachment]] = {}
    for disk in stored:
        if disk["instance_id"] is not None:
            attached.setdefault(disk["instance_id"], []).append(
                Attachment(volume=disk_volume(disk), name=disk["path"].removeprefix("/dev/"), mount=disk["auto_mount"]))
    rows = connection.execute(
        select(guests, *_OF_INSTANCE).outerjoin(instances, instances.c.id == guests.c.instance_id)
        .where(or_(guests.c.host_id == host_id, guests.c.instance_id.in_(elsewhere)) if elsewhere
               else guests.c.host_id == host_id).order_by(guests.c.id)).mappings().all()

    def guest(row: RowMapping) -> Guest:
        return Guest(
            id=row["id"], instance=row["instance_name"], role=row["role"], starts=row["starts"],
            reboots=row["reboots"], force=row["force"], vcpus=row["vcpus"], memory_mib=row["memory_mib"],
            volume=system_volume(row), disks=tuple(attached.get(row["instance_id"], ())),
            iops=row["iops"],
            port=Port(id=row["id"], mac=row["mac"], network=row["network"],
                      private_ipv4=row["private_ipv4"], public_ipv4=row["public_ipv4"] or "",
                      public_ipv6=row["public_ipv6"] or "",
                      firewall=tuple(rules.get(row["instance_id"], ())),
                      ssh_port=(row["ssh_port"] or 0) if host["shared_address"] else 0),
            personality=msgspec.convert(row["personality"], Personality),
            baseline_percent=plans.baseline_percent(row["bundle_id"]), metadata=_metadata(row),
            heritage=Heritage(host_key=next(iter(row["host_keys"]), ""), ours=row["ours"]) if row["heir"] else None)

    left = remains.compile(connection, host_id)
    found = tuple(sorted((*_guests(connection, host_id, {row["instance_id"]: guest(row) for row in rows},
                                   {row["instance_id"] for row in rows if row["host_id"] == host_id}, under_way),
                          *left.guests), key=lambda one: one.id))
    # Not begun while its guest moves: it is taken where the guest is then.
    moving = {move.guest for move in under_way if move.source == host_id and move.before and move.phase != "failed"}
    networks_ = tuple(joined(connection))
    spans = overlay.compile(connection, host_id)
    if spans is not None:
        networks_ = overlay.spanning({guest.port.network for guest in found}, networks_)
    return HostDocument(
        host=host_id, generation=host["generation"], guests=found, entrance=entrance.compile(connection, host),
        disks=(*(Disk(volume=disk_volume(row), role=row["role"], made=row["made"]) for row in stored),
               *_remains(connection, host_id, under_way), *left.disks),
        snapshots=tuple(
            Snapshot(id=row["id"], role=row["role"], guest=row["guest_id"], duplicates=row["duplicates"] or None,
                     arrived=row["arrived"], leaving=row["deleted"],
                     volumes=msgspec.convert(row["volumes"], tuple[Volume, ...]))
            for row in connection.execute(select(snapshots).where(snapshots.c.host_id == host_id).order_by(snapshots.c.id))
            .mappings() if not (row["guest_id"] in moving and waits(row))),
        zones=(*(zones or ZoneCompiler()).zones(connection, vault), *reverse.zones(connection))
        if host["name_server"] else (),
        networks=networks_, overlay=spans)


def _moves(connection: Connection, host_id: str) -> list[Move]:
    """Those that come to the host, or go from it."""
    return [Move.of(row) for row in connection.execute(select(moves).where(
        or_(moves.c.source == host_id, moves.c.target == host_id)).order_by(moves.c.id)).mappings()]


def _guests(connection: Connection, host_id: str, found: Mapping[str, Guest], here: Collection[str],
            under_way: Sequence[Move]) -> Iterator[Guest]:
    """The guests of the host's document. ``found`` has each guest by its instance; those ``here`` have their row here."""
    told = set[str]()
    for move in under_way:
        guest = found.get(move.instance_id)
        if guest is None:
            continue
        if move.passport is not None and (move.before or move.source == host_id):
            # As they were when it said who it is: a disk that comes or goes meanwhile calls the attempt off first.
            guest = msgspec.structs.replace(guest, disks=_along(connection, move))
        at = transit.at_source(guest, move) if move.source == host_id else transit.at_target(guest, move)
        if at is None or (move.phase == "failed" and move.source == host_id):
            continue
        if (move.source == host_id) == move.before:
            told.add(move.instance_id)
        yield at
    yield from (found[instance] for instance in here if instance not in told)


def _along(connection: Connection, move: Move) -> tuple[Attachment, ...]:
    """The block storage that goes along with a guest."""
    assert move.passport is not None
    rows = {row["id"]: row for row in connection.execute(select(disks).where(disks.c.id.in_(move.disks))).mappings()}
    return tuple(Attachment(volume=disk_volume(rows[one.volume]), name=one.name, mount=rows[one.volume]["auto_mount"])
                 for one in move.passport.disks if one.name != SYSTEM_DISK and one.volume in rows)


def _remains(connection: Connection, host_id: str, under_way: Sequence[Move]) -> Iterator[Disk]:
    """Copies of block storage that went elsewhere with its guest: nobody has them open any more once that is gone."""
    for move in under_way:
        if move.source == host_id and move.phase == "clearing" and move.source_state == "gone":
            for row in connection.execute(select(disks).where(disks.c.id.in_(move.remains)).order_by(disks.c.id)).mappings():
                yield Disk(volume=disk_volume(row), role="gone", made=True)


def waits(snapshot: RowMapping) -> bool:
    """Whether a snapshot of a guest has not been begun."""
    return snapshot["state"] == "pending" and snapshot["observed_state"] in ("", "waiting") and snapshot["role"] == "keep"


def joined(connection: Connection) -> Iterator[Network]:
    """The peered networks, by number: each is joined with the peer subnets, and with those of its account's others that are
    peered too."""
    rows = connection.execute(select(networks).where(networks.c.peered).order_by(networks.c.number)).all()
    of_account: dict[str, list[int]] = {}
    for row in rows:
        of_account.setdefault(row.account_id, []).append(row.number)
    for row in rows:
        peers = tuple(number for number in of_account[row.account_id] if number != row.number)
        yield Network(number=row.number, peers=peers, routed=True)


def metadata_options(instance: RowMapping) -> MetadataOptions:
    """How the instance may read its metadata."""
    return msgspec.convert(instance["metadata_options"] or {}, MetadataOptions)


def _metadata(row: RowMapping) -> Metadata | None:
    if row["region"] is None:
        return None  # its instance is deleted
    return Metadata(instance_id=row["instance_id"], account=row["account_id"], region=row["region"], zone=row["zone"],
                    bundle=row["bundle_id"], key_name=row["key_pair_name"], launched_at=row["created_at"],
                    options=metadata_options(row))


def system_volume(guest: RowMapping) -> Volume:
    """The system disk of a guest."""
    return Volume(id=guest["volume"] or guest["id"], image=guest["image"], size_gib=guest["disk_gib"], origin=_origin(guest))


def disk_volume(disk: RowMapping) -> Volume:
    """The volume that is a block-storage disk."""
    return Volume(id=disk["id"], image="", size_gib=disk["size_gib"], origin=_origin(disk))


def _origin(row: RowMapping) -> Origin | None:
    return msgspec.convert(row["origin"], Origin | None)
