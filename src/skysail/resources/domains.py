"""Domains and their entries: CreateDomain, DeleteDomain, GetDomain, GetDomains, Create-, Update-, DeleteDomainEntry.

Source: Lightsail API reference. A domain belongs to no region; its actions are asked for in the cloud's default region. Each
change is one transaction, which gives the zone its next serial; hosts get all of it in one document.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, delete, func, insert, or_, select, update

from skysail.contract.document import SOA_TIMES
from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import names, paging, records, tags
from skysail.resources.records import Entry
from skysail.resources.request import Request
from skysail.store.schema import (
    domain_entries,
    domains,
    guests,
    hosts,
    instances,
    reverse_zones,
    static_ips,
    zone_reports,
)

MAX_ENTRIES = 10_000
# The statements of a change, made once: to put one together takes longer than SQLite takes to run it.
_FIND = select(domains).where(domains.c.account_id == bindparam("account"), domains.c.role == "serve",
                              domains.c.name == bindparam("name"))
_CHANGED = update(domains).where(domains.c.id == bindparam("domain")).values(serial=bindparam("next"))
_COUNT = select(func.count()).where(domain_entries.c.domain_id == bindparam("domain"))
_ALIKE = select(domain_entries).where(
    domain_entries.c.domain_id == bindparam("domain"), domain_entries.c.name == bindparam("name")).order_by(
    domain_entries.c.type, domain_entries.c.target, domain_entries.c.id)
_INSERT = insert(domain_entries)


def find_row(connection: Connection, account_id: str, name: str) -> RowMapping | None:
    """The account's domain ``name``, or None."""
    return connection.execute(_FIND, {"account": account_id, "name": name}).mappings().first()


def create(connection: Connection, account_id: str, text: str, name_servers: Sequence[str], now: float) -> RowMapping:
    """A new domain without entries; raises InvalidInputException. The caller takes its name in the account's names."""
    name = records.domain_name(text)
    _refuse_foreign(connection, account_id, name)
    held = connection.execute(select(domains).where(domains.c.name == name)).mappings().first()
    if held is not None and held["role"] == "serve":
        raise invalid_input(f"Some names are already in use: {name}")
    if held is not None:
        # A deleted domain that hosts still let go of: they get the new zone in its place.
        _drop(connection, held["id"])
    identifier = str(uuid.uuid4())
    connection.execute(insert(domains).values(
        id=identifier, account_id=account_id, name=name, role="serve", created_at=now, name_servers=list(name_servers),
        serial=_next(held["serial"] if held is not None else 0, now)))
    desired.bump_zones(connection)
    return connection.execute(select(domains).where(domains.c.id == identifier)).mappings().one()


def _refuse_foreign(connection: Connection, account_id: str, name: str) -> None:
    """Nobody answers for names below another account's domain."""
    above = [name.split(".", cut)[cut] for cut in range(1, name.count("."))]
    if connection.execute(select(domains.c.id).where(
            domains.c.name.in_([name, *above]), domains.c.role == "serve", domains.c.account_id != account_id)).first():
        raise invalid_input(f"Some names are already in use: {name} is another account's, or below one that is.")
    held = connection.execute(select(reverse_zones.c.name)).scalars().all()
    if any(name == zone or name.endswith(f".{zone}") or zone.endswith(f".{name}") for zone in held):
        raise invalid_input(f"Some names are already in use: {name} meets a reverse zone of this cloud.")


def changed(connection: Connection, domain: RowMapping, now: float, **values: Any) -> None:
    """The domain's zone changed: it gets its next serial, and its hosts a new document."""
    connection.execute(_CHANGED.values(**values) if values else _CHANGED,
                       {"domain": domain["id"], "next": _next(domain["serial"], now)})
    desired.bump_zones(connection)


def _next(serial: int, now: float) -> int:
    # The time in seconds, so that a restored database or a domain made again does not go back; one more where it would.
    return max(serial + 1, int(now)) % 2**32


def delegate(connection: Connection, name_servers: Sequence[str], now: float) -> None:
    """Every domain names the cloud's name servers, also those that were made before the operator changed them."""
    for row in connection.execute(select(domains).where(domains.c.role == "serve")).mappings().all():
        if row["name_servers"] != list(name_servers):
            changed(connection, row, now, name_servers=list(name_servers))


