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
    Origin,
    Personality,
    Port,
    RecordSet,
    Snapshot,
    Volume,
    Zone,
)
from skysail.hosts import plans
from skysail.store.schema import (
    accounts,
    disks,
    domain_entries,
    domains,
    guests,
    hosts,
    instances,
    ports,
    snapshots,
    static_ips,
)
from skysail.store.vault import Vault

NAME_SERVER_TTL = 3600
_OF_INSTANCE = (instances.c.bundle_id, instances.c.region, instances.c.zone, instances.c.key_pair_name,
                instances.c.created_at, instances.c.metadata_options)


def bump(connection: Connection, host_id: str) -> None:
    """The host's document changed: give it the next generation. Where there are aliases, every host's did: they may follow
    what changed."""
    aliases = select(domain_entries.c.id).where(domain_entries.c.alias != "").exists()
    connection.execute(update(hosts).where(or_(hosts.c.id == host_id, aliases)).values(generation=hosts.c.generation + 1))


def bump_zones(connection: Connection) -> None:
    """A zone changed: every host that answers for zones, which all do, gets its next generation."""
    connection.execute(update(hosts).values(generation=hosts.c.generation + 1))


def compile(connection: Connection, host_id: str, vault: Vault) -> HostDocument:
    """The desired document of ``host_id`` at its current generation; ``vault`` opens the zones' signing keys."""
    generation = connection.execute(select(hosts.c.generation).where(hosts.c.id == host_id)).scalar_one()
    tenants = {row.id: row.tenant for row in connection.execute(select(accounts.c.id, accounts.c.tenant))}
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
                Attachment(volume=disk_volume(disk), name=disk["path"].removeprefix("/dev/")))
    found = tuple(
        Guest(
            id=row["id"], instance=row["instance_name"], role=row["role"], starts=row["starts"],
            reboots=row["reboots"], force=row["force"], vcpus=row["vcpus"], memory_mib=row["memory_mib"],
            volume=system_volume(row), disks=tuple(attached.get(row["instance_id"], ())),
            iops=row["iops"],
            port=Port(id=row["id"], mac=row["mac"], tenant=tenants[row["account_id"]],
                      private_ipv4=row["private_ipv4"], public_ipv4=row["public_ipv4"] or "",
                      public_ipv6=row["public_ipv6"] or "",
                      firewall=tuple(rules.get(row["instance_id"], ()))),
            personality=msgspec.convert(row["personality"], Personality),
            baseline_percent=plans.baseline_percent(row["bundle_id"]), metadata=_metadata(row))
        for row in connection.execute(
            select(guests, *_OF_INSTANCE).outerjoin(instances, instances.c.id == guests.c.instance_id)
            .where(guests.c.host_id == host_id).order_by(guests.c.id)).mappings())
    return HostDocument(
        host=host_id, generation=generation, guests=found,
        disks=tuple(Disk(volume=disk_volume(row), role=row["role"], made=row["made"]) for row in stored),
        snapshots=tuple(
            Snapshot(id=row["id"], role=row["role"], guest=row["guest_id"],
                     volumes=msgspec.convert(row["volumes"], tuple[Volume, ...]))
            for row in connection.execute(select(snapshots).where(snapshots.c.host_id == host_id).order_by(snapshots.c.id))
            .mappings()),
        zones=tuple(zones(connection, vault)))


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


def zones(connection: Connection, vault: Vault) -> Iterator[Zone]:
    """Every zone that name servers shall answer for or let go, by name; aliases are what they point at now."""
    entries: dict[str, dict[tuple[str, str], tuple[int, list[str]]]] = {}
    addresses = _addresses(connection)
    owners = {row.id: row.account_id for row in connection.execute(select(domains.c.id, domains.c.account_id))}
    columns = (domain_entries.c.domain_id, domain_entries.c.name, domain_entries.c.type, domain_entries.c.ttl,
               domain_entries.c.record, domain_entries.c.alias, domain_entries.c.alias_region)
    for domain, name, kind, ttl, record, alias, region in connection.execute(select(*columns)):
        records = [record] if not alias else addresses.get((owners[domain], region, alias, kind), [])
        if records:
            entries.setdefault(domain, {}).setdefault((name, kind), (ttl, []))[1].extend(records)
    for row in connection.execute(select(domains).order_by(domains.c.name)):
        apex = row.name + "."
        servers = tuple(f"{name}." for name in row.name_servers)
        sets = [RecordSet(name=name + ".", type=kind, ttl=ttl, records=tuple(sorted(records)))
                for (name, kind), (ttl, records) in sorted(entries.get(row.id, {}).items())]
        yield Zone(
            id=row.id, name=apex, role=row.role, serial=row.serial, primary=servers[0], hostmaster=f"hostmaster.{apex}",
            record_sets=() if row.role == "gone" else (
                RecordSet(name=apex, type="NS", ttl=NAME_SERVER_TTL, records=tuple(sorted(servers))), *sets),
            signing_key=vault.open(row.signing_sealed, f"zone:{row.id}") if row.signing_sealed else "")


def _addresses(connection: Connection) -> dict[tuple[str, str, str, str], list[str]]:
    """What an alias may point at, by account, region, name and type of record: public addresses of instances, and static
    IPs."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in connection.execute(
            select(instances.c.account_id, instances.c.region, instances.c.name, guests.c.public_ipv4, guests.c.public_ipv6)
            .join(guests, guests.c.instance_id == instances.c.id)):
        if row.public_ipv4:
            found[row.account_id, row.region, row.name, "A"] = [row.public_ipv4]
        if row.public_ipv6:
            found[row.account_id, row.region, row.name, "AAAA"] = [row.public_ipv6]
    for row in connection.execute(select(static_ips)):
        found[row.account_id, row.region, row.name, "A"] = [row.ipv4]
    return found
