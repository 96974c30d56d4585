"""The instance's firewall: Open adds, Close removes, Put replaces, GetInstancePortStates reads.

Source: Lightsail API reference, PortInfo. For icmp and icmpv6, fromPort is the type and toPort the code, -1 is any.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select

from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.resources.instances import get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import ports

MAX_RULES = 60
MAX_CIDRS = 60


class PublicPorts:
    """The actions on public ports."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"OpenInstancePublicPorts": self.open, "CloseInstancePublicPorts": self.close,
                "PutInstancePublicPorts": self.put, "GetInstancePortStates": self.states}

    def open(self, connection: Connection, request: Request) -> dict[str, Any]:
        instance = get_row(connection, request, request.params["instanceName"])
        rule = _rule(request.params["portInfo"])
        _remove(connection, instance["id"], rule)
        connection.execute(insert(ports).values(instance_id=instance["id"], **rule))
        return self._done(connection, request, instance, "OpenInstancePublicPorts")

    def close(self, connection: Connection, request: Request) -> dict[str, Any]:
        instance = get_row(connection, request, request.params["instanceName"])
        _remove(connection, instance["id"], _rule(request.params["portInfo"]))
        return self._done(connection, request, instance, "CloseInstancePublicPorts")

    def put(self, connection: Connection, request: Request) -> dict[str, Any]:
        instance = get_row(connection, request, request.params["instanceName"])
        rules = {(rule["protocol"], rule["from_port"], rule["to_port"]): rule
                 for rule in map(_rule, request.params["portInfos"])}
        connection.execute(delete(ports).where(ports.c.instance_id == instance["id"]))
        for rule in rules.values():
            connection.execute(insert(ports).values(instance_id=instance["id"], **rule))
        return self._done(connection, request, instance, "PutInstancePublicPorts")

    def states(self, connection: Connection, request: Request) -> dict[str, Any]:
        instance = get_row(connection, request, request.params["instanceName"])
        rows = connection.execute(select(ports).where(ports.c.instance_id == instance["id"])
                                  .order_by(ports.c.protocol, ports.c.from_port, ports.c.to_port)).mappings()
        return {"portStates": [
            {"fromPort": row["from_port"], "toPort": row["to_port"], "protocol": row["protocol"], "state": "open",
             "cidrs": row["cidrs"], "ipv6Cidrs": row["ipv6_cidrs"], "cidrListAliases": row["cidr_aliases"]}
            for row in rows]}

    def _done(self, connection: Connection, request: Request, instance: RowMapping, type: str) -> dict[str, Any]:
        count = len(connection.execute(select(ports.c.protocol).where(ports.c.instance_id == instance["id"])).all())
        if count > MAX_RULES:
            raise invalid_input(f"An instance takes at most {MAX_RULES} firewall rules.")
        desired.bump(connection, get_guest(connection, instance)["host_id"])
        return {"operation": history.record(
            connection, request, now=self._clock.now(), type=type, resource_name=instance["name"],
            resource_type="Instance", resource_id=instance["id"], zone=instance["zone"])}


def _rule(info: dict[str, Any]) -> dict[str, Any]:
    """The row of a PortInfo; raises InvalidInputException where Lightsail would."""
    protocol = info.get("protocol")
    first, last = info.get("fromPort"), info.get("toPort")
    if protocol == "all":
        first, last = 0, 65535
    if protocol not in ("tcp", "udp", "icmp", "icmpv6", "all"):
        raise invalid_input("portInfo needs a protocol: tcp, udp, icmp, icmpv6 or all.")
    if first is None or last is None:
        raise invalid_input("portInfo needs fromPort and toPort.")
    if protocol in ("icmp", "icmpv6"):
        if not (-1 <= first <= 255 and -1 <= last <= 255):
            raise invalid_input(f"For {protocol}, fromPort is a type and toPort a code: -1 (any) to 255.")
    elif not 0 <= first <= last <= 65535:
        raise invalid_input(f"The port range {first}-{last} is not valid: 0 <= fromPort <= toPort <= 65535.")
    aliases = info.get("cidrListAliases") or []
    if set(aliases) - {"lightsail-connect"}:
        raise invalid_input("The only cidrListAlias is lightsail-connect.")
    cidrs = [_cidr(text, 4) for text in info.get("cidrs") or []]
    ipv6_cidrs = [_cidr(text, 6) for text in info.get("ipv6Cidrs") or []]
    if len(cidrs) + len(ipv6_cidrs) > MAX_CIDRS:
        raise invalid_input(f"A rule takes at most {MAX_CIDRS} address blocks.")
    if not cidrs and not ipv6_cidrs and not aliases:
        cidrs, ipv6_cidrs = ["0.0.0.0/0"], ["::/0"]
    return {"protocol": protocol, "from_port": first, "to_port": last, "cidrs": cidrs, "ipv6_cidrs": ipv6_cidrs,
            "cidr_aliases": aliases}


def _cidr(text: str, version: int) -> str:
    try:
        block = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise invalid_input(f"{text!r} is not an address block, such as 192.0.2.0/24.") from None
    if block.version != version:
        raise invalid_input(f"{text} belongs into {'cidrs' if block.version == 4 else 'ipv6Cidrs'}.")
    return str(block)


def _remove(connection: Connection, instance_id: str, rule: dict[str, Any]) -> None:
    connection.execute(delete(ports).where(
        ports.c.instance_id == instance_id, ports.c.protocol == rule["protocol"],
        ports.c.from_port == rule["from_port"], ports.c.to_port == rule["to_port"]))