def entries_of(connection: Connection, domain_id: str) -> Sequence[RowMapping]:
    """The entries that the customer made, by name."""
    return connection.execute(_in_order().where(domain_entries.c.domain_id == domain_id)).mappings().all()


def _in_order() -> Any:
    return select(domain_entries).order_by(domain_entries.c.name, domain_entries.c.type, domain_entries.c.target,
                                           domain_entries.c.id)


def replace_entries(connection: Connection, domain: RowMapping, wanted: Iterable[Entry], now: float) -> None:
    """Give the domain exactly these entries, in one change; those that stay keep their ids. Raises InvalidInputException."""
    wanted = list(wanted)
    if len(wanted) > MAX_ENTRIES:
        raise invalid_input(f"A domain takes at most {MAX_ENTRIES} entries.")
    by_name: dict[str, list[Entry]] = defaultdict(list)
    for entry in wanted:
        by_name[entry.name].append(entry)
    for alike in by_name.values():
        records.together(alike)
    held = {(_entry(row).meaning, row["ttl"]): row["id"] for row in entries_of(connection, domain["id"])}
    fresh = {(entry.meaning, entry.ttl): entry for entry in wanted}
    for key in held.keys() - fresh.keys():
        connection.execute(delete(domain_entries).where(domain_entries.c.id == held[key]))
    for key, entry in fresh.items():
        if key not in held:
            _insert(connection, domain, entry)
    changed(connection, domain, now)


def _insert(connection: Connection, domain: RowMapping, entry: Entry) -> None:
    connection.execute(_INSERT, {
        "id": str(uuid.uuid4()), "domain_id": domain["id"], "name": entry.name, "type": entry.type, "target": entry.target,
        "record": entry.record, "alias": entry.alias, "alias_region": entry.alias_region, "ttl": entry.ttl})


def _entry(row: RowMapping) -> Entry:
    return Entry(row["name"], row["type"], row["target"], row["record"], row["alias"], row["ttl"], row["alias_region"])


def _drop(connection: Connection, domain_id: str) -> None:
    connection.execute(delete(domain_entries).where(domain_entries.c.domain_id == domain_id))
    connection.execute(delete(zone_reports).where(zone_reports.c.domain_id == domain_id))
    connection.execute(delete(domains).where(domains.c.id == domain_id))


def follow(connection: Connection) -> int:
    """Deleted domains whose zone every host let go of are forgotten; how many were."""
    leaving = connection.execute(select(domains.c.id).where(domains.c.role == "gone")).scalars().all()
    if not leaving:
        return 0
    all_hosts = connection.execute(select(func.count()).select_from(hosts).where(hosts.c.name_server)).scalar_one()
    gone = leaving if not all_hosts else connection.execute(
        select(zone_reports.c.domain_id).where(zone_reports.c.domain_id.in_(leaving), zone_reports.c.state == "gone")
        .group_by(zone_reports.c.domain_id).having(func.count() >= all_hosts)).scalars().all()
    for identifier in gone:
        _drop(connection, identifier)
    if gone:
        desired.bump_zones(connection)
    return len(gone)


