"""Rows to document: what one host shall hold. Reads rows, decides nothing, touches no host."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, select, update

from skysail.contract.document import FirewallRule, Guest, HostDocument, Personality, Port, Volume
from skysail.store.schema import accounts, guests, hosts, ports


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
    found = tuple(
        Guest(
            id=row["id"], instance=row["instance_name"], role=row["role"], starts=row["starts"],
            reboots=row["reboots"], force=row["force"], vcpus=row["vcpus"], memory_mib=row["memory_mib"],
            volume=Volume(id=row["id"], image=row["image"], size_gib=row["disk_gib"]),
            port=Port(id=row["id"], mac=row["mac"], tenant=tenants[row["account_id"]],
                      private_ipv4=row["private_ipv4"], public_ipv4=row["public_ipv4"],
                      public_ipv6=row["public_ipv6"] or "",
                      firewall=tuple(rules.get(row["instance_id"], ()))),
            personality=msgspec.convert(row["personality"], Personality))
        for row in connection.execute(select(guests).where(guests.c.host_id == host_id).order_by(guests.c.id))
        .mappings())
    return HostDocument(host=host_id, generation=generation, guests=found)
