"""Static IPs: a public address that belongs to its owner, and to at most one instance at a time.

An attached one takes the place of the address that the instance has from the pool, which becomes free once its host leads it
there no more. Source: Lightsail API
reference, data type StaticIp.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import addresses, names, paging, tags
from skysail.resources.instances import get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import guests, instances, static_ips

# Lightsail's default quota of an account in a region.
MAX_STATIC_IPS = 5


class StaticIps:
    """The actions on static IPs."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {
            "AllocateStaticIp": self.allocate, "AttachStaticIp": self.attach, "DetachStaticIp": self.detach,
            "ReleaseStaticIp": self.release, "GetStaticIp": self.get, "GetStaticIps": self.list_,
        }

    def allocate(self, connection: Connection, request: Request) -> dict[str, Any]:
        name, identifier = request.params["staticIpName"], str(uuid.uuid4())
        held = connection.execute(_own(request)).mappings().all()
        if len(held) >= MAX_STATIC_IPS:
            raise invalid_input(f"An account takes at most {MAX_STATIC_IPS} static IPs in a region.",
                                "Release one that is not attached.")
        names.claim(connection, request, name, "StaticIp", identifier)
        connection.execute(insert(static_ips).values(
            id=identifier, account_id=request.account_id, region=request.region, name=name, created_at=self._clock.now(),
            ipv4=addresses.free_public(connection, self._config.public_pool)))
        desired.bump_zones(connection)  # the address has a name now
        return {"operations": [self._record(connection, request, self._get(connection, request))]}

    def attach(self, connection: Connection, request: Request) -> dict[str, Any]:
        """One document later the address leads to the instance."""
        row = self._get(connection, request)
        instance = get_row(connection, request, request.params["instanceName"])
        if not get_guest(connection, instance)["public_ipv4"]:
            raise invalid_input(f"The instance {instance['name']} is IPv6-only: a static IP is an IPv4 address.",
                                "Change it with SetIpAddressType first.")
        if row["instance_id"] is not None:
            raise invalid_input(f"The static IP {row['name']} is attached to "
                                f"{_instance_name(connection, row)}.", "Detach it first.")
        other = connection.execute(select(static_ips).where(static_ips.c.instance_id == instance["id"])).mappings().first()
        if other is not None:
            raise invalid_input(f"The instance {instance['name']} has the static IP {other['name']} already.",
                                "Detach that one first.")
        if connection.execute(select(guests.c.id).where(guests.c.public_ipv4 == row["ipv4"])).first() is not None:
            # Its last instance was deleted when the pool had no other address for the guest that is still going.
            raise invalid_input(f"The static IP {row['name']} is still being let go by a deleted instance.",
                                "Try again in a moment.")
        connection.execute(update(static_ips).where(static_ips.c.id == row["id"]).values(instance_id=instance["id"]))
        self._give(connection, instance, row["ipv4"])
        return {"operations": [self._record(connection, request, row, instance["name"]),
                               self._record_instance(connection, request, instance, row["name"])]}

    def detach(self, connection: Connection, request: Request) -> dict[str, Any]:
        """The instance gets an address from the pool in its place."""
        row = self._get(connection, request)
        if row["instance_id"] is None:
            raise invalid_input(f"The static IP {row['name']} is not attached.")
        instance = connection.execute(select(instances).where(instances.c.id == row["instance_id"])).mappings().one()
        connection.execute(update(static_ips).where(static_ips.c.id == row["id"]).values(instance_id=None))
        self._give(connection, instance, addresses.free_public(connection, self._config.public_pool))
        return {"operations": [self._record(connection, request, row, instance["name"]),
                               self._record_instance(connection, request, instance, row["name"])]}

    def release(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = self._get(connection, request)
        if row["instance_id"] is not None:
            raise invalid_input(f"The static IP {row['name']} is attached to {_instance_name(connection, row)}.",
                                "Detach it before you release it.")
        connection.execute(delete(static_ips).where(static_ips.c.id == row["id"]))
        tags.forget(connection, row["id"])
        names.release(connection, row["account_id"], row["region"], row["name"])
        desired.bump_zones(connection)  # an alias of it names nothing now
        return {"operations": [self._record(connection, request, row)]}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        return {"staticIp": _shape(connection, self._get(connection, request))}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        found, token = paging.read(connection, _own(request), request.params.get("pageToken"), static_ips.c.name)
        return {"staticIps": [_shape(connection, row) for row in found], "nextPageToken": token}

    def _get(self, connection: Connection, request: Request) -> RowMapping:
        name = request.params["staticIpName"]
        row = connection.execute(_own(request).where(static_ips.c.name == name)).mappings().first()
        if row is None:
            raise not_found(f"The StaticIp does not exist: {name}", "GetStaticIps lists the ones that do.")
        return row

    def _give(self, connection: Connection, instance: RowMapping, address: str) -> None:
        guest = get_guest(connection, instance)
        addresses.leave(connection, guest, {"public_ipv4": address})
        connection.execute(update(guests).where(guests.c.id == guest["id"]).values(public_ipv4=address))
        desired.bump(connection, guest["host_id"])

    def _record(self, connection: Connection, request: Request, row: RowMapping, details: str = "") -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=row["name"],
                              resource_type="StaticIp", resource_id=row["id"], details=details)

    def _record_instance(self, connection: Connection, request: Request, instance: RowMapping,
                         details: str) -> dict[str, Any]:
        return history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=instance["name"],
            resource_type="Instance", resource_id=instance["id"], zone=instance["zone"], details=details)


def _own(request: Request) -> Any:
    return select(static_ips).where(static_ips.c.account_id == request.account_id, static_ips.c.region == request.region)


def _instance_name(connection: Connection, row: RowMapping) -> str | None:
    """The name of the instance that the static IP is attached to."""
    return connection.execute(select(instances.c.name).where(instances.c.id == row["instance_id"])).scalar_one_or_none()


def _shape(connection: Connection, row: RowMapping) -> dict[str, Any]:
    return {
        "name": row["name"], "arn": f"arn:aws:lightsail:{row['region']}:{row['account_id']}:StaticIp/{row['id']}",
        "supportCode": f"{row['account_id']}/{row['ipv4']}", "createdAt": row["created_at"],
        "location": {"availabilityZone": "all", "regionName": row["region"]}, "resourceType": "StaticIp",
        "ipAddress": row["ipv4"], "attachedTo": _instance_name(connection, row),
        "isAttached": row["instance_id"] is not None,
    }
