"""Block storage and snapshots from the outside: boto3 against a real controller and an agent whose engines are simulated."""

from __future__ import annotations

from typing import Any

import pytest

from clouds import Cloud, eventually, running_cloud
from crashing import rows
from test_instances import error, launch, state

GOOD = {"availabilityZone": "us-east-1a", "sizeInGb": 8}


def ended(client: Any, answer: dict[str, Any], status: str = "Succeeded") -> list[dict[str, Any]]:
    """The operations of an answer, once all have ended."""
    def looked() -> list[dict[str, Any]]:
        found = [client.get_operation(operationId=one["id"])["operation"] for one in answer["operations"]]
        return found if all(one["isTerminal"] for one in found) else []
    found = eventually(looked, what="the operations end")
    assert {one["status"] for one in found} == {status}, found
    return found


def started(cloud: Cloud, *names: str) -> Any:
    """A client of the cloud, in which these instances run."""
    client = cloud.client()
    launch(client, *names)
    for name in names:
        eventually(lambda name=name: state(client, name) == "running")
    return client


def stopped(client: Any, name: str) -> None:
    ended(client, client.stop_instance(instanceName=name))


def disk(client: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get_disk(diskName=name)["disk"]
    return found


def create(client: Any, name: str, **more: Any) -> None:
    ended(client, client.create_disk(diskName=name, **GOOD, **more))


def snapshot(client: Any, instance: str, name: str) -> dict[str, Any]:
    ended(client, client.create_instance_snapshot(instanceName=instance, instanceSnapshotName=name))
    found: dict[str, Any] = client.get_instance_snapshot(instanceSnapshotName=name)["instanceSnapshot"]
    return found


def test_the_life_of_a_disk(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data", tags=[{"key": "kind", "value": "test"}])
    made = disk(client, "data")
    assert (made["state"], made["isAttached"], made["sizeInGb"]) == ("available", False, 8)
    assert made["tags"] == [{"key": "kind", "value": "test"}] and made["location"]["availabilityZone"] == "us-east-1a"
    assert "data" in client.get_active_names()["activeNames"]

    answer = client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf")
    assert {one["resourceType"] for one in answer["operations"]} == {"Disk", "Instance"}
    assert {one["status"] for one in answer["operations"]} == {"Started"}
    ended(client, answer)
    held = disk(client, "data")
    assert (held["state"], held["attachedTo"], held["path"], held["attachmentState"], held["autoMountStatus"]) == (
        "in-use", "one", "/dev/xvdf", "attached", "NotMounted")
    shown = client.get_instance(instanceName="one")["instance"]["hardware"]["disks"]
    assert [(one["path"], one["isSystemDisk"]) for one in shown] == [("/dev/vda", True), ("/dev/xvdf", False)]

    refused = "InvalidInputException"
    assert "in-use" in error(client.detach_disk, refused, diskName="data")
    assert "in-use" in error(client.delete_disk, refused, diskName="data")
    assert "in-use" in error(client.attach_disk, refused, diskName="data", instanceName="one", diskPath="/dev/xvdg")
    stopped(client, "one")
    ended(client, client.detach_disk(diskName="data"))
    assert disk(client, "data")["state"] == "available" and "path" not in disk(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdz", autoMounting=True))
    assert disk(client, "data")["autoMountStatus"] == "Pending"
    ended(client, client.start_instance(instanceName="one"))
    assert (disk(client, "data")["attachmentState"], disk(client, "data")["autoMountStatus"]) == ("attached", "Mounted")

    answer = client.delete_instance(instanceName="one")
    assert [one["operationType"] for one in answer["operations"]] == ["DeleteInstance", "DetachDisk"]
    ended(client, answer)
    assert disk(client, "data")["state"] == "available"
    assert client.delete_disk(diskName="data")["operations"][0]["isTerminal"]
    error(client.get_disk, "NotFoundException", diskName="data")
    assert client.get_disks()["disks"] == []
    create(client, "data")


def test_wrong_requests_about_disks(cloud: Cloud) -> None:
    client = started(cloud, "one")
    refused = "InvalidInputException"
    for wrong in ({"sizeInGb": 7}, {"sizeInGb": 16385}, {"availabilityZone": "us-east-1z"}, {"diskName": "one"},
                  {"availabilityZone": "us-east-1c"}):
        error(client.create_disk, refused, **{"diskName": "data", **GOOD, **wrong})
    for name in ("data", "more"):
        create(client, name)
    with running_cloud("disk_overcommit = 0.00002\n") as full:  # of a simulated host's petabyte
        eventually(lambda: full.client().get_blueprints()["blueprints"], 20)
        full.client().create_disk(diskName="fits", **GOOD)
        assert "may promise" in error(full.client().create_disk, refused, diskName="data", availabilityZone="us-east-1a",
                                      sizeInGb=64)
    for path in ("/dev/sda", "/dev/xvda", "/dev/xvdff", "xvdf"):
        error(client.attach_disk, refused, diskName="data", instanceName="one", diskPath=path)
    error(client.attach_disk, "NotFoundException", diskName="none", instanceName="one", diskPath="/dev/xvdf")
    error(client.attach_disk, "NotFoundException", diskName="data", instanceName="none", diskPath="/dev/xvdf")
    error(client.detach_disk, refused, diskName="data")
    client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf")
    assert "/dev/xvdf is in use" in error(client.attach_disk, refused, diskName="more", instanceName="one",
                                          diskPath="/dev/xvdf")


def test_a_snapshot_and_what_is_made_of_it(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    answer = client.create_instance_snapshot(instanceName="one", instanceSnapshotName="snap",
                                             tags=[{"key": "kind", "value": "test"}])
    assert [(one["resourceType"], one["status"]) for one in answer["operations"]] == [
        ("InstanceSnapshot", "Started"), ("Instance", "Started")]
    shown = client.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]
    assert shown["state"] == "pending" and shown["progress"].endswith("%") and shown["progress"] != "100%"
    assert "right now" in error(client.delete_instance, "InvalidInputException", instanceName="one")
    error(client.create_instances_from_snapshot, "InvalidInputException", instanceNames=["two"], bundleId="nano_3_0",
          availabilityZone="us-east-1a", instanceSnapshotName="snap")
    eventually(lambda: client.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]["progress"] == "50%")
    ended(client, answer)
    shown = client.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]
    assert (shown["state"], shown["progress"], shown["sizeInGb"], shown["fromInstanceName"], shown["fromBundleId"]) == (
        "available", "100%", 20, "one", "nano_3_0")
    assert [one["name"] for one in shown["fromAttachedDisks"]] == ["data"]
    assert shown["tags"] == [{"key": "kind", "value": "test"}]
    assert client.get_instance_snapshots()["instanceSnapshots"] == [shown]

    answer = client.create_instances_from_snapshot(
        instanceNames=["two", "three"], bundleId="small_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap",
        attachedDiskMapping={"two": [{"originalDiskPath": "/dev/xvdf", "newDiskName": "mine"}]})
    ended(client, answer)
    two = client.get_instance(instanceName="two")["instance"]
    assert two["hardware"]["cpuCount"] == 2 and two["hardware"]["ramSizeInGb"] == 2.0
    assert [(one["sizeInGb"], one.get("name")) for one in two["hardware"]["disks"]] == [(60, None), (8, "mine")]
    assert disk(client, "three-data")["attachedTo"] == "three"
    one = client.get_instance(instanceName="one")["instance"]
    assert one["privateIpAddress"] != two["privateIpAddress"]

    # Others were made of it: it is gone for its owner at once, and they go on.
    client.delete_instance_snapshot(instanceSnapshotName="snap")
    error(client.get_instance_snapshot, "NotFoundException", instanceSnapshotName="snap")
    stopped(client, "two")
    ended(client, client.start_instance(instanceName="two"))
    again = snapshot(client, "two", "snap")
    assert again["state"] == "available"
    # And what they need of it moves up to them.
    eventually(lambda: len(rows(cloud, "SELECT id FROM snapshots")) == 1, 60, "what nobody wants any more goes")
    assert {row["origin"] for row in rows(cloud, "SELECT CAST(origin AS TEXT) AS origin FROM guests UNION "
                                                "SELECT CAST(origin AS TEXT) AS origin FROM disks")} == {"null"}


def test_a_smaller_disk_is_refused(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 20)
    client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="micro_3_0")
    eventually(lambda: state(client, "one") == "running")
    stopped(client, "one")
    snapshot(client, "one", "snap")
    common = {"instanceNames": ["two"], "availabilityZone": "us-east-1a", "instanceSnapshotName": "snap"}
    assert "40 GB" in error(client.create_instances_from_snapshot, "InvalidInputException", bundleId="nano_3_0", **common)
    error(client.create_instances_from_snapshot, "NotFoundException", bundleId="micro_3_0",
          **{**common, "instanceSnapshotName": "none"})
    error(client.create_instances_from_snapshot, "InvalidInputException", bundleId="micro_3_0",
          **{**common, "availabilityZone": "us-east-1c"})


