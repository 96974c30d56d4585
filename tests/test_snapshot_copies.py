"""CopySnapshot: within a region, between regions, of automatic snapshots; what lies on the disk, and what a crash leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config as BotoConfig

from clouds import Cloud, RealCloud, eventually, running_cloud
from crashing import Doom, running_tiny_cloud, whole
from skysail.inspect.verify import verify
from skysail.kit.config import load
from skysail.serve import endpoint
from test_auto_snapshots import asked, taken
from test_disks import create, disk, ended, snapshot, started
from test_instances import error
from test_snapshots import pattern, tiny, volume_of

TWO_REGIONS = '[regions]\nus-east-1 = ["a"]\neu-west-1 = ["a", "b"]\n'


def client_in(cloud: Cloud, region: str) -> Any:
    key, secret = cloud.credentials()
    return boto3.client("lightsail", region_name=region, endpoint_url=endpoint.url(cloud.config), aws_access_key_id=key,
                        aws_secret_access_key=secret, config=BotoConfig(retries={"total_max_attempts": 1}))


def copy(client: Any, target: str, **source: Any) -> Any:
    answer = client.copy_snapshot(targetSnapshotName=target, **{"sourceRegion": "us-east-1", **source})
    assert [(one["operationType"], one["resourceName"], one["status"]) for one in answer["operations"]] == [
        ("CopySnapshot", target, "Started")]
    return ended(client, answer)


def test_a_copy_goes_on_without_its_source(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    first = snapshot(client, "one", "first")
    copy(client, "second", sourceSnapshotName="first")
    second = client.get_instance_snapshot(instanceSnapshotName="second")["instanceSnapshot"]
    assert (second["state"], second["isFromAutoSnapshot"]) == ("available", False)
    for kept in ("fromInstanceName", "fromInstanceArn", "fromBlueprintId", "fromBundleId", "sizeInGb", "fromAttachedDisks"):
        assert second[kept] == first[kept]
    assert second["arn"] != first["arn"]
    client.delete_instance_snapshot(instanceSnapshotName="first")
    ended(client, client.create_instances_from_snapshot(
        instanceNames=["two"], instanceSnapshotName="second", availabilityZone="us-east-1b", bundleId="nano_3_0"))
    assert disk(client, "two-data")["attachedTo"] == "two"
    create(client, "loose")
    ended(client, client.create_disk_snapshot(diskName="loose", diskSnapshotName="third"))
    copy(client, "fourth", sourceSnapshotName="third")
    assert client.get_disk_snapshot(diskSnapshotName="fourth")["diskSnapshot"]["fromDiskName"] == "loose"


def test_wrong_copies_are_refused(cloud: Cloud) -> None:
    client = started(cloud, "one")
    answer = client.create_instance_snapshot(instanceName="one", instanceSnapshotName="snap")
    refused, missing = "InvalidInputException", "NotFoundException"
    named = {"sourceSnapshotName": "snap"}
    for wrong, kind, words in (
            (named, refused, "is pending"),
            ({}, refused, "Name either"),
            ({**named, "sourceResourceName": "one"}, refused, "Name either"),
            ({**named, "restoreDate": "2026-01-01"}, refused, "go with sourceResourceName"),
            ({"sourceSnapshotName": "none"}, missing, "does not exist"),
            ({"sourceSnapshotName": "one"}, refused, "is of type Instance"),
            ({"sourceResourceName": "none", "useLatestRestorableAutoSnapshot": True}, missing, "does not exist"),
            ({"sourceResourceName": "one"}, refused, "either restoreDate"),
            ({"sourceResourceName": "one", "useLatestRestorableAutoSnapshot": True}, missing, "can be restored"),
            ({**named, "sourceRegion": "eu-west-1"}, refused, "The region eu-west-1 does not exist here")):
        assert words in error(client.copy_snapshot, kind, targetSnapshotName="copy", **{"sourceRegion": "us-east-1", **wrong})
    ended(client, answer)
    assert "already" in error(client.copy_snapshot, refused, targetSnapshotName="one", sourceRegion="us-east-1", **named)


def test_an_automatic_snapshot_is_kept(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data")
    for name in ("one", "data"):
        client.enable_add_on(resourceName=name, addOnRequest=asked("00:00"))
    taken(cloud, "one", "data")
    (found,) = client.get_auto_snapshots(resourceName="data")["autoSnapshots"]
    copy(client, "kept", sourceResourceName="one", useLatestRestorableAutoSnapshot=True)
    copy(client, "kept-data", sourceResourceName="data", restoreDate=found["date"])
    copy(client, "again", sourceSnapshotName="kept")
    assert [(one["name"], one["isFromAutoSnapshot"]) for one in client.get_instance_snapshots()["instanceSnapshots"]] == [
        ("again", True), ("kept", True)]
    client.delete_disk(diskName="data")
    ended(client, client.delete_instance(instanceName="one"))
    ended(client, client.create_disk_from_snapshot(diskName="data", diskSnapshotName="kept-data", sizeInGb=8,
                                                   availabilityZone="us-east-1a"))
    ended(client, client.create_instances_from_snapshot(
        instanceNames=["one"], instanceSnapshotName="kept", availabilityZone="us-east-1a", bundleId="nano_3_0"))


def test_a_copy_in_another_region() -> None:
    with running_cloud() as cloud:
        cloud.stop()
        settings = (cloud.folder / "skysail.toml").read_text().replace('zones = ["a", "b"]\n', "")
        (cloud.folder / "skysail.toml").write_text(settings + TWO_REGIONS)
        cloud.config = load(str(cloud.folder))
        cloud.start("agent")
        cloud.start("controller")
        client, there = started(cloud, "one"), client_in(cloud, "eu-west-1")
        snapshot(client, "one", "snap")
        copy(there, "snap", sourceSnapshotName="snap")
        assert there.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]["location"]["regionName"] == \
            "eu-west-1"
        ended(there, there.create_instances_from_snapshot(
            instanceNames=["one"], instanceSnapshotName="snap", availabilityZone="eu-west-1b", bundleId="nano_3_0"))
        client.delete_instance_snapshot(instanceSnapshotName="snap")
        assert there.get_instance(instanceName="one")["instance"]["location"]["availabilityZone"] == "eu-west-1b"
        assert len(there.get_instance_snapshots()["instanceSnapshots"]) == 1
        error(there.copy_snapshot, "NotFoundException", sourceRegion="us-east-1", sourceSnapshotName="snap",
              targetSnapshotName="more")


# --- what lies on the disk

@pytest.fixture(scope="module")
def tiny_cloud() -> Iterator[RealCloud]:
    with running_tiny_cloud() as made:
        yield made


def folder_of(cloud: RealCloud, arn: str) -> Any:
    return cloud.config.snapshots_dir / arn.rpartition("/")[2]


def copied_disk(cloud: RealCloud, client: Any) -> None:
    """A disk ``data`` with something on it, and its snapshot ``snap``."""
    create(client, "data")
    pattern(cloud, volume_of(client, "data"), 0x5A, write=True)
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="snap"))


@pytest.mark.real
def test_a_copy_shares_its_sources_files_and_outlives_it(tiny_cloud: RealCloud) -> None:
    client = tiny_cloud.client()
    copied_disk(tiny_cloud, client)
    copy(client, "copy", sourceSnapshotName="snap")
    one, two = (folder_of(tiny_cloud, client.get_disk_snapshot(diskSnapshotName=name)["diskSnapshot"]["arn"])
                for name in ("snap", "copy"))
    (file,) = one.glob("*.qcow2")
    assert (two / file.name).samefile(file)
    assert json.loads((two / "manifest.json").read_text())["id"] == two.name
    client.delete_disk_snapshot(diskSnapshotName="snap")
    eventually(lambda: not one.exists(), what="the source's folder goes by itself")
    ended(client, client.create_disk_from_snapshot(diskName="other", diskSnapshotName="copy", sizeInGb=9,
                                                   availabilityZone="us-east-1a"))
    pattern(tiny_cloud, volume_of(client, "other"), 0x5A)
    for name in ("data", "other"):
        client.delete_disk(diskName=name)
    client.delete_disk_snapshot(diskSnapshotName="copy")
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), what="the files go with the last that needs them")
    whole(tiny_cloud)


@pytest.mark.real
def test_nothing_grows_from_files_that_changed(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "one")
    copied_disk(tiny_cloud, client)
    snapshot(client, "one", "server")
    for arn in (client.get_disk_snapshot(diskSnapshotName="snap")["diskSnapshot"]["arn"],
                client.get_instance_snapshot(instanceSnapshotName="server")["instanceSnapshot"]["arn"]):
        (file,) = folder_of(tiny_cloud, arn).glob("*.qcow2")
        with file.open("r+b") as opened:
            opened.seek(-1, 2)
            (last,) = opened.read(1)
            opened.seek(-1, 2)
            opened.write(bytes([last ^ 1]))
    told = [one for one in verify(tiny_cloud.config, 0.1) if "its checksum is another one" in one.saw]
    assert len(told) == 2
    place = {"availabilityZone": "us-east-1a"}
    (failed,) = ended(client, client.create_disk_from_snapshot(
        diskName="other", diskSnapshotName="snap", sizeInGb=9, **place), "Failed")
    assert failed["errorCode"] == "DiskCreationFailed" and "its checksum is another one" in failed["errorDetails"]
    (failed,) = ended(client, client.create_instances_from_snapshot(
        instanceNames=["two"], instanceSnapshotName="server", bundleId="nano_3_0", **place), "Failed")
    assert failed["errorCode"] == "InstanceLaunchFailed" and "its checksum is another one" in failed["errorDetails"]
    (failed,) = ended(client, client.copy_snapshot(sourceRegion="us-east-1", sourceSnapshotName="snap",
                                                   targetSnapshotName="copy"), "Failed")
    assert failed["errorCode"] == "SnapshotFailed" and "its checksum is another one" in failed["errorDetails"]
    assert client.get_disk_snapshot(diskSnapshotName="copy")["diskSnapshot"]["state"] == "error"
    for name in ("data", "other"):
        client.delete_disk(diskName=name)
    ended(client, client.delete_instance(instanceName="one"))
    for name in ("snap", "copy"):
        client.delete_disk_snapshot(diskSnapshotName=name)
    client.delete_instance_snapshot(instanceSnapshotName="server")
    whole(tiny_cloud)


@pytest.mark.real
@pytest.mark.parametrize("victim", ["agent", "controller"])
def test_it_dies_at_every_step_of_a_copy(tiny_cloud: RealCloud, victim: str) -> None:
    client = tiny_cloud.client()
    copied_disk(tiny_cloud, client)
    doom = Doom(tiny_cloud, victim)

    def duplicate() -> None:
        client.copy_snapshot(sourceRegion="us-east-1", sourceSnapshotName="snap", targetSnapshotName="copy")

    def forget() -> None:
        client.delete_disk_snapshot(diskSnapshotName="copy")
        whole(tiny_cloud)

    while (died := doom.during("copy", duplicate)) is not None:
        assert client.get_disk_snapshot(diskSnapshotName="copy")["diskSnapshot"]["state"] == "completed", died
        forget()
    assert len(doom.deaths["copy"]) >= 4
    if victim == "agent":
        assert {"os:link", "os:rename", "durable:replace"} <= {name.split(" #")[0] for name in doom.deaths["copy"]}
        assert not doom.missed(), doom.missed()
    forget()
    client.delete_disk(diskName="data")
    client.delete_disk_snapshot(diskSnapshotName="snap")
    whole(tiny_cloud)
    doom.disarm()
