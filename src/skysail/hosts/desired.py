"""Rows to document: what one host shall hold. Reads rows, decides nothing, touches no host."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, RowMapping, select, update

from skysail.contract.document import (
    Attachment,
    Disk,
    FirewallRule,
    Guest,
    HostDocument,
    Origin,
    Personality,
    Port,
    Snapshot,
    Volume,
)
from skysail.store.schema import accounts, disks, guests, hosts, ports, snapshots


def bump(connection: Connection, host_id: str) -> None:
    """The host's document changed: give it the next generation."""
    connection.execute(update(hosts).where(hosts.c.id == host_id).values(generation=hosts.c.generation + 1))


def compile(connection: Connection, host_id: str) -> HostDocument:
    """The desired document of ``host_id`` at its current generation."""
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
            port=Port(id=row["id"], mac=row["mac"], tenant=tenants[row["account_id"]],
                      private_ipv4=row["private_ipv4"], public_ipv4=row["public_ipv4"],
                      public_ipv6=row["public_ipv6"] or "",
                      firewall=tuple(rules.get(row["instance_id"], ()))),
            personality=msgspec.convert(row["personality"], Personality))
        for row in connection.execute(select(guests).where(guests.c.host_id == host_id).order_by(guests.c.id))
        .mappings())
    return HostDocument(
        host=host_id, generation=generation, guests=found,
        disks=tuple(Disk(volume=disk_volume(row), role=row["role"], made=row["made"]) for row in stored),
        snapshots=tuple(
            Snapshot(id=row["id"], role=row["role"], guest=row["guest_id"],
                     volumes=msgspec.convert(row["volumes"], tuple[Volume, ...]))
            for row in connection.execute(select(snapshots).where(snapshots.c.host_id == host_id).order_by(snapshots.c.id))
            .mappings()))


def system_volume(guest: RowMapping) -> Volume:
    """The system disk of a guest."""
    return Volume(id=guest["id"], image=guest["image"], size_gib=guest["disk_gib"], origin=_origin(guest))


def disk_volume(disk: RowMapping) -> Volume:
    """The volume that is a block-storage disk."""
    return Volume(id=disk["id"], image="", size_gib=disk["size_gib"], origin=_origin(disk))


def _origin(row: RowMapping) -> Origin | None:
    return msgspec.convert(row["origin"], Origin | None)