class Domains:
    """The actions on domains."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {name: self._at_home(action) for name, action in {
            "CreateDomain": self.create, "DeleteDomain": self.delete, "GetDomain": self.get, "GetDomains": self.list_,
            "CreateDomainEntry": self.create_entry, "UpdateDomainEntry": self.update_entry,
            "DeleteDomainEntry": self.delete_entry}.items()}

    def _at_home(self, action: Callable[[Connection, Request], dict[str, Any]]
                 ) -> Callable[[Connection, Request], dict[str, Any]]:
        home = self._config.default_region

        def asked(connection: Connection, request: Request) -> dict[str, Any]:
            if request.region != home:
                # Lightsail's words, with this cloud's region in the place of us-east-1.
                raise invalid_input(f"Domain-related APIs are only available in the {home} Region. Please set your Region "
                                    f"configuration to {home} to create, view, or edit domain resources.")
            return action(connection, request)
        return asked

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = create(connection, request.account_id, request.params["domainName"], self._config.name_servers,
                     self._clock.now())
        names.claim(connection, names.everywhere(request), row["name"], "Domain", row["id"])
        tags.put(connection, row["id"], request.params.get("tags") or [])
        return {"operation": self._record(connection, request, row)}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Gone for its owner at once; its hosts let go of the zone behind the answer."""
        row = self._get(connection, request)
        connection.execute(delete(domain_entries).where(domain_entries.c.domain_id == row["id"]))
        tags.forget(connection, row["id"])
        names.release(connection, request.account_id, names.GLOBAL, row["name"])
        changed(connection, row, self._clock.now(), role="gone", signing_sealed=None, ds="")
        return {"operation": self._record(connection, request, row)}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        return {"domain": self._shapes(connection, [self._get(connection, request)])[0]}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = select(domains).where(domains.c.account_id == request.account_id, domains.c.role == "serve")
        found, token = paging.read(connection, query, request.params.get("pageToken"), domains.c.name)
        return {"domains": self._shapes(connection, found), "nextPageToken": token}

    def create_entry(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = self._get(connection, request)
        entry = self._read(connection, row, request.params["domainEntry"])
        count = connection.execute(_COUNT, {"domain": row["id"]}).scalar_one()
        if count >= MAX_ENTRIES:
            raise invalid_input(f"A domain takes at most {MAX_ENTRIES} entries.")
        self._fit(connection, row, entry)
        _insert(connection, row, entry)
        changed(connection, row, self._clock.now())
        return {"operation": self._record(connection, request, row)}

    def update_entry(self, connection: Connection, request: Request) -> dict[str, Any]:
        """The entry of the given id becomes what is given; members that are not stay as they were."""
        row = self._get(connection, request)
        given = request.params["domainEntry"]
        if not given.get("id"):
            raise invalid_input("The domainEntry has no id.", "GetDomain shows the ids of entries.")
        held = self._find(connection, row, given)
        before = {"name": held["name"], "type": held["type"], "target": held["target"], "isAlias": bool(held["alias"])}
        entry = self._read(connection, row, before | given, held["ttl"])
        self._fit(connection, row, entry, instead_of=held["id"])
        connection.execute(update(domain_entries).where(domain_entries.c.id == held["id"]).values(
            name=entry.name, type=entry.type, target=entry.target, record=entry.record, alias=entry.alias,
            alias_region=entry.alias_region))
        changed(connection, row, self._clock.now())
        return {"operations": [self._record(connection, request, row)]}

    def delete_entry(self, connection: Connection, request: Request) -> dict[str, Any]:
        """The entry of the given id goes, or without an id the one that has the given name, type and target."""
        row = self._get(connection, request)
        held = self._find(connection, row, request.params["domainEntry"])
        connection.execute(delete(domain_entries).where(domain_entries.c.id == held["id"]))
        changed(connection, row, self._clock.now())
        return {"operation": self._record(connection, request, row)}

    def _get(self, connection: Connection, request: Request) -> RowMapping:
        text = request.params["domainName"]
        row = find_row(connection, request.account_id, text.lower().removesuffix("."))
        if row is None:
            raise not_found(f"The Domain does not exist: {text}", "GetDomains lists the ones that do.")
        return row

    def _read(self, connection: Connection, domain: RowMapping, given: dict[str, Any], ttl: int = records.TTL) -> Entry:
        """The given domainEntry as an entry of the domain."""
        for member in ("name", "type", "target"):
            if not given.get(member):
                raise invalid_input(f"The domainEntry has no {member}.")
        name, kind, target = given["name"], given["type"], given["target"]
        if not given.get("isAlias"):
            return records.read(domain["name"], name, kind, target, ttl)
        owner = records.owner_name(domain["name"], name)
        if kind not in ("A", "AAAA"):
            raise records.malformed(f"{kind} {owner}", "an alias has the type A or AAAA.")
        alias, region = self._aliased(connection, domain, f"{kind} {owner}", target)
        return Entry(owner, kind, target, alias=alias, ttl=ttl, alias_region=region)

    def _aliased(self, connection: Connection, domain: RowMapping, what: str, target: str) -> tuple[str, str]:
        """Name and region of the owner's static IP or instance that ``target`` names, by its name or its public address of
        this moment; a name that several regions have is that of the default one. An address that is a static IP's is followed
        as that: it may move to another instance."""
        fixed = select(static_ips.c.name, static_ips.c.region).where(
            static_ips.c.account_id == domain["account_id"], or_(static_ips.c.name == target, static_ips.c.ipv4 == target))
        moving = select(instances.c.name, instances.c.region).join(guests, guests.c.instance_id == instances.c.id).where(
            instances.c.account_id == domain["account_id"],
            or_(instances.c.name == target, guests.c.public_ipv4 == target, guests.c.public_ipv6 == target))
        found = [(row.region, row.name) for query in (fixed, moving) for row in connection.execute(query)]
        # The order of the two queries stands where the regions are the same.
        for region, name in sorted(found, key=lambda one: (one[0] != self._config.default_region, one[0])):
            return name, region
        raise records.malformed(what, f"{target[:80]!r} is no instance or static IP that an alias could follow.",
                                "An alias has the name or the public address of one as its target.")

    def _alike(self, connection: Connection, domain: RowMapping, entry: Entry) -> Sequence[RowMapping]:
        """The entries that have the entry's name."""
        return connection.execute(_ALIKE, {"domain": domain["id"], "name": entry.name}).mappings().all()

    def _fit(self, connection: Connection, domain: RowMapping, entry: Entry, instead_of: str = "") -> None:
        others = [_entry(row) for row in self._alike(connection, domain, entry) if row["id"] != instead_of]
        records.together([*others, entry])

    def _find(self, connection: Connection, domain: RowMapping, given: dict[str, Any]) -> RowMapping:
        """The entry that is meant; raises NotFoundException, InvalidInputException for one that is the cloud's own."""
        identifier = given.get("id")
        if identifier in {own["id"] for own in _own_entries(domain)}:
            raise invalid_input("The name server and start of authority entries of a domain are the cloud's own.",
                                "The operator sets name_servers in skysail.toml.")
        if identifier:
            row = connection.execute(select(domain_entries).where(
                domain_entries.c.domain_id == domain["id"], domain_entries.c.id == identifier)).mappings().first()
        else:
            entry = self._described(domain, given)
            row = next((row for row in self._alike(connection, domain, entry) if _is(row, entry)), None)
        if row is None:
            raise not_found(f"The DomainEntry does not exist: {identifier or given.get('name')}",
                            "GetDomain shows the entries that do.")
        return row

    def _described(self, domain: RowMapping, given: dict[str, Any]) -> Entry:
        """The entry that is described; an alias may point at what is no more, so its target is not looked for."""
        for member in ("name", "type", "target"):
            if not given.get(member):
                raise invalid_input(f"The domainEntry has no {member}.", "Give its id, or its name, type and target.")
        if given.get("isAlias"):
            return Entry(records.owner_name(domain["name"], given["name"]), given["type"], given["target"])
        return records.read(domain["name"], given["name"], given["type"], given["target"])

    def _shapes(self, connection: Connection, rows: Sequence[RowMapping]) -> list[dict[str, Any]]:
        identifiers = [row["id"] for row in rows]
        tagged = tags.of(connection, identifiers)
        held: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in connection.execute(_in_order().where(domain_entries.c.domain_id.in_(identifiers))).mappings():
            held[entry["domain_id"]].append({"id": entry["id"], "name": entry["name"], "target": entry["target"],
                                             "isAlias": bool(entry["alias"]), "type": entry["type"]})
        return [{
            "name": row["name"], "arn": f"arn:aws:lightsail:global:{row['account_id']}:Domain/{row['id']}",
            "supportCode": f"{row['account_id']}/{row['id']}", "createdAt": row["created_at"],
            "location": {"availabilityZone": "all", "regionName": "global"}, "resourceType": "Domain",
            "tags": tagged.get(row["id"], []), "domainEntries": [*_own_entries(row), *held[row["id"]]],
        } for row in rows]

    def _record(self, connection: Connection, request: Request, row: RowMapping) -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=row["name"],
                              resource_type="Domain", resource_id=row["id"])


def _is(row: RowMapping, entry: Entry) -> bool:
    if entry.record:
        return _entry(row).meaning == entry.meaning
    return bool(row["alias"]) and (row["type"], row["target"]) == (entry.type, entry.target)


def _own_entries(row: RowMapping) -> list[dict[str, Any]]:
    """The entries that a domain has from the beginning, as on Lightsail: its name servers and its start of authority."""
    own = [("NS", name, name) for name in row["name_servers"]]
    own.append(("SOA", "", f"{row['name_servers'][0]}. hostmaster.{row['name']}. {row['serial']} {SOA_TIMES}"))
    return [{"id": str(uuid.uuid5(uuid.UUID(row["id"]), kind + key)), "name": row["name"], "target": target,
             "isAlias": False, "type": kind} for kind, key, target in own]
