"""Addresses that are free to give: to a guest, or to a static IP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, Connection, RowMapping, delete, insert, select, update

from skysail.hosts import placement
from skysail.kit.config import SSH_PORTS, Config
from skysail.kit.errors import invalid_input
from skysail.store.schema import guests, hosts, instances, leaving_addresses, static_ips

# The first ones are the gateway's and the operator's.
KEPT = 9
# Up to so many that are taken, all are read and the lowest free one is given: such addresses are easy to remember. Where
# there are more, some are drawn, and one of them that nobody has is given: it is found without reading the others.
FEW = 500
DRAWN, DRAWS = 4, 16


def free_public(connection: Connection, pool: str) -> str:
    """A public IPv4 address that no guest has and no static IP is; raises InvalidInputException when there is none."""
    return _free(connection, pool, guests.c.public_ipv4, static_ips.c.ipv4, leaving_addresses.c.address)


def free_private(connection: Connection, network: str) -> str:
    """A private IPv4 address that no guest has; raises InvalidInputException when there is none."""
    return _free(connection, network, guests.c.private_ipv4)


def free_public_ipv6(connection: Connection, prefix: str) -> str:
    """An address of the IPv6 prefix that no guest has; raises InvalidInputException when there is none."""
    return _free(connection, prefix, guests.c.public_ipv6, leaving_addresses.c.address)


def leave(connection: Connection, guest: RowMapping, values: Mapping[str, Any]) -> None:
    """``values`` are about to become the guest's: public addresses that it has then no more stay taken until its host has let
    go of them too (hosts/watch.py), which one that is away does when it is back. A static IP may be attached elsewhere at
    once all the same: that is what its owner has it for."""
    former = [guest[column] for column in ("public_ipv4", "public_ipv6")
              if guest[column] and values.get(column, guest[column]) != guest[column]]
    if former:
        here = (leaving_addresses.c.host_id == guest["host_id"], leaving_addresses.c.address.in_(former))
        connection.execute(delete(leaving_addresses).where(*here))
        held = connection.execute(select(hosts.c.generation).where(hosts.c.id == guest["host_id"])).scalar_one()
        connection.execute(insert(leaving_addresses), [
            {"address": address, "host_id": guest["host_id"], "generation": held} for address in former])


def free_ssh_port(connection: Connection, config: Config) -> int | None:
    """A port of the single address that leads to no instance's SSH; None where there is no such address. Raises
    InvalidInputException when there is none left."""
    if not config.single_address:
        return None
    taken = set(connection.execute(select(instances.c.ssh_port)).scalars())
    for port in range(config.ssh_ports, config.ssh_ports + SSH_PORTS):
        if port not in taken:
            return port
    raise invalid_input("This cloud has no SSH port left on its single address.", "Delete instances.")


def number_ssh_ports(connection: Connection, config: Config) -> None:
    """Every instance has its port, also one that was made before there was a single address. A port once given stays."""
    if not config.single_address:
        return
    for identifier in connection.execute(select(instances.c.id).where(instances.c.ssh_port.is_(None))
                                         .order_by(instances.c.created_at, instances.c.id)).scalars().all():
        connection.execute(update(instances).where(instances.c.id == identifier).values(
            ssh_port=free_ssh_port(connection, config)))


def _free(connection: Connection, network: str, *columns: Column[Any]) -> str:
    """One that none of the ``columns``, each with an index of its own, has."""
    many = connection.execute(select(columns[0]).where(columns[0].is_not(None)).offset(FEW).limit(1)).first() is not None
    for _ in range(DRAWS if many else 0):
        drawn = placement.draw_addresses(network, DRAWN, skip=KEPT)
        for column in columns:
            drawn -= set(connection.execute(select(column).where(column.in_(drawn))).scalars())
        if drawn:
            return min(drawn)
    taken = [address for column in columns for address in connection.execute(select(column)).scalars()]
    try:
        return placement.choose_address(network, taken, skip=KEPT)
    except placement.NoHost as full:
        raise invalid_input(f"This cloud has no address left: {full}.", "Delete instances, release static IPs, or give "
                            "the cloud a larger network in skysail.toml.") from full
