"""SetIpAddressType: another set of public addresses for an instance, while it runs.

Source: Lightsail API reference, SetIpAddressType.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, select, update

from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.operations.workflow import Step, Workflow
from skysail.resources import address_types, addresses, catalog
from skysail.resources.instances import get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import guests, instances, static_ips


class AddressTypes:
    """The action on address types."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"SetIpAddressType": self.set}

    def set(self, connection: Connection, request: Request) -> dict[str, Any]:
        """What is kept of its addresses stays the same; to and from IPv6-only the bundle changes too. The operation ends when
        the new addresses lead to the guest."""
        asked, kind = request.params, request.params["ipAddressType"]
        if asked["resourceType"] in ("Distribution", "LoadBalancer"):
            raise invalid_input(f"Resources of the type {asked['resourceType']} are not offered by this cloud yet.")
        if asked["resourceType"] != "Instance":
            raise invalid_input(f"A {asked['resourceType']} has no IP address type.", "resourceType takes Instance.")
        instance = get_row(connection, request, asked["resourceName"])
        guest = get_guest(connection, instance)
        held = address_types.of(guest)
        if instance["state"] not in ("running", "stopped"):
            raise invalid_input(f"The instance {instance['name']} is {instance['state']}; the address type of a running or a "
                                "stopped one is changed.")
        if kind == held:
            raise invalid_input(f"The IP address type of the instance {instance['name']} is {kind} already.")
        if kind != "ipv4":
            address_types.require_ipv6(self._config)
        bundle = catalog.get_bundle(instance["bundle_id"])
        if "ipv6" in (kind, held):
            bundle = catalog.counterpart(bundle)
            if not asked.get("acceptBundleUpdate"):
                raise invalid_input(f"From {held} to {kind} the bundle of the instance {instance['name']} becomes "
                                    f"{bundle['bundleId']}.", "Accept it with acceptBundleUpdate.")
        if kind == "ipv6":
            static = connection.execute(select(static_ips.c.name).where(
                static_ips.c.instance_id == instance["id"])).scalar_one_or_none()
            if static is not None:
                raise invalid_input(f"The instance {instance['name']} has the static IP {static}, which is an IPv4 address.",
                                    "Detach it first.")
        changed = address_types.addresses_of(connection, self._config, kind, guest)
        addresses.leave(connection, guest, changed)
        connection.execute(update(guests).where(guests.c.id == guest["id"]).values(**changed))
        connection.execute(update(instances).where(instances.c.id == instance["id"]).values(bundle_id=bundle["bundleId"]))
        desired.bump(connection, guest["host_id"])
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=instance["name"],
            resource_type="Instance", resource_id=instance["id"], zone=instance["zone"], status="Started", details=kind,
            workflow="address type", arguments=changed)]}


# --- behind the operation

def _await_led(connection: Connection, operation: RowMapping, now: float) -> bool:
    """These addresses lead to the guest, or it has others by now: a later change won, and so did a deletion."""
    row = connection.execute(
        select(guests.c.public_ipv4, guests.c.public_ipv6, guests.c.observed_addresses)
        .join(instances, instances.c.id == guests.c.instance_id)
        .where(instances.c.id == operation["resource_id"])).mappings().first()
    wanted = [operation["arguments"][name] for name in ("public_ipv4", "public_ipv6")]
    return row is None or [row["public_ipv4"], row["public_ipv6"]] != wanted or row["observed_addresses"] == [
        *filter(None, wanted)]


WORKFLOWS = {"address type": Workflow("address type", (Step("await led", _await_led),))}
