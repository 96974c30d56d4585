"""Block-storage disks: CreateDisk, CreateDiskFromSnapshot, AttachDisk, DetachDisk, DeleteDisk, GetDisk, GetDisks.

Source: Lightsail API reference and its limits: 8 to 16384 GB, attached as /dev/xvdf to /dev/xvdz, detached only from an
instance that is stopped.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.contract.document import Origin
from skysail.hosts import desired, roster
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.operations.workflow import Step, StepFailed, Workflow
from skysail.resources import add_ons, attachments, names, paging, regions, snapshot_choice, snapshot_rows, tags
from skysail.resources.instances import get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import disks, guests, host_zones, hosts, instances, operations, snapshots

MIN_GIB, MAX_GIB = 8, 16384
_PATH = re.compile(r"/dev/xvd[f-z]")


class Disks:
    """The actions on disks."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {
            "CreateDisk": self.create, "CreateDiskFromSnapshot": self.create_from_snapshot, "AttachDisk": self.attach,
            "DetachDisk": self.detach, "DeleteDisk": self.delete, "GetDisk": self.get, "GetDisks": self.list_,
        }

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        """A blank disk on a host of its zone."""
        zone = regions.zone(self._config, request, request.params["availabilityZone"])
        serving = select(host_zones.c.host_id).join(hosts, hosts.c.id == host_zones.c.host_id).where(
            host_zones.c.region == request.region, host_zones.c.zone == zone, hosts.c.cordoned.is_(False))
        host = connection.execute(serving.order_by(host_zones.c.host_id)).scalars().first()
        if host is None:
            raise invalid_input(f"The zone {request.params['availabilityZone']} has no host for a disk.")
        return {"operations": [self._create(connection, request, zone, host, None)]}

    def create_from_snapshot(self, connection: Connection, request: Request) -> dict[str, Any]:
        """A disk that begins as what a disk snapshot holds; as large or larger."""
        asked = request.params
        zone = regions.zone(self._config, request, asked["availabilityZone"])
        row = snapshot_choice.choose(connection, request, "DiskSnapshot", "diskSnapshotName", "sourceDiskName")
        name = row["name"]
        if asked["sizeInGb"] < row["size_gib"]:
            raise invalid_input(f"The disk snapshot {name} needs a disk of at least {row['size_gib']} GB.")
        if asked["availabilityZone"] not in regions.zones_of(connection).get(row["host_id"], ()):
            raise invalid_input(f"No host in {asked['availabilityZone']} holds the disk snapshot {name}.")
        origin = Origin(snapshot=row["id"], volume=row["volumes"][0]["id"])
        return {"operations": [self._create(connection, request, zone, row["host_id"], origin)]}

    def _create(self, connection: Connection, request: Request, zone: str, host: str,
                origin: Origin | None) -> dict[str, Any]:
        asked = request.params
        identifier = put(self._config, connection, request, asked["diskName"], zone=zone, host=host,
                         size_gib=asked["sizeInGb"], origin=origin, now=self._clock.now())
        tags.put(connection, identifier, asked.get("tags") or [])
        add_ons.put(connection, identifier, "Disk", asked.get("addOns") or [], self._clock.now())
        return history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=asked["diskName"],
            resource_type="Disk", resource_id=identifier, zone=zone, status="Started", workflow="create disk",
            arguments={"disk": identifier})

    def attach(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Plugged in while the instance runs, or there at its next start. With ``autoMounting`` the instance mounts it, and
        formats it first when it is blank."""
        asked = request.params
        row, instance = self._get(connection, request), get_row(connection, request, asked["instanceName"])
        path = asked["diskPath"]
        if not _PATH.fullmatch(path):
            raise invalid_input(f"The disk path {path[:40]!r} is not valid.", "Paths are /dev/xvdf to /dev/xvdz.")
        if row["instance_id"] is not None or row["state"] != "available":
            raise _not_now("attach", row)
        _refuse_while_copied(connection, row, "attach")
        guest = get_guest(connection, instance)
        if row["zone"] != instance["zone"] or not roster.sees(connection, guest["host_id"], row["host_id"]):
            raise invalid_input(f"The disk {row['name']} and the instance {instance['name']} are not in the same zone.")
        if instance["state"] not in ("running", "stopped"):
            raise invalid_input(f"The instance {instance['name']} is {instance['state']}; a disk is attached to a running "
                                "or a stopped one.")
        if connection.execute(select(disks.c.id).where(disks.c.instance_id == instance["id"], disks.c.path == path)).first():
            raise invalid_input(f"The disk path {path} is in use on the instance {instance['name']}.")
        connection.execute(update(disks).where(disks.c.id == row["id"]).values(
            instance_id=instance["id"], path=path, state="in-use", attachment="attaching", host_id=guest["host_id"],
            auto_mount=bool(asked.get("autoMounting"))))
        for host in {row["host_id"], guest["host_id"]}:
            desired.bump(connection, host)
        return self._both(connection, request, row, instance, "attach disk", guest["id"])

    def detach(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = self._get(connection, request)
        if row["instance_id"] is None:
            raise _not_now("detach", row)
        instance = connection.execute(select(instances).where(instances.c.id == row["instance_id"])).mappings().one()
        guest = get_guest(connection, instance)
        if instance["state"] != "stopped":
            raise _not_now("detach", row, f"Unmount it, and stop the instance {instance['name']} first.")
        attachments.refuse_while_copied(connection, guest["id"], "detach this disk")
        connection.execute(update(disks).where(disks.c.id == row["id"]).values(
            instance_id=None, path="", attachment="detaching"))
        desired.bump(connection, row["host_id"])
        return self._both(connection, request, row, instance, "detach disk", guest["id"])

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Gone for its owner at once; its file goes behind the answer."""
        row = self._get(connection, request)
        if row["instance_id"] is not None or row["attachment"]:
            raise _not_now("delete", row, "Detach it first.")
        _refuse_while_copied(connection, row, "delete", leaving=row["id"])
        connection.execute(update(disks).where(disks.c.id == row["id"]).values(role="gone"))
        names.release(connection, row["account_id"], row["region"], row["name"])
        tags.forget(connection, row["id"])
        add_ons.forget(connection, row["id"])
        snapshot_rows.forget_source(connection, row["id"])
        desired.bump(connection, row["host_id"])
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type="DeleteDisk", resource_name=row["name"], resource_type="Disk",
            resource_id=row["id"], zone=row["zone"], workflow="delete disk", arguments={"disk": row["id"]})]}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        return {"disk": attachments.shapes(connection, [self._get(connection, request)], self._clock.now())[0]}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = select(disks).where(disks.c.account_id == request.account_id, disks.c.region == request.region,
                                    disks.c.role == "keep")
        found, token = paging.read(connection, query, request.params.get("pageToken"), disks.c.name)
        return {"disks": attachments.shapes(connection, found, self._clock.now()), "nextPageToken": token}

    def _get(self, connection: Connection, request: Request) -> RowMapping:
        return get_disk(connection, request, request.params["diskName"])

    def _both(self, connection: Connection, request: Request, row: RowMapping, instance: RowMapping, workflow: str,
              guest: str) -> dict[str, Any]:
        """One operation for each of the two that are touched."""
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=name, resource_type=kind,
            resource_id=identifier, zone=row["zone"], status="Started", details=other, workflow=workflow,
            arguments={"disk": row["id"], "guest": guest})
            for name, kind, identifier, other in ((row["name"], "Disk", row["id"], instance["name"]),
                                                  (instance["name"], "Instance", instance["id"], row["name"]))]}


