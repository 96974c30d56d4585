"""Search: what has a word in its name, address, tags or id, in every region and account. Changes nothing."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources.names import GLOBAL
from skysail.store.schema import accounts, alarms, disks, domains, guests, instances, key_pairs, snapshots, static_ips, tags
from skysail.store.visit import visit

# The first one that there is stands in the list; each is found.
_ADDRESSES = ("public_ipv4", "private_ipv4", "public_ipv6")


def search(config: Config, text: str) -> list[dict[str, Any]]:
    """What has ``text`` in it, whatever its case, by region, type and name. Raises :class:`SkysailError` when there is no
    cloud, or nothing to look for."""
    if not text:
        raise SkysailError("there is nothing to look for", "name a part of a name, an address, a tag or an id")
    with contextlib.suppress(ValueError):
        text = str(ipaddress.ip_address(text))  # an IPv6 address is written in many ways
    found = visit(config, lambda connection: _holding(connection, text), list[dict[str, Any]])
    return sorted(found, key=lambda one: (one["region"], one["type"], one["name"], one["account"]))


def _holding(connection: Connection, text: str) -> list[dict[str, Any]]:
    owners = {row.id: row.name for row in connection.execute(select(accounts))}
    tagged: dict[str, list[str]] = {}
    for row in connection.execute(select(tags)):
        tagged.setdefault(row.resource_id, []).extend(filter(None, (row.key, row.value)))
    return [
        {"region": row.get("region", GLOBAL), "type": kind, "name": row["name"], "state": state,
         "address": addresses[0] if addresses else "", "id": row["id"], "account": owners[row["account_id"]]}
        for kind, row, state, addresses in _everything(connection)
        if any(text.lower() in word.lower()
               for word in (row["name"], row["id"], *addresses, *tagged.get(row["id"], [])))]


def _everything(connection: Connection) -> Iterator[tuple[str, RowMapping, str, list[str]]]:
    """Type, row, state and addresses of each resource that is somebody's."""
    columns = [guests.c[name] for name in _ADDRESSES]
    for row in connection.execute(select(instances, *columns).outerjoin(
            guests, guests.c.instance_id == instances.c.id)).mappings():
        yield "Instance", row, row["state"], [row[name] for name in _ADDRESSES if row[name]]
    for row in connection.execute(select(static_ips)).mappings():
        yield "StaticIp", row, "attached" if row["instance_id"] else "", [row["ipv4"]]
    for row in connection.execute(select(disks).where(disks.c.role == "keep")).mappings():
        yield "Disk", row, row["state"], []
    for row in connection.execute(select(snapshots).where(snapshots.c.deleted.is_(False))).mappings():
        yield row["kind"], row, row["state"], []
    for row in connection.execute(select(alarms)).mappings():
        yield "Alarm", row, row["state"], []
    for row in connection.execute(select(key_pairs)).mappings():
        yield "KeyPair", row, "", []
    for row in connection.execute(select(domains).where(domains.c.role == "serve")).mappings():
        yield "Domain", row, "", []
