"""Reverse zones, delegated to this cloud: the names of its addresses (RFC 1035, 3.5; RFC 3596, 2.5).

An address of an instance, or a static IP, has the name of its account's domain that leads to it, the first if there are
several, else one that is made of the address. The zones' rows are as the configuration says; their records are never stored.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from skysail.contract.document import RecordSet, Zone
from skysail.hosts.zones import NAME_SERVER_TTL, addresses_of
from skysail.store.schema import domain_entries, domains, guests, hosts, reverse_zones, static_ips, zone_reports

log = logging.getLogger(__name__)
TTL = 60


def configure(connection: Connection, wanted: Sequence[str], name_servers: Sequence[str], domain: str, now: float) -> None:
    """These are the reverse zones from now on; names that are made of addresses are below ``domain``. One whose name is a
    customer's domain already is left out."""
    held = {row["name"]: row for row in connection.execute(select(reverse_zones)).mappings().all()}
    taken = set(connection.execute(select(domains.c.name).where(domains.c.name.in_(wanted))).scalars())
    changed = False
    for name in [*wanted, *(other for other in held if other not in wanted)]:
        row = held.get(name)
        if name in taken and row is None:
            log.error("the reverse zone %s is not served: a domain of that name is there", name)
            continue
        values = {"name_servers": list(name_servers), "domain": domain, "role": "serve" if name in wanted else "gone"}
        serial = max(row["serial"] + 1 if row else 1, int(now)) % 2**32
        if row is None:
            connection.execute(insert(reverse_zones).values(id=str(uuid.uuid4()), name=name, serial=serial, **values))
        elif any(row[key] != value for key, value in values.items()):
            connection.execute(update(reverse_zones).where(reverse_zones.c.id == row["id"]).values(serial=serial, **values))
        else:
            continue
        changed = True
    if changed:
        connection.execute(update(hosts).where(hosts.c.name_server).values(generation=hosts.c.generation + 1))


def follow(connection: Connection) -> int:
    """Reverse zones that every host let go of are forgotten; how many were."""
    leaving = connection.execute(select(reverse_zones.c.id).where(reverse_zones.c.role == "gone")).scalars().all()
    if not leaving:
        return 0
    all_hosts = connection.execute(select(func.count()).select_from(hosts).where(hosts.c.name_server)).scalar_one()
    gone = leaving if not all_hosts else connection.execute(
        select(zone_reports.c.domain_id).where(zone_reports.c.domain_id.in_(leaving), zone_reports.c.state == "gone")
        .group_by(zone_reports.c.domain_id).having(func.count() >= all_hosts)).scalars().all()
    for table, column in ((zone_reports, zone_reports.c.domain_id), (reverse_zones, reverse_zones.c.id)):
        connection.execute(delete(table).where(column.in_(gone)))
    if gone:
        connection.execute(update(hosts).where(hosts.c.name_server).values(generation=hosts.c.generation + 1))
    return len(gone)


def zones(connection: Connection) -> Iterator[Zone]:
    """The reverse zones that name servers shall answer for or let go, by name."""
    rows = connection.execute(select(reverse_zones).order_by(reverse_zones.c.name)).mappings().all()
    names = _names(connection) if any(row["role"] == "serve" for row in rows) else {}
    for row in rows:
        apex = f"{row['name']}."
        servers = tuple(f"{name}." for name in row["name_servers"])
        sets = []
        for address, name in names.items():
            pointer = f"{ip_address(address).reverse_pointer}."
            if pointer.endswith(f".{apex}"):
                sets.append(RecordSet(name=pointer, type="PTR", ttl=TTL,
                                      records=(f"{name or generic(address, row['domain'])}.",)))
        yield Zone(
            id=row["id"], name=apex, role=row["role"], serial=row["serial"], primary=servers[0],
            hostmaster=f"hostmaster.{row['domain']}.", record_sets=() if row["role"] == "gone" else (
                RecordSet(name=apex, type="NS", ttl=NAME_SERVER_TTL, records=tuple(sorted(servers))),
                *sorted(sets, key=lambda one: one.name)))


def generic(address: str, domain: str) -> str:
    """The name of an address that has no other."""
    number = ip_address(address)
    return f"ip-{number.exploded.replace('.', '-').replace(':', '-')}.{domain}"


def _names(connection: Connection) -> dict[str, str]:
    """Every address that somebody has, and the name that leads to it; '' where none does."""
    owners: dict[str, str] = {}
    for row in connection.execute(select(guests.c.account_id, guests.c.public_ipv4, guests.c.public_ipv6).where(
            guests.c.role != "gone")):
        owners.update({address: row.account_id for address in (row.public_ipv4, row.public_ipv6) if address})
    for static in connection.execute(select(static_ips.c.account_id, static_ips.c.ipv4)):
        owners[static.ipv4] = static.account_id
    canonical = {_plain(address): address for address in owners}
    found = dict.fromkeys(owners, "")
    aliased = addresses_of(connection)
    for name, kind, record, alias, region, account in connection.execute(
            select(domain_entries.c.name, domain_entries.c.type, domain_entries.c.record, domain_entries.c.alias,
                   domain_entries.c.alias_region, domains.c.account_id)
            .join(domains, domains.c.id == domain_entries.c.domain_id)
            .where(domains.c.role == "serve", domain_entries.c.type.in_(("A", "AAAA")),
                   or_(domain_entries.c.alias != "", domain_entries.c.record.in_(canonical)))
            .order_by(domain_entries.c.name)):
        for target in aliased.get((account, region, alias, kind), ()) if alias else (record,):
            address = canonical.get(_plain(target), "")
            if not name.startswith("*") and owners.get(address) == account:
                found[address] = found[address] or name
    return found


def _plain(address: str) -> str:
    """An address as records are written: IPv6 with its eight groups."""
    number: IPv4Address | IPv6Address = ip_address(address)
    return number.exploded
