"""Rows to document: what one host shall hold. Reads rows, decides nothing, touches no host."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from sqlalchemy import Connection, RowMapping, or_, select, update

from skysail.contract.document import (
    Attachment,
    Disk,
    FirewallRule,
    Guest,
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
from skysail.hosts import entrance, plans, reverse
from skysail.hosts.zones import ZoneCompiler
from skysail.store.schema import (
    disks,
    domain_entries,
    guests,
    hosts,
    instances,
    networks,
    ports,
    reverse_zones,
    snapshots,
)
from skysail.store.vault import Vault

_OF_INSTANCE = (instances.c.bundle_id, instances.c.region, instances.c.zone, instances.c.key_pair_name,
                instances.c.created_at, instances.c.metadata_options, instances.c.ssh_port)
_BUMP_ALL = update(hosts).values(generation=hosts.c.generation + 1)


def bump(connection: Connection, host_id: str) -> None:
    """The host's document changed: give it the next generation. Where there are aliases or reverse zones, every host's did:
    they may follow what changed."""
    aliases = select(domain_entries.c.id).where(domain_entries.c.alias != "").exists()
    reversed_ = select(reverse_zones.c.id).exists()
    connection.execute(update(hosts).where(or_(hosts.c.id == host_id, aliases, reversed_)).values(
        generation=hosts.c.generation + 1))


def bump_zones(connection: Connection) -> None:
    """A zone changed: every host that answers for zones, which all do, gets its next generation."""
    connection.execute(_BUMP_ALL)


def bump_networks(connection: Connection) -> dict[str, int]:
    """Networks were joined or parted: every host gets its next generation; which each has now."""
    bump_zones(connection)
    return {row.id: row.generation for row in connection.execute(select(hosts.c.id, hosts.c.generation))}


def compile(connection: Connection, host_id: str, vault: Vault, zones: ZoneCompiler | None = None) -> HostDocument:
    """The desired document of ``host_id`` at its current generation; ``vault`` opens the zones' signing keys. ``zones`` keeps
    those that do not change from one document to the next."""
    host = connection.execute(select(hosts).where(hosts.c.id == host_id)).mappings().one()
    rules: dict[str, list[FirewallRule]] = {}
    for port in connection.execute(select(ports).order_by(ports.c.protocol, ports.c.from_port, ports.c.to_port)):
        rules.setdefault(port.instance_id, []).append(FirewallRule(
            protocol=port.protocol, from_port=port.from_port, to_port=port.to_port, cidrs=tuple(port.cidrs),
            ipv6_cidrs=tuple(port.ipv6_cidrs)))
    stored = connection.execute(select(disks).where(disks.c.host_id == host_id).order_by(disks.c.id)).mappings().all()
    attached: dict[str, list[Attachment]] = {}
    for disk in stored:
        if disk["instance_id"] is not None:
            attached.setdefault(disk["instance_id"], []).append(
                Attachment(volume=disk_volume(disk), name=disk["path"].removeprefix("/dev/"), mount=disk["auto_mount"]))
    found = tuple(
        Guest(
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
            baseline_percent=plans.baseline_percent(row["bundle_id"]), metadata=_metadata(row))
        for row in connection.execute(
            select(guests, *_OF_INSTANCE).outerjoin(instances, instances.c.id == guests.c.instance_id)
            .where(guests.c.host_id == host_id).order_by(guests.c.id)).mappings())
    return HostDocument(
        host=host_id, generation=host["generation"], guests=found, entrance=entrance.compile(connection, host),
        disks=tuple(Disk(volume=disk_volume(row), role=row["role"], made=row["made"]) for row in stored),
        snapshots=tuple(
            Snapshot(id=row["id"], role=row["role"], guest=row["guest_id"], duplicates=row["duplicates"] or None,
                     arrived=row["arrived"], leaving=row["deleted"],
                     volumes=msgspec.convert(row["volumes"], tuple[Volume, ...]))
            for row in connection.execute(select(snapshots).where(snapshots.c.host_id == host_id).order_by(snapshots.c.id))
            .mappings()),
        zones=(*(zones or ZoneCompiler()).zones(connection, vault), *reverse.zones(connection)),
        networks=tuple(joined(connection)))


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
    return Volume(id=guest["id"], image=guest["image"], size_gib=guest["disk_gib"], origin=_origin(guest))


def disk_volume(disk: RowMapping) -> Volume:
    """The volume that is a block-storage disk."""
    return Volume(id=disk["id"], image="", size_gib=disk["size_gib"], origin=_origin(disk))


def _origin(row: RowMapping) -> Origin | None:
    return msgspec.convert(row["origin"], Origin | None)
