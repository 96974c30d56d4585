"""Instances: CreateInstances, Get, Start, Stop, Reboot, Delete.

Source: Lightsail API reference. Each action is one transaction: rows, operations, the host's generation; no host is
talked to here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from skysail.contract.document import Origin, Personality
from skysail.hosts import desired, placement
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import ApiError, invalid_input, not_found
from skysail.operations import history
from skysail.resources import (
    accounts,
    add_ons,
    address_types,
    addresses,
    attachments,
    catalog,
    key_pairs,
    metadata_options,
    names,
    paging,
    peering,
    placing,
    regions,
    tags,
)
from skysail.resources.lifecycle import STATE_CODES, forget
from skysail.resources.request import Request
from skysail.store.schema import guests, images, instances, ports, static_ips
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
MAX_NAMES = 20
MAX_USER_DATA_BYTES = 16 * 1024
# What an instance shows of its guest.
_SHOWN = (guests.c.instance_id, guests.c.private_ipv4, guests.c.public_ipv4, guests.c.public_ipv6, guests.c.vcpus,
          guests.c.memory_mib, guests.c.disk_gib, guests.c.observed_metadata)
# Made once, for each launch and each look comes by: to put such a statement together takes longer than the database takes to
# run it.
_FIND = select(instances).where(
    instances.c.account_id == bindparam("account"), instances.c.region == bindparam("region"),
    instances.c.name == bindparam("named"))
_GUESTS = select(*_SHOWN).where(guests.c.instance_id.in_(bindparam("of_instances", expanding=True)))
_PORTS = select(ports).where(ports.c.instance_id.in_(bindparam("of_instances", expanding=True))).order_by(
    ports.c.protocol, ports.c.from_port)
_STATIC = select(static_ips.c.instance_id).where(static_ips.c.instance_id.in_(bindparam("of_instances", expanding=True)))
_INSERT_INSTANCE, _INSERT_GUEST, _INSERT_PORT = insert(instances), insert(guests), insert(ports)
DEFAULT_PORTS = (("tcp", 22, 22), ("tcp", 80, 80))


def get_row(connection: Connection, request: Request, name: str) -> RowMapping:
    """The caller's instance ``name`` in this region; raises NotFoundException."""
    row = connection.execute(_FIND, {
        "account": request.account_id, "region": request.region, "named": name}).mappings().first()
    if row is None:
        raise not_found(f"The Instance does not exist: {name}", "GetInstances lists the ones that do.")
    return row


def get_guest(connection: Connection, instance: RowMapping) -> RowMapping:
    """The guest that runs the instance."""
    return connection.execute(select(guests).where(guests.c.instance_id == instance["id"])).mappings().one()


def ipv6_addresses(guest: RowMapping) -> list[str]:
    """The guest's IPv6 addresses as Lightsail writes them: all eight groups."""
    if not guest["public_ipv6"]:
        return []
    return [":".join(f"{int(group, 16):x}" for group in ipaddress.IPv6Address(guest["public_ipv6"]).exploded.split(":"))]


def _static(connection: Connection, identifiers: Sequence[str]) -> set[str]:
    """Those of the instances that have a static IP."""
    return set(connection.execute(_STATIC, {"of_instances": identifiers}).scalars())


def _memory_mib(bundle: dict[str, Any]) -> int:
    mib: int = round(bundle["ramSizeInGb"] * 1024)
    return mib


def _hostname(name: str) -> str:
    """What the instance calls itself: a name may be longer than Linux takes (64), and have what a host name may not."""
    return name.replace("_", "-")[:63].rstrip("-.")


