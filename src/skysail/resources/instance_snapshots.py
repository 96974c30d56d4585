"""Snapshots of instances, their attached disks included, and instances made from them.

Source: Lightsail API reference, data type InstanceSnapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from skysail.contract.document import Origin
from skysail.hosts import desired
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.resources import attachments, catalog, snapshot_choice, snapshot_rows, tags
from skysail.resources import disks as disk_rows
from skysail.resources.instances import Instances, get_guest, get_row
from skysail.resources.request import Request
from skysail.store.schema import disks

KIND = "InstanceSnapshot"


class InstanceSnapshots:
    """The actions on snapshots of instances."""

    def __init__(self, config: Config, clock: Clock, launcher: Instances) -> None:
        self._config = config
        self._clock = clock
        self._launcher = launcher

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {
            "CreateInstanceSnapshot": self.create, "GetInstanceSnapshot": self.get, "GetInstanceSnapshots": self.list_,
            "DeleteInstanceSnapshot": self.delete, "CreateInstancesFromSnapshot": self.launch,
        }

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Two operations: the snapshot's ends when it is whole, the instance's when its moment is past."""
        instance, now = get_row(connection, request, request.params["instanceName"]), self._clock.now()
        made = snapshot_rows.put(connection, request, request.params["instanceSnapshotName"], KIND, now=now,
                                 **content(connection, instance, now))
        return {"operations": [made, snapshot_rows.record_source(connection, request, instance, made, now)]}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = snapshot_rows.get(connection, request, request.params["instanceSnapshotName"], KIND)
        return {"instanceSnapshot": _shape(row, tags.of(connection, [row["id"]]))}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        found, token = snapshot_rows.page(connection, request, KIND)
        tagged = tags.of(connection, [row["id"] for row in found])
        return {"instanceSnapshots": [_shape(row, tagged) for row in found], "nextPageToken": token}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = snapshot_rows.get(connection, request, request.params["instanceSnapshotName"], KIND)
        return {"operations": [snapshot_rows.remove(connection, request, row, self._clock.now())]}

    def launch(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Instances that begin as the snapshot, each with disks that begin as its attached ones."""
        asked = request.params
        row = snapshot_choice.choose(connection, request, KIND, "instanceSnapshotName", "sourceInstanceName")
        bundle, source = catalog.get_bundle(asked["bundleId"]), row["source"]
        if bundle["diskSizeInGb"] < row["size_gib"]:
            raise invalid_input(f"The snapshot {row['name']} needs a disk of {row['size_gib']} GB, the bundle "
                                f"{bundle['bundleId']} has {bundle['diskSizeInGb']} GB.", "Choose a larger bundle.")
        image = {"digest": source["image"], "blueprint": source["blueprint"], "name": source["blueprint_name"],
                 "user": source["user"], "size_gib": row["size_gib"]}
        made = self._launcher.launch(connection, request, bundle, image,
                                     Origin(snapshot=row["id"], volume=row["volumes"][0]["id"]), row["host_id"])
        made += [operation for name in asked["instanceNames"] for operation in self._disks(connection, request, row, name)]
        return {"operations": made}

    def _disks(self, connection: Connection, request: Request, row: RowMapping, name: str) -> list[dict[str, Any]]:
        """The attached disks of the new instance ``name``."""
        instance = get_row(connection, request, name)
        chosen = {one.get("originalDiskPath"): one.get("newDiskName")
                  for one in (request.params.get("attachedDiskMapping") or {}).get(name, [])}
        known = {shape["path"] for shape in row["source"]["disks"]}
        if set(chosen) - known:
            raise invalid_input(f"The snapshot {row['name']} has no disk at {sorted(map(str, set(chosen) - known))}.")
        made = []
        for shape, volume in zip(row["source"]["disks"], row["volumes"][1:], strict=True):
            named = chosen.get(shape["path"]) or f"{name}-{shape['name']}"
            disk = disk_rows.put(
                self._config, connection, request, named, zone=instance["zone"], host=row["host_id"],
                size_gib=shape["sizeInGb"], origin=Origin(snapshot=row["id"], volume=volume["id"]), now=self._clock.now(),
                instance_id=instance["id"], path=shape["path"], attachment="attached")
            made.append(history.record(
                connection, request, now=self._clock.now(), type="CreateDiskFromSnapshot", resource_name=named,
                resource_type="Disk", resource_id=disk, zone=instance["zone"], status="Started", workflow="create disk",
                arguments={"disk": disk}))
        return made


def content(connection: Connection, instance: RowMapping, now: float) -> dict[str, Any]:
    """What a snapshot of this instance holds now, as :func:`snapshot_rows.write` takes it; raises InvalidInputException when
    the instance is neither running nor stopped."""
    if instance["state"] not in ("running", "stopped"):
        raise invalid_input(f"The instance {instance['name']} is {instance['state']}; a snapshot is made of a running "
                            "or a stopped one.")
    guest = get_guest(connection, instance)
    attached = connection.execute(select(disks).where(
        disks.c.instance_id == instance["id"], disks.c.attachment == "attached").order_by(disks.c.path)).mappings().all()
    source = {
        "instance_name": instance["name"], "instance_arn": attachments.arn(instance, "Instance"),
        "blueprint": instance["blueprint_id"], "blueprint_name": instance["blueprint_name"],
        "bundle": instance["bundle_id"], "user": instance["username"], "image": guest["image"],
        "disks": attachments.shapes(connection, attached, now),
    }
    return {"host": guest["host_id"], "guest": guest["id"], "source": source, "source_id": instance["id"],
            "volumes": [desired.system_volume(guest), *map(desired.disk_volume, attached)], "size_gib": guest["disk_gib"]}


def _shape(row: RowMapping, tagged: tags.Tagged) -> dict[str, Any]:
    source = row["source"]
    return snapshot_rows.common(row, tagged) | {
        "fromAttachedDisks": source["disks"], "fromInstanceName": source["instance_name"],
        "fromInstanceArn": source["instance_arn"], "fromBlueprintId": source["blueprint"], "fromBundleId": source["bundle"],
    }
