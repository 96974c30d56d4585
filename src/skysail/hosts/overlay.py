"""How private networks span the hosts: which hosts there are for each one, and by what identifier a network is known between
them. Reads rows; part of the desired document."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, select, update

from skysail.contract.document import Network, Overlay
from skysail.store.schema import hosts

# Identifiers have 24 bits (RFC 7348, 5), and the last ones are for what is no network.
MAX_NUMBER = Overlay().vni - 1
_UNDERLAY = hosts.c.facts["underlay"].as_string().label("underlay")


def compile(connection: Connection, host_id: str) -> Overlay | None:
    """What the host needs to know of the others. None where it has no underlay, or no other host has one."""
    own = _underlay(connection, host_id)
    if own is None:
        return None
    known = dict(_underlays(connection))
    known.pop(host_id, None)
    others = sorted({address for address in known.values() if address != own}, key=ipaddress.IPv4Address)
    return Overlay(hosts=tuple(others)) if others else None


def spanning(numbers: Iterable[int], joined: Iterable[Network]) -> tuple[Network, ...]:
    """The networks of these numbers, and those that are joined, as ones that span hosts. A network's number is its
    identifier, the same on every host."""
    networks = {number: Network(number=number) for number in numbers} | {network.number: network for network in joined}
    return tuple(msgspec.structs.replace(network, vni=number if number <= MAX_NUMBER else 0)
                 for number, network in sorted(networks.items()))


def moved(connection: Connection, host_id: str, facts: dict[str, Any] | None) -> bool:
    """Whether these facts of the host give it another underlay than it had."""
    return _underlay(connection, host_id) != _address((facts or {}).get("underlay"))


def bump(connection: Connection) -> None:
    """A host came, went, or is elsewhere: every one gets its next generation."""
    connection.execute(update(hosts).values(generation=hosts.c.generation + 1))


def _underlays(connection: Connection) -> Iterator[tuple[str, str]]:
    for row in connection.execute(select(hosts.c.id, _UNDERLAY).order_by(hosts.c.id)):
        if address := _address(row.underlay):
            yield row.id, address


def _underlay(connection: Connection, host_id: str) -> str | None:
    return _address(connection.execute(select(_UNDERLAY).where(hosts.c.id == host_id)).scalar())


def _address(text: str | None) -> str | None:
    """An IPv4 address that others can reach; None for what is none."""
    try:
        address = ipaddress.IPv4Address(text or "")
    except ValueError:
        return None
    return None if address.is_loopback or address.is_unspecified else str(address)
