"""Rows to zones: what name servers answer for. Reads rows, decides nothing, touches no host.

A zone of ten thousand entries is made again only when something in it changed: its serial, or what an alias in it leads to.
Of its record sets those are made again whose entries changed, and those of aliases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Connection, Join, RowMapping, Table, and_, bindparam, select

from skysail.contract.document import RecordSet, Zone
from skysail.store.schema import domain_entries, domains, guests, hosts, instances, static_ips
from skysail.store.vault import Vault

NAME_SERVER_TTL = 3600
_ENTRIES = select(
    domain_entries.c.name, domain_entries.c.type, domain_entries.c.ttl, domain_entries.c.record, domain_entries.c.alias,
    domain_entries.c.alias_region).where(domain_entries.c.domain_id == bindparam("domain")).order_by(
    domain_entries.c.name, domain_entries.c.type)
# By account, region, name and type of record.
Addresses = dict[tuple[str, str, str, str], list[str]]
# Region, name, type of record.
Alias = tuple[str, str, str]


# Name, type, time to live, record, alias, region of the alias.
_Entry = tuple[str, str, int, str, str, str]


class _Made(NamedTuple):
    """A zone, and what it was made of: its row, its aliases with what they led to, the addresses that are shared, its
    entries; ``sets`` has its record sets by name."""

    row: dict[str, Any]
    aliases: tuple[Alias, ...]
    led: list[list[str]]
    shared: dict[str, str]
    entries: frozenset[_Entry]
    sets: dict[str, tuple[RecordSet, ...]]
    zone: Zone


class ZoneCompiler:
    """Makes zones, and keeps them for as long as they stay."""

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}

    def zones(self, connection: Connection, vault: Vault) -> Iterator[Zone]:
        """Every zone that name servers shall answer for or let go, by name; aliases are what they point at now. ``vault``
        opens signing keys."""
        rows = connection.execute(select(domains).order_by(domains.c.name)).mappings().all()
        addresses, shared = (addresses_of(connection), _shared(connection)) if rows else ({}, {})
        former, self._made = self._made, {}
        for row in rows:
            held = former.get(row["id"])
            if held is None or held.row != row or held.shared != shared or held.led != _led(row, held.aliases, addresses):
                held = _make(connection, vault, row, addresses, shared, held)
            self._made[row["id"]] = held
            yield held.zone


def _make(connection: Connection, vault: Vault, row: RowMapping, addresses: Addresses, shared: dict[str, str],
          former: _Made | None) -> _Made:
    found: Sequence[_Entry] = ()
    if row["role"] != "gone":
        # As SQLite's driver gives them: to make thousands of SQLAlchemy's rows takes longer than to read them.
        found = connection.execute(_ENTRIES, {"domain": row["id"]}).cursor.fetchall()
    entries = frozenset(found)
    aliases = tuple(dict.fromkeys((region, alias, kind) for _, kind, _, _, alias, region in found if alias))
    if former is not None and former.shared == shared and former.row["account_id"] == row["account_id"]:
        changed = {name for name, *_ in entries ^ former.entries} | {name for name, _, _, _, alias, _ in found if alias}
        known = former.sets
    else:
        changed, known = {name for name, *_ in found}, {}
    merged: dict[str, list[tuple[str, int, list[str]]]] = {}
    for name, kind, ttl, record, alias, region in found:
        if name not in changed:
            continue
        led = addresses.get((row["account_id"], region, alias, kind), []) if alias else [record]
        if shared and kind == "A":
            led = [shared.get(one, one) for one in led]
        of_name = merged.setdefault(name, [])
        if led and of_name and of_name[-1][0] == kind:
            of_name[-1][2].extend(led)
        elif led:
            of_name.append((kind, ttl, [*led]))
    fresh = {name: tuple(RecordSet(name=f"{name}.", type=kind, ttl=ttl, records=tuple(sorted(set(records))))
                         for kind, ttl, records in of_name) for name, of_name in merged.items()}
    sets = {name: fresh[name] if name in changed else known[name] for name in dict.fromkeys(name for name, *_ in found)}
    apex = f"{row['name']}."
    servers = tuple(f"{name}." for name in row["name_servers"])
    zone = Zone(
        id=row["id"], name=apex, role=row["role"], serial=row["serial"], primary=servers[0], hostmaster=f"hostmaster.{apex}",
        record_sets=() if row["role"] == "gone" else (
            RecordSet(name=apex, type="NS", ttl=NAME_SERVER_TTL, records=tuple(sorted(servers))),
            *chain.from_iterable(sets.values())),
        signing_key=vault.open(row["signing_sealed"], f"zone:{row['id']}") if row["signing_sealed"] else "")
    return _Made(dict(row), aliases, _led(row, aliases, addresses), shared, entries, sets, zone)


def _led(row: RowMapping, aliases: tuple[Alias, ...], addresses: Addresses) -> list[list[str]]:
    return [addresses.get((row["account_id"], *alias), []) for alias in aliases]


def _shared(connection: Connection) -> dict[str, str]:
    """The shared address of each guest that has none of its own in the world, by the one that it has here."""
    return {row.public_ipv4: row.shared_address for row in connection.execute(
        select(guests.c.public_ipv4, hosts.c.shared_address).join(hosts, hosts.c.id == guests.c.host_id)
        .where(hosts.c.shared_address != ""))}


def addresses_of(connection: Connection) -> Addresses:
    """What aliases point at: public addresses of instances, and static IPs."""
    found: Addresses = {}

    def aliased(table: Table) -> Join:
        # From the aliases to what they name, which is little among all that there is.
        return domain_entries.join(domains, domains.c.id == domain_entries.c.domain_id).join(table, and_(
            table.c.account_id == domains.c.account_id, table.c.region == domain_entries.c.alias_region,
            table.c.name == domain_entries.c.alias))

    for row in connection.execute(
            select(instances.c.account_id, instances.c.region, instances.c.name, guests.c.public_ipv4, guests.c.public_ipv6)
            .select_from(aliased(instances).join(guests, guests.c.instance_id == instances.c.id))
            .where(domain_entries.c.alias > "")):
        if row.public_ipv4:
            found[row.account_id, row.region, row.name, "A"] = [row.public_ipv4]
        if row.public_ipv6:
            found[row.account_id, row.region, row.name, "AAAA"] = [row.public_ipv6]
    for row in connection.execute(select(static_ips).select_from(aliased(static_ips)).where(domain_entries.c.alias > "")):
        found[row.account_id, row.region, row.name, "A"] = [row.ipv4]
    return found