def get_disk(connection: Connection, request: Request, name: str) -> RowMapping:
    """The caller's disk ``name`` in this region; raises NotFoundException."""
    row = connection.execute(select(disks).where(
        disks.c.account_id == request.account_id, disks.c.region == request.region, disks.c.name == name,
        disks.c.role == "keep")).mappings().first()
    if row is None:
        raise not_found(f"The Disk does not exist: {name}", "GetDisks lists the ones that do.")
    return row


def put(config: Config, connection: Connection, request: Request, name: str, *, zone: str, host: str, size_gib: int,
        origin: Origin | None, now: float, **more: Any) -> str:
    """Write the row of a new disk, and bump its host; its id. Raises InvalidInputException."""
    if not MIN_GIB <= size_gib <= MAX_GIB:
        raise invalid_input(f"A disk has {MIN_GIB} to {MAX_GIB} GB, not {size_gib}.")
    attachments.refuse_beyond_room(config, connection, host, size_gib)
    identifier = "d-" + secrets.token_hex(5)
    names.claim(connection, request, name, "Disk", identifier)
    connection.execute(insert(disks).values(**{
        "id": identifier, "account_id": request.account_id, "region": request.region, "zone": zone, "name": name,
        "host_id": host, "size_gib": size_gib, "origin": msgspec.to_builtins(origin), "state": "pending", "created_at": now,
        **more}))
    desired.bump(connection, host)
    return identifier


