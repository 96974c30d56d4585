"""Private networks, one per account and region, and PeerVpc, UnpeerVpc, IsVpcPeered.

Peered, a network is joined with the subnets of the machine's own network that the operator chose (``peer_subnets``), and with
those of the account's networks in other regions that are peered, too. Source: Lightsail API reference. Lightsail peers with
the account's default VPC in the region, and joins no regions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.operations.workflow import Step, Workflow
from skysail.resources.request import Request
from skysail.store.schema import hosts, networks


def ensure_network(connection: Connection, account_id: str, region: str) -> int:
    """The number of the account's private network in the region, made at first need."""
    row = _find(connection, account_id, region)
    if row is not None:
        return int(row["number"])
    # The lowest that is above all: a sequence of the database would leave gaps where a request is refused later on.
    number = int(connection.execute(select(func.coalesce(func.max(networks.c.number), 0) + 1)).scalar_one())
    connection.execute(insert(networks).values(number=number, account_id=account_id, region=region, peered=False))
    return number


class Peering:
    """The actions on a region's private network. Each ends once every host lets through what it shall, and no more."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"PeerVpc": self.peer, "UnpeerVpc": self.unpeer, "IsVpcPeered": self.peered}

    def peer(self, connection: Connection, request: Request) -> dict[str, Any]:
        if not self._config.peer_subnets and len(self._config.regions) == 1:
            raise not_found("There is no network to peer with: this cloud has one region, and no peer_subnets.",
                            "The operator sets peer_subnets in skysail.toml.")
        if self._peered(connection, request):
            raise invalid_input(f"The private network of {request.region} is peered already.", "UnpeerVpc parts it.")
        return self._become(connection, request, True)

    def unpeer(self, connection: Connection, request: Request) -> dict[str, Any]:
        if not self._peered(connection, request):
            raise invalid_input(f"The private network of {request.region} is not peered.", "PeerVpc joins it.")
        return self._become(connection, request, False)

    def peered(self, connection: Connection, request: Request) -> dict[str, Any]:
        return {"isPeered": self._peered(connection, request)}

    def _peered(self, connection: Connection, request: Request) -> bool:
        row = _find(connection, request.account_id, request.region)
        return row is not None and bool(row["peered"])

    def _become(self, connection: Connection, request: Request, peered: bool) -> dict[str, Any]:
        number = ensure_network(connection, request.account_id, request.region)
        connection.execute(update(networks).where(networks.c.number == number).values(peered=peered))
        return {"operation": history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=f"vpc-{number}",
            resource_type="PeeredVpc", resource_id=f"vpc-{number}", status="Started", details=f"vpc-{number}",
            workflow="peer", arguments={"generations": desired.bump_networks(connection)})}


def _find(connection: Connection, account_id: str, region: str) -> RowMapping | None:
    return connection.execute(select(networks).where(
        networks.c.account_id == account_id, networks.c.region == region)).mappings().first()


# --- behind the operations

def _await_joined(connection: Connection, operation: RowMapping, now: float) -> bool:
    """Every host that there was joins the networks as that generation said, or as a later one does."""
    rows = connection.execute(select(hosts.c.id, hosts.c.networked_generation))
    reached = {row.id: row.networked_generation for row in rows}
    return all(reached.get(host, generation) >= generation
               for host, generation in operation["arguments"]["generations"].items())


WORKFLOWS = {"peer": Workflow("peer", (Step("await joined", _await_joined),))}
