"""Snapshots and block storage with real QEMU processes: what lies on the disk, what a crash leaves, what the guest sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from clouds import RealCloud, eventually
from crashing import guest_of, pid_of, ready, running_tiny_cloud, whole
from skysail.kit.process import run
from test_disks import create, disk, ended, snapshot, stopped
from test_instances import launch, state

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tiny_cloud() -> Iterator[RealCloud]:
    """Real QEMU processes with a system of 47 bytes, which has no guest agent."""
    with running_tiny_cloud() as made:
        yield made


def manifest(cloud: RealCloud, arn: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (cloud.config.snapshots_dir / arn.rpartition("/")[2] / "manifest.json").read_text())
    return found


def pattern(cloud: RealCloud, volume: str, byte: int, at: str = "1M", *, write: bool = False) -> None:
    """Write, or else find, 64 KiB of ``byte`` in a volume that nobody has open."""
    path = cloud.config.volumes_dir / f"{volume}.qcow2"
    said = run(["qemu-io", "-f", "qcow2", "-c", f"{'write' if write else 'read'} -P {byte:#x} {at} 64k", str(path)]).decode()
    assert "Pattern verification failed" not in said, said


def tiny(cloud: RealCloud, *names: str) -> Any:
    """A client of the cloud, in which these instances run."""
    client = cloud.client()
    client.create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId="tiny",
                            bundleId="nano_3_0")
    for name in names:
        eventually(lambda name=name: state(client, name) == "running", 60)
    return client


def volume_of(client: Any, name: str) -> str:
    return str(disk(client, name)["supportCode"].rpartition("/")[2])


def test_disks_and_snapshots_of_a_guest_without_an_agent(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "one")
    pid = pid_of(tiny_cloud, "one")
    create(client, "data")
    data = volume_of(client, "data")
    pattern(tiny_cloud, data, 0x5A, write=True)
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    assert (tiny_cloud.config.volumes_dir / f"{data}.qcow2").stat().st_uid > tiny_cloud.config.guest_uid_base

    made = snapshot(client, "one", "snap")
    told = manifest(tiny_cloud, made["arn"])
    assert told["consistency"] == "crash" and [copy["volume"] for copy in told["copies"]] == [guest_of(tiny_cloud, "one"), data]
    folder = tiny_cloud.config.snapshots_dir / told["id"]
    for copy in told["copies"]:
        path = folder / copy["file"]
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o444)
        assert run(["sha256sum", str(path)]).split()[0].decode() == copy["sha256"]
    assert pid_of(tiny_cloud, "one") == pid

    ended(client, client.create_instances_from_snapshot(
        instanceNames=["two", "three"], bundleId="micro_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"))
    for name in ("two", "three"):
        stopped(client, name)
        pattern(tiny_cloud, volume_of(client, f"{name}-data"), 0x5A)
    # One of a guest that is off, which stands on the first.
    again = manifest(tiny_cloud, snapshot(client, "two", "again")["arn"])
    assert again["consistency"] == "off" and again["parents"] == [told["id"]]
    client.delete_instance_snapshot(instanceSnapshotName="snap")
    ended(client, client.start_instance(instanceName="two"))
    for name in ("two", "three"):
        ended(client, client.delete_instance(instanceName=name))
        client.delete_disk(diskName=f"{name}-data")
    assert folder.exists()
    client.delete_instance_snapshot(instanceSnapshotName="again")
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), what="the files go with the last that needs them")

    stopped(client, "one")
    ended(client, client.detach_disk(diskName="data"))
    assert (tiny_cloud.config.volumes_dir / f"{data}.qcow2").stat().st_uid == 0
    pattern(tiny_cloud, data, 0x5A)
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    ended(client, client.create_disk_from_snapshot(diskName="other", diskSnapshotName="copy", sizeInGb=9,
                                                   availabilityZone="us-east-1a"))
    pattern(tiny_cloud, volume_of(client, "other"), 0x5A)
    for name in ("data", "other"):
        client.delete_disk(diskName=name)
    client.delete_disk_snapshot(diskSnapshotName="copy")
    ended(client, client.delete_instance(instanceName="one"))
    whole(tiny_cloud)


def test_chains_of_copies_do_not_grow(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "g0")
    create(client, "d0")
    pattern(tiny_cloud, volume_of(client, "d0"), 0x77, write=True)
    depths = []
    for number in range(9):
        ended(client, client.create_disk_snapshot(diskName=f"d{number}", diskSnapshotName=f"s{number}"))
        found = client.get_disk_snapshot(diskSnapshotName=f"s{number}")["diskSnapshot"]
        depths.append(len(manifest(tiny_cloud, found["arn"])["copies"][0]["parents"]))
        ended(client, client.create_disk_from_snapshot(diskName=f"d{number + 1}", diskSnapshotName=f"s{number}", sizeInGb=8,
                                                       availabilityZone="us-east-1a"))
        client.delete_disk(diskName=f"d{number}")
        client.delete_disk_snapshot(diskSnapshotName=f"s{number}")
        if number % 2:
            # In a guest that runs: then QEMU copies.
            ended(client, client.attach_disk(diskName=f"d{number + 1}", instanceName="g0", diskPath="/dev/xvdf"))
        else:
            stopped(client, "g0")
            ended(client, client.start_instance(instanceName="g0"))
        break_off = number == 8
        if number % 2 == 0 and number:
            continue
        if break_off:
            break
    assert max(depths) <= 6, depths
