"""How an instance may read its metadata: UpdateInstanceMetadataOptions.

Source: Lightsail API reference, InstanceMetadataOptions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, select, update

from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.operations.workflow import Step, Workflow
from skysail.resources.instances import get_guest, get_row
from skysail.resources.metadata_options import MEMBERS
from skysail.resources.request import Request
from skysail.store.schema import guests, instances

MAX_HOPS = 64


class InstanceMetadata:
    """The action on metadata options."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"UpdateInstanceMetadataOptions": self.update}

    def update(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Options that are not named stay as they are. The operation ends when the instance's host goes by them."""
        asked = request.params
        instance = get_row(connection, request, asked["instanceName"])
        if instance["state"] not in ("running", "stopped"):
            raise invalid_input(f"The instance {instance['name']} is {instance['state']}; metadata options are changed of a "
                                "running or a stopped one.")
        named = {name: asked[member] for member, name in MEMBERS.items() if member in asked}
        if not named:
            raise invalid_input("Name one option at least: " + ", ".join(MEMBERS))
        if not 1 <= named.get("http_put_response_hop_limit", 1) <= MAX_HOPS:
            raise invalid_input(f"httpPutResponseHopLimit takes 1 to {MAX_HOPS}.")
        wanted = msgspec.structs.replace(desired.metadata_options(instance), **named)
        guest = get_guest(connection, instance)
        if wanted.http_protocol_ipv6 == "enabled" and not guest["public_ipv6"]:
            raise invalid_input(f"The instance {instance['name']} has no IPv6 address to ask for its metadata from.",
                                "Leave httpProtocolIpv6 disabled.")
        kept = msgspec.to_builtins(wanted)
        connection.execute(update(instances).where(instances.c.id == instance["id"]).values(metadata_options=kept))
        desired.bump(connection, guest["host_id"])
        return {"operation": history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=instance["name"],
            resource_type="Instance", resource_id=instance["id"], zone=instance["zone"], status="Started",
            workflow="metadata options", arguments={"options": kept})}


# --- behind the operation

def _await_applied(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The host goes by these options, or by later ones: a later update won, and so did a deletion."""
    row = connection.execute(
        select(instances.c.metadata_options, guests.c.observed_metadata).where(instances.c.id == operation["resource_id"])
        .join(guests, guests.c.instance_id == instances.c.id)).mappings().first()
    wanted = operation["arguments"]["options"]
    return row is None or row["metadata_options"] != wanted or row["observed_metadata"] == wanted


WORKFLOWS = {"metadata options": Workflow("metadata options", (Step("await applied", _await_applied),))}