def _refuse_while_copied(connection: Connection, row: RowMapping, what: str, leaving: str = "") -> None:
    """A disk of no instance is copied as it lies: nobody may write it meanwhile."""
    for found in connection.execute(attachments.being_copied(leaving).where(snapshots.c.guest_id == "")):
        if row["id"] in {volume["id"] for volume in found.volumes}:
            raise invalid_input(f"You can't {what} this disk right now: the snapshot {found.name} is being made of it.")


def _not_now(what: str, row: RowMapping, tip: str = "") -> Exception:
    return invalid_input(f"You can't {what} this disk right now. The state of this disk is: {row['state']}", tip)


# --- behind the operations

def _row(connection: Connection, operation: RowMapping) -> RowMapping | None:
    return connection.execute(select(disks).where(disks.c.id == operation["arguments"]["disk"])).mappings().first()


def _change(connection: Connection, row: RowMapping, **values: Any) -> None:
    connection.execute(update(disks).where(disks.c.id == row["id"]).values(**values))


def _await_made(connection: Connection, operation: RowMapping, now: float) -> bool:
    row = _row(connection, operation)
    if row is None or row["role"] == "gone" or row["made"]:
        return True
    if row["observed_state"] == "failed":
        raise StepFailed("DiskCreationFailed", row["reason"] or "the disk could not be made")
    if row["observed_state"] != "available":
        return False
    _change(connection, row, made=True, state="available" if row["instance_id"] is None else "in-use")
    desired.bump(connection, row["host_id"])
    return True


def _undo_create(connection: Connection, operation: RowMapping, now: float) -> None:
    """It stays, in the state ``error``, until its owner deletes it."""
    row = _row(connection, operation)
    if row is not None:
        _change(connection, row, state="error")


def _await_attached(connection: Connection, operation: RowMapping, now: float) -> bool:
    row = _row(connection, operation)
    if row is None or row["instance_id"] is None:
        return True  # its instance was deleted meanwhile
    guest = connection.execute(select(guests.c.observed_disks, guests.c.observed_refused, guests.c.host_id).where(
        guests.c.id == operation["arguments"]["guest"])).first()
    if guest is not None and guest.host_id != row["host_id"]:
        raise StepFailed("DiskAttachmentFailed", "its instance went to another host at that moment")
    if guest is not None and row["id"] in guest.observed_refused:
        raise StepFailed("DiskAttachmentFailed", guest.observed_refused[row["id"]])
    if guest is not None and row["id"] not in guest.observed_disks:
        return False
    _change(connection, row, attachment="attached")
    return True


def _undo_attach(connection: Connection, operation: RowMapping, now: float) -> None:
    """The disk is free again, once neither of the two operations needs to see any more why it is."""
    row = _row(connection, operation)
    others = connection.execute(select(operations.c.id).where(
        operations.c.workflow == "attach disk", operations.c.done.is_(False), operations.c.unwinding.is_(False),
        operations.c.id != operation["id"], operations.c.arguments["disk"].as_string() == operation["arguments"]["disk"]))
    if row is not None and row["attachment"] == "attaching" and others.first() is None:
        _change(connection, row, instance_id=None, path="", attachment="", state="available")
        desired.bump(connection, row["host_id"])


def _await_detached(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The guest that had it lets it go, or is gone itself: nobody writes it any more."""
    row = _row(connection, operation)
    if row is None or row["instance_id"] is not None or row["attachment"] != "detaching":
        return True
    guest = connection.execute(select(guests).where(guests.c.id == operation["arguments"]["guest"])).mappings().first()
    if guest is not None and guest["observed_state"] != "gone" and row["id"] in guest["observed_disks"]:
        return False
    _change(connection, row, attachment="", state="available")
    return True


def _await_gone(connection: Connection, operation: RowMapping, now: float) -> bool:
    row = _row(connection, operation)
    if row is None:
        return True
    if row["observed_state"] != "gone":
        return False
    connection.execute(delete(disks).where(disks.c.id == row["id"]))
    desired.bump(connection, row["host_id"])
    return True


WORKFLOWS = {
    workflow.name: workflow for workflow in (
        Workflow("create disk", (Step("await made", _await_made, _undo_create),)),
        Workflow("attach disk", (Step("await attached", _await_attached, _undo_attach),)),
        Workflow("detach disk", (Step("await detached", _await_detached),)),
        Workflow("delete disk", (Step("await gone", _await_gone),)),
    )
}