class Instances:
    """The actions on instances."""

    def __init__(self, config: Config, clock: Clock, vault: Vault) -> None:
        self._config = config
        self._clock = clock
        self._vault = vault

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {
            "CreateInstances": self.create, "GetInstance": self.get, "GetInstances": self.list_,
            "GetInstanceState": self.state, "StartInstance": self.start, "StopInstance": self.stop,
            "RebootInstance": self.reboot, "DeleteInstance": self.delete,
        }

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Place and record each named instance; the operations succeed when the guests run."""
        asked = request.params
        if asked.get("customImageName"):
            raise invalid_input("customImageName is not offered; import the image as a blueprint instead.")
        bundle = catalog.get_bundle(asked["bundleId"])
        image = self._image(connection, request.region, asked["blueprintId"], bundle["diskSizeInGb"])
        if image["size_gib"] > bundle["diskSizeInGb"]:
            raise invalid_input(f"The blueprint {image['blueprint']} needs a disk of {image['size_gib']} GB, the bundle "
                                f"{bundle['bundleId']} has {bundle['diskSizeInGb']} GB.", "Choose a larger bundle.")
        catalog.check_power(image["blueprint"], bundle)
        return {"operations": self.launch(connection, request, bundle, dict(image))}

    def launch(self, connection: Connection, request: Request, bundle: dict[str, Any], image: Mapping[str, Any],
               origin: Origin | None = None, host: str = "") -> list[dict[str, Any]]:
        """Place and record each instance that the request names, of ``image`` (a row of images, or the same keys); from
        ``origin``, which lies on ``host``, if that is told. Their operations. Raises InvalidInputException."""
        asked = request.params
        wanted: list[str] = asked["instanceNames"]
        if not wanted or len(wanted) > MAX_NAMES or len(set(wanted)) != len(wanted):
            raise invalid_input(f"instanceNames takes 1 to {MAX_NAMES} different names.")
        user_data = asked.get("userData") or ""
        if len(user_data.encode()) > MAX_USER_DATA_BYTES:
            raise invalid_input(f"userData is limited to {MAX_USER_DATA_BYTES} bytes.")
        zone = regions.zone(self._config, request, asked["availabilityZone"])
        key_name = asked.get("keyPairName") or key_pairs.DEFAULT_NAME
        public_key = key_pairs.public_key(connection, self._vault, request, key_name, self._clock.now())
        authority = accounts.ensure_authority(connection, self._vault, request.account_id, request.region)
        identifiers = {name: str(uuid.uuid4()) for name in wanted}
        for name, identifier in identifiers.items():
            names.claim(connection, request, name, "Instance", identifier)
        kind = address_types.of_launch(self._config, bundle, asked.get("ipAddressType"))
        places = self._places(connection, request, zone, bundle, image, len(wanted), host)
        held = {place: image if host else placing.image(connection, place, image["blueprint"]) for place in set(places)}
        made = []
        for (name, identifier), place in zip(identifiers.items(), places, strict=True):
            personality = partial(Personality, hostname=_hostname(name), authorized_keys=(public_key,),
                                  trusted_user_ca=(authority,), user_data=user_data)
            made.append(self._launch(connection, request, name, identifier, zone, bundle, kind, place, held[place], key_name,
                                     personality, origin))
        return made

    def _image(self, connection: Connection, region: str, blueprint_id: str, disk_gib: int) -> RowMapping:
        """The newest one of the region's hosts; where that needs more of a disk, one that does not, if there is any: whether
        it fits the host that an instance comes to is the placement's."""
        offered = select(images).where(images.c.blueprint == blueprint_id, regions.serves(images.c.host_id, region)).order_by(
            images.c.version.desc()).limit(1)
        row = connection.execute(offered).mappings().first()
        if row is not None and row["size_gib"] > disk_gib:
            row = connection.execute(offered.where(images.c.size_gib <= disk_gib)).mappings().first() or row
        if row is None:
            raise invalid_input(f"The blueprint {blueprint_id} is not ready in this region.",
                                "GetBlueprints lists the ones that are; the operator builds more with "
                                f"'skysail images build {blueprint_id}'.")
        return row

    def _places(self, connection: Connection, request: Request, zone: str, bundle: dict[str, Any], image: Mapping[str, Any],
                count: int, host: str) -> list[str]:
        """The host of each of so many instances. Raises InvalidInputException."""
        # What an instance begins as lies on one host, the image that it once grew from too.
        need = placement.Need(zone=request.region + zone, blueprint="" if host else image["blueprint"],
                              vcpus=bundle["cpuCount"], memory_mib=_memory_mib(bundle), disk_gib=bundle["diskSizeInGb"])
        try:
            return placing.choose(connection, self._config, request.account_id, self._clock.now(), need, count, host)
        except placement.NoHost as full:
            log.warning("no host takes %s of account %s: %s", ", ".join(request.params["instanceNames"]), request.account_id,
                        full)
            raise invalid_input(f"The bundle {bundle['bundleId']} does not fit {request.region}{zone} now.",
                                "Choose a smaller bundle or another zone, or delete instances.") from full

    def _launch(self, connection: Connection, request: Request, name: str, identifier: str, zone: str,
                bundle: dict[str, Any], kind: str, host: str, image: Mapping[str, Any], key_name: str,
                personality: Callable[..., Personality], origin: Origin | None) -> dict[str, Any]:
        private = addresses.free_private(connection, self._config.private_network)
        now = self._clock.now()
        connection.execute(_INSERT_INSTANCE, {
            "id": identifier, "account_id": request.account_id, "region": request.region, "zone": zone, "name": name,
            "blueprint_id": image["blueprint"], "blueprint_name": image["name"], "bundle_id": bundle["bundleId"],
            "username": image["user"], "key_pair_name": key_name, "state": "pending", "created_at": now,
            "ssh_port": addresses.free_ssh_port(connection, self._config)})
        guest = "g-" + secrets.token_hex(5)
        # 52:54 is how QEMU's own, locally administered addresses begin. The rest is the private address, which nobody else
        # has: random octets meet twice among a thousand guests in one cloud out of thirty.
        mac = ":".join(f"{octet:02x}" for octet in (0x52, 0x54, *ipaddress.IPv4Address(private).packed))
        connection.execute(_INSERT_GUEST, {
            "id": guest, "instance_id": identifier, "instance_name": name, "account_id": request.account_id, "host_id": host,
            "role": "run", "starts": 1, "reboots": 0, "vcpus": bundle["cpuCount"], "memory_mib": _memory_mib(bundle),
            "disk_gib": bundle["diskSizeInGb"], "image": image["digest"],
            "network": peering.ensure_network(connection, request.account_id, request.region),
            "iops": catalog.iops(bundle), "mac": mac, "private_ipv4": private,
            **address_types.addresses_of(connection, self._config, kind),
            "personality": msgspec.to_builtins(personality(user=image["user"])), "host_keys": [],
            "origin": msgspec.to_builtins(origin)})
        opened = (*DEFAULT_PORTS, ("tcp", 443, 443)) if catalog.is_app(image["blueprint"]) else DEFAULT_PORTS
        connection.execute(_INSERT_PORT, [
            {"instance_id": identifier, "protocol": protocol, "from_port": first, "to_port": last,
             "cidrs": ["0.0.0.0/0"], "ipv6_cidrs": ["::/0"], "cidr_aliases": []} for protocol, first, last in opened])
        tags.put(connection, identifier, request.params.get("tags") or [])
        add_ons.put(connection, identifier, "Instance", request.params.get("addOns") or [], now)
        desired.bump(connection, host)
        return history.record(connection, request, now=now, type="CreateInstance", resource_name=name,
                              resource_type="Instance", resource_id=identifier, zone=zone, status="Started",
                              workflow="create", arguments={"guest": guest, "starts": 1})

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = get_row(connection, request, request.params["instanceName"])
        return {"instance": self._shapes(connection, [row])[0]}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = select(instances).where(instances.c.account_id == request.account_id,
                                        instances.c.region == request.region)
        found, token = paging.read(connection, query, request.params.get("pageToken"), instances.c.name)
        return {"instances": self._shapes(connection, found), "nextPageToken": token}

    def state(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = get_row(connection, request, request.params["instanceName"])
        return {"state": {"code": STATE_CODES[row["state"]], "name": row["state"]}}

    def _shapes(self, connection: Connection, rows: Sequence[RowMapping]) -> list[dict[str, Any]]:
        identifiers = [row["id"] for row in rows]
        running = {guest["instance_id"]: guest for guest in connection.execute(
            _GUESTS, {"of_instances": identifiers}).mappings()}
        tagged = tags.of(connection, identifiers)
        opened: dict[str, list[RowMapping]] = {}
        for port in connection.execute(_PORTS, {"of_instances": identifiers}).mappings():
            opened.setdefault(port["instance_id"], []).append(port)
        static = _static(connection, identifiers)
        stored = attachments.of(connection, identifiers, self._clock.now())
        added = add_ons.shapes(connection, identifiers, self._clock.now())
        return [self._shape(row, running[row["id"]], tagged.get(row["id"], []), opened.get(row["id"], []),
                            stored.get(row["id"], []), row["id"] in static) | {"addOns": added.get(row["id"], [])}
                for row in rows]

    def _shape(self, row: RowMapping, guest: RowMapping, tagged: list[dict[str, Any]], opened: list[RowMapping],
               stored: list[dict[str, Any]], static: bool) -> dict[str, Any]:
        bundle = catalog.get_bundle(row["bundle_id"])
        return {
            "name": row["name"],
            "arn": f"arn:aws:lightsail:{row['region']}:{row['account_id']}:Instance/{row['id']}",
            "supportCode": f"{row['account_id']}/{row['id']}", "createdAt": row["created_at"],
            "location": {"availabilityZone": row["region"] + row["zone"], "regionName": row["region"]},
            "resourceType": "Instance", "tags": tagged, "blueprintId": row["blueprint_id"],
            "blueprintName": row["blueprint_name"], "bundleId": row["bundle_id"], "isStaticIp": static,
            "privateIpAddress": guest["private_ipv4"], "publicIpAddress": guest["public_ipv4"],
            "ipv6Addresses": ipv6_addresses(guest), "ipAddressType": address_types.of(guest),
            "hardware": {
                "cpuCount": guest["vcpus"], "ramSizeInGb": guest["memory_mib"] / 1024,
                "disks": [{"createdAt": row["created_at"], "sizeInGb": guest["disk_gib"], "isSystemDisk": True,
                           "iops": 100, "path": "/dev/vda", "attachedTo": row["name"], "attachmentState": "attached"},
                          *stored],
            },
            "networking": {
                "monthlyTransfer": {"gbPerMonthAllocated": bundle["transferPerMonthInGb"]},
                "ports": [{
                    "fromPort": port["from_port"], "toPort": port["to_port"], "protocol": port["protocol"],
                    "accessFrom": "Anywhere (0.0.0.0/0)" if port["cidrs"] == ["0.0.0.0/0"] else "Custom",
                    "accessType": "public", "commonName": "", "accessDirection": "inbound", "cidrs": port["cidrs"],
                    "ipv6Cidrs": port["ipv6_cidrs"], "cidrListAliases": port["cidr_aliases"],
                } for port in opened],
            },
            "state": {"code": STATE_CODES[row["state"]], "name": row["state"]}, "username": row["username"],
            "sshKeyName": row["key_pair_name"], "metadataOptions": metadata_options.shape(row, guest["observed_metadata"]),
        }

    def start(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = get_row(connection, request, request.params["instanceName"])
        if row["state"] != "stopped":
            raise invalid_input(f"The instance {row['name']} is {row['state']}; only a stopped one can be started.")
        guest = get_guest(connection, row)
        values: dict[str, Any] = {"role": "run", "starts": guest["starts"] + 1, "force": False}
        if self._config.public_address == "changes" and guest["public_ipv4"] and not _static(connection, [row["id"]]):
            values["public_ipv4"] = addresses.free_public(connection, self._config.public_pool)
        return self._change(connection, request, row, guest, "StartInstance", "start", "pending", status="Started",
                            values=values)

    def stop(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = get_row(connection, request, request.params["instanceName"])
        force = bool(request.params.get("force"))
        if row["state"] != "running" and not (force and row["state"] in ("stopping", "pending", "rebooting")):
            raise invalid_input(f"The instance {row['name']} is {row['state']}; only a running one can be stopped.")
        guest = get_guest(connection, row)
        return self._change(connection, request, row, guest, "StopInstance", "stop", "stopping", status="Started",
                            values={"role": "stop", "force": force})

    def reboot(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = get_row(connection, request, request.params["instanceName"])
        if row["state"] != "running":
            raise invalid_input(f"The instance {row['name']} is {row['state']}; only a running one can be rebooted.")
        guest = get_guest(connection, row)
        return self._change(connection, request, row, guest, "RebootInstance", "reboot", "rebooting",
                            status="Succeeded", values={"reboots": guest["reboots"] + 1})

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Gone for its owner at once; the guest is torn down behind the answer."""
        row = get_row(connection, request, request.params["instanceName"])
        guest = get_guest(connection, row)
        attachments.refuse_while_copied(connection, guest["id"], f"delete the instance {row['name']}", row["id"])
        values: dict[str, Any] = {"role": "gone", "force": True}
        if _static(connection, [row["id"]]):
            # The static IP is free for another instance at once, also while this one's guest is still going.
            with contextlib.suppress(ApiError):
                values["public_ipv4"] = addresses.free_public(connection, self._config.public_pool)
        answer = self._change(connection, request, row, guest, "DeleteInstance", "delete", "stopping",
                              status="Succeeded", values=values)
        answer["operations"] += attachments.detach_all(connection, request, row["id"], guest["id"], self._clock.now())
        forget(connection, row["id"])
        return answer

    def _change(self, connection: Connection, request: Request, row: RowMapping, guest: RowMapping, type: str,
                workflow: str, state: str, *, status: str, values: dict[str, Any]) -> dict[str, Any]:
        addresses.leave(connection, guest, values)
        connection.execute(update(guests).where(guests.c.id == guest["id"]).values(**values))
        connection.execute(update(instances).where(instances.c.id == row["id"]).values(state=state))
        desired.bump(connection, guest["host_id"])
        arguments = {"guest": guest["id"], "starts": values.get("starts", guest["starts"]),
                     "reboots": values.get("reboots", guest["reboots"])}
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type=type, resource_name=row["name"],
            resource_type="Instance", resource_id=row["id"], zone=row["zone"], status=status, workflow=workflow,
            arguments=arguments)]}
