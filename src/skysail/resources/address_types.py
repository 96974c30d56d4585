"""Which public addresses an instance has: IPv4, IPv6, or both (dualstack). Every instance has a private IPv4 address beside.

A plan has a public IPv4 address or has none, and an instance is of the one kind or the other.
Source: Lightsail API reference, IpAddressType, Bundle.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, RowMapping

from skysail.kit.config import Config
from skysail.kit.errors import invalid_input
from skysail.resources import addresses


def of(guest: RowMapping) -> str:
    """The type that the guest's addresses make."""
    if not guest["public_ipv4"]:
        return "ipv6"
    return "dualstack" if guest["public_ipv6"] else "ipv4"


def of_launch(config: Config, bundle: dict[str, Any], asked: str | None) -> str:
    """The type of an instance that is launched with this bundle; raises InvalidInputException where the two disagree."""
    alone = not bundle["publicIpv4AddressCount"]
    kind = asked or ("ipv6" if alone else "dualstack")
    if alone and kind != "ipv6":
        raise invalid_input(f"The bundle {bundle['bundleId']} has no public IPv4 address, which ipAddressType {kind} needs.",
                            "Choose another bundle, or ipAddressType ipv6.")
    if kind == "ipv6" and not alone:
        raise invalid_input(f"The bundle {bundle['bundleId']} is not IPv6-only, as ipAddressType ipv6 needs.",
                            "Choose one such as nano_ipv6_3_0.")
    if kind == "ipv6":
        require_ipv6(config)
    elif not config.public_ipv6:
        return "ipv4"  # what is there of a dualstack where there is no IPv6
    return kind


def require_ipv6(config: Config) -> None:
    """Raises InvalidInputException in a cloud without IPv6."""
    if not config.public_ipv6:
        raise invalid_input("This cloud has no public IPv6 addresses.",
                            "Use ipAddressType ipv4, or have its operator set public_ipv6 in skysail.toml.")


def addresses_of(connection: Connection, config: Config, kind: str, guest: RowMapping | None = None) -> dict[str, Any]:
    """The columns of a guest of this type: its own addresses where it has them already, new ones where not.

    Raises InvalidInputException when there are none left."""
    held: dict[str, str | None] = {
        name: guest[name] if guest is not None else None for name in ("public_ipv4", "public_ipv6")}
    if kind == "ipv6":
        held["public_ipv4"] = None
    elif not held["public_ipv4"]:
        held["public_ipv4"] = addresses.free_public(connection, config.public_pool)
    if kind == "ipv4":
        held["public_ipv6"] = None
    elif not held["public_ipv6"]:
        held["public_ipv6"] = addresses.free_public_ipv6(connection, config.public_ipv6)
    return held