def test_snapshots_of_disks(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data")
    answer = client.create_disk_snapshot(diskName="data", diskSnapshotName="copy")
    assert "right now" in error(client.delete_disk, "InvalidInputException", diskName="data")
    ended(client, answer)
    shown = client.get_disk_snapshot(diskSnapshotName="copy")["diskSnapshot"]
    assert (shown["state"], shown["progress"], shown["fromDiskName"]) == ("completed", "100%", "data")
    error(client.create_disk_from_snapshot, "InvalidInputException", diskName="small", diskSnapshotName="copy",
          availabilityZone="us-east-1a", sizeInGb=7)
    ended(client, client.create_disk_from_snapshot(diskName="large", diskSnapshotName="copy",
                                                   availabilityZone="us-east-1a", sizeInGb=32))
    assert disk(client, "large")["sizeInGb"] == 32
    ended(client, client.create_disk_snapshot(instanceName="one", diskSnapshotName="system"))
    assert client.get_disk_snapshot(diskSnapshotName="system")["diskSnapshot"]["fromInstanceName"] == "one"
    assert len(client.get_disk_snapshots()["diskSnapshots"]) == 2
    for name in ("copy", "system"):
        client.delete_disk_snapshot(diskSnapshotName=name)
        error(client.get_disk_snapshot, "NotFoundException", diskSnapshotName=name)
    assert disk(client, "large")["state"] == "available"


@pytest.mark.parametrize("victim", ["controller", "agent"])
def test_kill_9_loses_no_snapshot(victim: str) -> None:
    with running_cloud() as cloud:
        client = started(cloud, "one")
        create(client, "data")
        answers = [client.create_instance_snapshot(instanceName="one", instanceSnapshotName=f"snap-{number}")
                   for number in range(3)]
        answers.append(client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
        cloud.kill(victim)
        cloud.start(victim)
        for answer in answers:
            ended(client, answer)
