"""Rows to entrance: by which names and with which keys the guests of a host are reached where they share its one address.

Reads rows, decides nothing, touches no host. A name belongs to one guest: the names of instances come before the entries of
domains, and of two that want the same name the older instance has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection, RowMapping, and_, or_, select, update

from skysail.contract.document import Entrance, HostName, JumpAccount
from skysail.store.schema import domain_entries, domains, guests, hosts, instances, key_pairs, static_ips

# How many CNAME records are followed from a name to its address.
MAX_CHAIN = 8


def configure(connection: Connection, host_id: str, shared_address: str, instance_domain: str) -> None:
    """The host shares this address from now on ('' for none), its guests' names are below this domain."""
    wanted = {"shared_address": shared_address, "instance_domain": instance_domain}
    row = connection.execute(select(hosts).where(hosts.c.id == host_id)).mappings().one()
    if any(row[name] != value for name, value in wanted.items()):
        if not shared_address:
            wanted |= {"entrance_state": "", "entrance_reason": ""}
        connection.execute(update(hosts).where(hosts.c.id == host_id).values(generation=row["generation"] + 1, **wanted))


def bump(connection: Connection) -> None:
    """Who may jump changed: every host that shares an address gets its next generation."""
    connection.execute(update(hosts).where(hosts.c.shared_address != "").values(generation=hosts.c.generation + 1))


def compile(connection: Connection, host: RowMapping) -> Entrance | None:
    """The entrance of a host; None where each guest has an address of its own."""
    if not host["shared_address"]:
        return None
    found = connection.execute(
        select(instances, guests.c.id.label("guest_id"), guests.c.public_ipv4, guests.c.host_id,
               guests.c.network)
        .join(guests, guests.c.instance_id == instances.c.id).where(guests.c.role != "gone")
        .order_by(instances.c.created_at, instances.c.id)).mappings().all()
    names: dict[str, str] = {}
    for row in found:
        if name := instance_name(row["name"], row["region"], host["instance_domain"]):
            names.setdefault(name, row["guest_id"])
    own = set(names)
    for name, guest in _domain_names(connection, found).items():
        # Nor does somebody's domain shine through beneath the operator's own.
        if name not in own and not _below(name, host["instance_domain"]):
            names[name] = guest
    here = {row["guest_id"] for row in found if row["host_id"] == host["id"]}
    return Entrance(names=tuple(HostName(name=name, guest=guest) for name, guest in sorted(names.items()) if guest in here),
                    accounts=tuple(_accounts(connection, [row for row in found if row["guest_id"] in here])))


def instance_name(name: str, region: str, domain: str) -> str:
    """The host name of an instance, '' where there is none: a label of what is left of its name, below its region's."""
    label = re.sub(r"[^a-z0-9-]", "-", name.lower())[:63].strip("-")
    return f"{label}.{region}.{domain}" if label and domain else ""


def _below(name: str, domain: str) -> bool:
    return bool(domain) and (name == domain or name.endswith(f".{domain}"))


def _domain_names(connection: Connection, found: Sequence[RowMapping]) -> Mapping[str, str]:
    """The guest of each name of a domain that leads to one: by an address, an alias, or CNAME records towards them. Of
    several addresses of a name the first leads."""
    by_name, by_address, by_instance = {}, {}, {}
    for row in found:
        by_name[row["account_id"], row["region"], row["name"]] = row["guest_id"]
        by_address[row["account_id"], row["public_ipv4"]] = row["guest_id"]
        by_instance[row["id"]] = row["guest_id"]
    for static in connection.execute(select(static_ips)):
        if static.instance_id in by_instance:
            by_name[static.account_id, static.region, static.name] = by_instance[static.instance_id]
    direct: dict[str, str] = {}
    chained: dict[str, str] = {}
    for entry in connection.execute(
            select(domain_entries, domains.c.account_id).join(domains, domains.c.id == domain_entries.c.domain_id)
            .where(domains.c.role == "serve", or_(domain_entries.c.type == "CNAME", and_(domain_entries.c.type == "A", or_(
                domain_entries.c.alias != "", domain_entries.c.record.in_({row["public_ipv4"] for row in found})))))
            .order_by(domain_entries.c.name, domain_entries.c.target)):
        if entry.type == "CNAME":
            chained[entry.name] = entry.record.removesuffix(".")
            continue
        guest = by_name.get((entry.account_id, entry.alias_region, entry.alias)) if entry.alias else \
            by_address.get((entry.account_id, entry.record))
        if guest is not None:
            direct.setdefault(entry.name, guest)
    for name, target in chained.items():
        for _ in range(MAX_CHAIN):
            if target in direct or target not in chained:
                break
            target = chained[target]
        if target in direct:
            direct.setdefault(name, direct[target])
    return direct


def _accounts(connection: Connection, found: Iterable[RowMapping]) -> Iterable[JumpAccount]:
    networks: dict[str, set[int]] = {}
    for row in found:
        networks.setdefault(row["account_id"], set()).add(row["network"])
    held: dict[str, set[str]] = {identifier: set() for identifier in networks}
    for pair in connection.execute(select(key_pairs.c.account_id, key_pairs.c.public_key).where(
            key_pairs.c.account_id.in_(networks))):
        held[pair.account_id].add(pair.public_key.strip())
    for identifier in sorted(networks):
        yield JumpAccount(networks=tuple(sorted(networks[identifier])), keys=tuple(sorted(held[identifier])))
