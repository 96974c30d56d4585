"""Addresses that are free to give: to a guest, or to a static IP."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select, update

from skysail.hosts import placement
from skysail.kit.config import SSH_PORTS, Config
from skysail.kit.errors import invalid_input
from skysail.store.schema import guests, instances, static_ips


def free_public(connection: Connection, pool: str) -> str:
    """A public IPv4 address that no guest has and no static IP is; raises InvalidInputException when there is none."""
    return _free(pool, [*connection.execute(select(guests.c.public_ipv4)).scalars(),
                        *connection.execute(select(static_ips.c.ipv4)).scalars()])


def free_private(connection: Connection, network: str) -> str:
    """A private IPv4 address that no guest has; raises InvalidInputException when there is none."""
    return _free(network, connection.execute(select(guests.c.private_ipv4)).scalars().all())


def free_public_ipv6(connection: Connection, prefix: str) -> str:
    """An address of the IPv6 prefix that no guest has; raises InvalidInputException when there is none."""
    return _free(prefix, connection.execute(select(guests.c.public_ipv6)).scalars().all())


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


def _free(network: str, taken: Collection[str]) -> str:
    try:
        # The first ones are the gateway's and the operator's.
        return placement.choose_address(network, taken, skip=9)
    except placement.NoHost as full:
        raise invalid_input(f"This cloud has no address left: {full}.", "Delete instances, release static IPs, or give "
                            "the cloud a larger network in skysail.toml.") from full
