"""Snapshots of one disk: of block storage, attached or not, or of an instance's system disk.

Source: Lightsail API reference, data type DiskSnapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from skysail.contract.document import Volume
from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input
from skysail.resources import attachments, snapshot_rows, tags
from skysail.resources.disks import get_disk
from skysail.resources.instances import get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import instances

KIND = "DiskSnapshot"


class DiskSnapshots:
    """The actions on snapshots of disks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"CreateDiskSnapshot": self.create, "GetDiskSnapshot": self.get, "GetDiskSnapshots": self.list_,
                "DeleteDiskSnapshot": self.delete}

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        asked = request.params
        if bool(asked.get("diskName")) == bool(asked.get("instanceName")):
            raise invalid_input("Name either a diskName or an instanceName.")
        now = self._clock.now()
        if asked.get("instanceName"):
            instance = get_row(connection, request, asked["instanceName"])
            guest = get_guest(connection, instance)
            made = self._put(connection, request, _content(
                connection, instance, instance["id"], desired.system_volume(guest), guest["host_id"],
                {"instance_name": instance["name"], "instance_arn": attachments.arn(instance, "Instance")}))
            return {"operations": [made, snapshot_rows.record_source(connection, request, instance, made, now)]}
        disk = get_disk(connection, request, asked["diskName"])
        return {"operations": [self._put(connection, request, content(connection, disk))]}

    def _put(self, connection: Connection, request: Request, held: dict[str, Any]) -> dict[str, Any]:
        return snapshot_rows.put(connection, request, request.params["diskSnapshotName"], KIND, now=self._clock.now(), **held)

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = snapshot_rows.get(connection, request, request.params["diskSnapshotName"], KIND)
        return {"diskSnapshot": _shape(row, tags.of(connection, [row["id"]]))}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        found, token = snapshot_rows.page(connection, request, KIND)
        tagged = tags.of(connection, [row["id"] for row in found])
        return {"diskSnapshots": [_shape(row, tagged) for row in found], "nextPageToken": token}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = snapshot_rows.get(connection, request, request.params["diskSnapshotName"], KIND)
        return {"operations": [snapshot_rows.remove(connection, request, row, self._clock.now())]}


def content(connection: Connection, disk: RowMapping) -> dict[str, Any]:
    """What a snapshot of this disk holds now, as :func:`snapshot_rows.write` takes it; raises InvalidInputException when the
    disk's state, or that of the instance that it is attached to, forbids one."""
    if disk["state"] not in ("available", "in-use") or disk["attachment"] not in ("", "attached"):
        raise invalid_input("You can't create a snapshot of this disk right now. The state of this disk is: "
                            f"{disk['attachment'] or disk['state']}")
    owner = connection.execute(select(instances).where(instances.c.id == disk["instance_id"])).mappings().first()
    return _content(connection, owner, disk["id"], desired.disk_volume(disk), disk["host_id"],
                    {"disk_name": disk["name"], "disk_arn": attachments.arn(disk, "Disk")})


def _content(connection: Connection, owner: RowMapping | None, source_id: str, volume: Volume, host: str,
             source: dict[str, Any]) -> dict[str, Any]:
    if owner is not None and owner["state"] not in ("running", "stopped"):
        raise invalid_input(f"The instance {owner['name']} is {owner['state']}; a snapshot is made of a running or a "
                            "stopped one.")
    return {"host": host, "guest": get_guest(connection, owner)["id"] if owner is not None else "", "volumes": [volume],
            "source": source, "source_id": source_id, "size_gib": volume.size_gib}


def _shape(row: RowMapping, tagged: tags.Tagged) -> dict[str, Any]:
    source = row["source"]
    return snapshot_rows.common(row, tagged) | {
        "fromDiskName": source.get("disk_name"), "fromDiskArn": source.get("disk_arn"),
        "fromInstanceName": source.get("instance_name"), "fromInstanceArn": source.get("instance_arn"),
    }
