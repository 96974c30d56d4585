"""Snapshots and block storage with real QEMU processes: what lies on the disk, what a crash leaves, what the guest sees."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from clouds import RealCloud, eventually
from crashing import Doom, guest_of, pid_of, rows, running_tiny_cloud, settled_serial, whole
from skysail.hypervisor import disks
from skysail.hypervisor.qmp import Monitor
from skysail.kit.process import run
from test_disks import create, disk, ended, snapshot, stopped
from test_instances import state

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
    (said,) = client.get_operations_for_resource(resourceName="snap")["operations"]
    assert said["operationDetails"].startswith("crash-consistent")
    told = manifest(tiny_cloud, made["arn"])
    assert told["consistency"] == "crash"
    assert [copy["volume"] for copy in told["copies"]] == [guest_of(tiny_cloud, "one"), data]
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
    ended(client, client.start_instance(instanceName="two"))
    for name in ("two", "three"):
        ended(client, client.delete_instance(instanceName=name))
        client.delete_disk(diskName=f"{name}-data")
    for name in ("snap", "again"):
        client.delete_instance_snapshot(instanceSnapshotName=name)
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


def test_all_disks_of_a_guest_share_its_plans_operations(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "one")
    create(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    tiny_cloud.kill("agent")  # QEMU talks to one

    async def asked() -> list[dict[str, Any]]:
        monitor = await Monitor.connect(tiny_cloud.config.guests_dir / guest_of(tiny_cloud, "one") / "run" / "qmp.sock")
        found: list[dict[str, Any]] = await monitor.execute("query-block")
        await monitor.close()
        return found

    held = {one["qdev"]: one["inserted"] for one in asyncio.run(asked()) if not one["inserted"]["ro"]}
    assert {name: (one["iops"], one["group"]) for name, one in held.items()} == {
        disks.SYSTEM: (2100, "guest"), "xvdf": (2100, "guest")}
    tiny_cloud.start("agent")
    ended(client, client.delete_instance(instanceName="one"))
    client.delete_disk(diskName="data")
    whole(tiny_cloud)


def test_a_disk_that_cannot_be_plugged_in_is_free_again(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "one")
    pid = pid_of(tiny_cloud, "one")
    create(client, "data")
    path = tiny_cloud.config.volumes_dir / f"{volume_of(client, 'data')}.qcow2"
    # QEMU locks what it has open, and this process has it.
    with subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as other:
        eventually(lambda: f"/{path.name}" in run(["ls", "-l", f"/proc/{other.pid}/fd"]).decode(), what="it has it open")
        failed = ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"), "Failed")
        assert {one["errorCode"] for one in failed} == {"DiskAttachmentFailed"}
        assert all("lock" in one["errorDetails"] for one in failed), failed
        assert (disk(client, "data")["state"], disk(client, "data")["isAttached"]) == ("available", False)
        assert path.stat().st_uid == 0
        whole(tiny_cloud)
        assert other.stdin is not None
        other.stdin.close()
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    assert pid_of(tiny_cloud, "one") == pid
    ended(client, client.delete_instance(instanceName="one"))
    client.delete_disk(diskName="data")
    whole(tiny_cloud)


class Family:
    """An instance that was made of a snapshot, running, with a disk that was, another disk that is attached to none, and a
    snapshot of them that stands on the first. Each shows a pattern that the first disk had."""

    def __init__(self, cloud: RealCloud) -> None:
        self.cloud = cloud
        self.client = tiny(cloud, "root")
        create(self.client, "seed")
        pattern(cloud, volume_of(self.client, "seed"), 0x6B, write=True)
        ended(self.client, self.client.attach_disk(diskName="seed", instanceName="root", diskPath="/dev/xvdf"))
        self.pid: int | None = None

    def grow(self, off: bool = False) -> None:
        client = self.client
        snapshot(client, "root", "snap")
        ended(client, client.create_disk_snapshot(diskName="seed", diskSnapshotName="disk-snap"))
        ended(client, client.create_instances_from_snapshot(
            instanceNames=["child"], bundleId="nano_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"))
        eventually(lambda: state(client, "child") == "running", 60)
        ended(client, client.create_disk_from_snapshot(diskName="loose", diskSnapshotName="disk-snap", sizeInGb=9,
                                                       availabilityZone="us-east-1a"))
        assert manifest(self.cloud, snapshot(client, "child", "stands")["arn"])["parents"]
        self.pid = None if off else pid_of(self.cloud, "child")
        if off:
            stopped(client, "child")

    def leave(self) -> None:
        """The snapshots that all stand on are deleted; returns when nothing is left of them, or the agent is dead."""
        self.client.delete_instance_snapshot(instanceSnapshotName="snap")
        self.client.delete_disk_snapshot(diskSnapshotName="disk-snap")
        eventually(lambda: self.cloud.processes["agent"].poll() is not None or self.alone(), 120,
                   "the files of deleted snapshots go")

    def alone(self) -> bool:
        return len(rows(self.cloud, "SELECT id FROM snapshots")) == 1

    def end(self) -> None:
        """All of it reads as it did, and goes."""
        client = self.client
        if self.pid is not None:
            assert pid_of(self.cloud, "child") == self.pid
            stopped(client, "child")
        (held,) = self.cloud.config.snapshots_dir.iterdir()
        told = json.loads((held / "manifest.json").read_text())
        assert told["parents"] == []
        for copy in told["copies"]:
            assert run(["sha256sum", str(held / copy["file"])]).split()[0].decode() == copy["sha256"]
        assert run(["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x6b 1M 64k", str(held / told["copies"][1]["file"])])
        for name in ("child-seed", "loose"):
            pattern(self.cloud, volume_of(client, name), 0x6B)
        ended(client, client.start_instance(instanceName="child"))
        assert settled_serial(self.cloud, "child").endswith("B")
        ended(client, client.delete_instance(instanceName="child"))
        for name in ("child-seed", "loose"):
            eventually(lambda name=name: disk(client, name)["state"] == "available")
            client.delete_disk(diskName=name)
        client.delete_instance_snapshot(instanceSnapshotName="stands")
        eventually(lambda: not list(self.cloud.config.snapshots_dir.iterdir()), what="all files go")


def test_deleted_snapshots_go_from_under_what_stands_on_them(tiny_cloud: RealCloud) -> None:
    family = Family(tiny_cloud)
    for off in (False, True):
        family.grow(off)
        family.leave()
        whole(tiny_cloud)
        said = tiny_cloud.operator("verify")
        assert said.returncode == 0, said.stdout + said.stderr
        family.end()
    ended(family.client, family.client.delete_instance(instanceName="root"))
    family.client.delete_disk(diskName="seed")
    whole(tiny_cloud)


# Before each of these an agent that moves things off a snapshot dies once; ``#2`` is the second time that it comes there.
MOVES = ("Monitor.execute block-stream", "Monitor.execute human-monitor-command",
         "QemuGuest.save parents", "Monitor.execute blockdev-del", "process:run_while_wanted setpriv",
         "process:run_while_wanted setpriv #2", "process:run_while_wanted setpriv #3", "durable:replace", "os:unlink",
         "shutil:rmtree")


@pytest.mark.long
def test_an_agent_that_dies_while_it_moves_things_leaves_them_whole(tiny_cloud: RealCloud) -> None:
    family, doom = Family(tiny_cloud), Doom(tiny_cloud, "agent")
    family.grow()
    doom.disarm()
    family.leave()
    steps = (tiny_cloud.folder / "steps").read_text().splitlines()
    family.end()
    print(steps)
    died = []
    for move in MOVES:
        if move not in steps:
            continue
        family.grow()
        # Whatever else it does, it may do as often as it takes.
        doom.arm([f"{name} #{turn}" if turn > 1 else name for name in {step.partition(" #")[0] for step in steps}
                  for turn in range(1, 100) if (f"{name} #{turn}" if turn > 1 else name) != move])
        family.leave()
        assert doom.dead(), f"it did not come to {move}"
        died.append(move)
        doom.start()
        eventually(family.alone, 120, f"the work is done after a death before {move}")
        whole(tiny_cloud)
        family.end()
    assert len(died) > 6, died
    ended(family.client, family.client.delete_instance(instanceName="root"))
    family.client.delete_disk(diskName="seed")
    whole(tiny_cloud)
    assert not doom.missed()


@pytest.mark.long
def test_chains_of_copies_do_not_grow(tiny_cloud: RealCloud) -> None:
    client = tiny(tiny_cloud, "one")
    create(client, "d0")
    pattern(tiny_cloud, volume_of(client, "d0"), 0x77, write=True)
    depths = []
    for number in range(9):
        before, after, copy = f"d{number}", f"d{number + 1}", f"s{number}"
        attached = number > 6  # in a guest that runs, QEMU copies
        if attached:
            ended(client, client.attach_disk(diskName=before, instanceName="one", diskPath=f"/dev/xvd{'fgh'[number - 6]}"))
        ended(client, client.create_disk_snapshot(diskName=before, diskSnapshotName=copy))
        found = client.get_disk_snapshot(diskSnapshotName=copy)["diskSnapshot"]
        depths.append(len(manifest(tiny_cloud, found["arn"])["copies"][0]["parents"]))
        ended(client, client.create_disk_from_snapshot(diskName=after, diskSnapshotName=copy, sizeInGb=8,
                                                       availabilityZone="us-east-1a"))
        if not attached:
            client.delete_disk(diskName=before)
    assert max(depths) == 6 and depths[7] == 0, depths
    pattern(tiny_cloud, volume_of(client, "d9"), 0x77)
    for number in range(9):
        client.delete_disk_snapshot(diskSnapshotName=f"s{number}")
    # What d7 (attached), d8 (attached) and d9 (loose) stood on moves into them.
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), 120, "the files of deleted snapshots go")
    pattern(tiny_cloud, volume_of(client, "d9"), 0x77)
    ended(client, client.delete_instance(instanceName="one"))
    for name in ("d7", "d8"):
        pattern(tiny_cloud, volume_of(client, name), 0x77)
    for name in ("d7", "d8", "d9"):
        client.delete_disk(diskName=name)
    whole(tiny_cloud)


def test_a_running_server_is_restored_as_another_one(real_cloud: RealCloud, capsys: pytest.CaptureFixture[str]) -> None:
    client, cloud = real_cloud.client(), real_cloud
    real_cloud.launch("source")
    create(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="source", diskPath="/dev/xvdf"))
    cloud.ssh("source", "sudo udevadm settle && sudo mkfs.ext4 -q /dev/xvdf && sudo mount /dev/xvdf /mnt && "
              "echo kept | sudo tee /mnt/note && sudo sync")
    sums = cloud.ssh("source", "dd if=/dev/urandom of=random bs=1M count=16 status=none && sha256sum random && "
                     "echo owner-key-of-mine >> .ssh/authorized_keys")
    cloud.ssh("source", "nohup sh -c 'n=0; while :; do n=$((n+1)); echo line $n >> log; sync log; done' >/dev/null 2>&1 &")
    made = snapshot(client, "source", "snap")
    told = manifest(cloud, made["arn"])
    with capsys.disabled():
        print(f"\nfrozen for {told['frozen_ms']:.0f} ms, as the guest saw it")
    assert told["consistency"] == "frozen"
    lines = int(cloud.ssh("source", "wc -l < log"))
    eventually(lambda: int(cloud.ssh("source", "wc -l < log")) > lines, what="the writer goes on")

    answer = client.create_instances_from_snapshot(
        instanceNames=["copy"], bundleId="micro_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap")
    for operation in answer["operations"]:
        cloud.settled(operation["id"], 400)
    assert cloud.ssh("copy", "sha256sum random") == sums
    read = cloud.ssh("copy", "cat log").splitlines()
    assert read and read == [f"line {number + 1}" for number in range(len(read))]
    who = ("hostname; cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub; ls /etc/ssh/ssh_host_*; "
           "tail -1 .ssh/authorized_keys")
    first, second = cloud.ssh("source", who).splitlines(), cloud.ssh("copy", who).splitlines()
    assert (first[0], second[0]) == ("source", "copy") and first[1] != second[1] and first[2] != second[2]
    assert first[3:] == second[3:]
    eventually(lambda: int(cloud.ssh("copy", "df --output=size -BG / | tail -1").strip(" G\n")) > 35, 60, "the disk grows")
    assert int(cloud.ssh("copy", "awk '/MemTotal/ {print $2}' /proc/meminfo")) > 900_000
    assert cloud.ssh("copy", "sudo mount /dev/xvdf /mnt && cat /mnt/note").strip() == "kept"

    # The source's own disk moves to the copy while that runs.
    for operation in client.stop_instance(instanceName="source")["operations"]:
        cloud.settled(operation["id"])
    ended(client, client.detach_disk(diskName="data"))
    ended(client, client.attach_disk(diskName="data", instanceName="copy", diskPath="/dev/xvdg"))
    assert cloud.ssh("copy", "sudo udevadm settle; sudo mkdir /other; sudo mount -o ro /dev/xvdg /other && "
                     "cat /other/note").strip() == "kept"
    cloud.delete("source", "copy")
    client.delete_instance_snapshot(instanceSnapshotName="snap")


def test_a_disk_mounts_by_itself_unless_there_is_something_on_it(real_cloud: RealCloud) -> None:
    client, cloud = real_cloud.client(), real_cloud
    cloud.launch("mounts")
    for name in ("blank", "raw"):
        create(client, name)
    pattern(cloud, volume_of(client, "raw"), 0x3C, "0", write=True)
    for name, path in (("blank", "/dev/xvdf"), ("raw", "/dev/xvdg")):
        for operation in client.attach_disk(diskName=name, instanceName="mounts", diskPath=path,
                                            autoMounting=True)["operations"]:
            cloud.settled(operation["id"], 400)
    assert (disk(client, "blank")["autoMountStatus"], disk(client, "raw")["autoMountStatus"]) == ("Mounted", "Failed")
    cloud.ssh("mounts", "findmnt -t ext4 /mnt/xvdf && echo kept | sudo tee /mnt/xvdf/note && sync")
    for change in (client.stop_instance, client.start_instance):
        cloud.settled(change(instanceName="mounts")["operations"][0]["id"], 400)
    assert cloud.ssh("mounts", "cat /mnt/xvdf/note && grep -c /mnt/ /etc/fstab").split() == ["kept", "1"]
    assert (disk(client, "blank")["autoMountStatus"], disk(client, "raw")["autoMountStatus"]) == ("Mounted", "Failed")
    cloud.delete("mounts")
    pattern(cloud, volume_of(client, "raw"), 0x3C, "0")
    for name in ("blank", "raw"):
        eventually(lambda name=name: disk(client, name)["state"] == "available")
        client.delete_disk(diskName=name)


def test_a_guest_that_is_frozen_when_the_agent_dies_is_thawed(own_real_cloud: RealCloud) -> None:
    cloud, client = own_real_cloud, own_real_cloud.client()
    cloud.launch("one")
    doom = Doom(cloud, "agent")
    doom.disarm()
    snapshot(client, "one", "first")
    steps = (cloud.folder / "steps").read_text().splitlines()
    thaw = "Channel.ask_all guest-fsfreeze-thaw guest-get-time"
    assert thaw in steps
    doom.arm([step for step in steps if step != thaw])
    answer = client.create_instance_snapshot(instanceName="one", instanceSnapshotName="second")
    eventually(doom.dead, 60, "it dies before it thaws")
    doom.start()
    for operation in answer["operations"]:
        cloud.settled(operation["id"])
    assert cloud.ssh("one", "date > written && sync && cat written").strip()
    assert manifest(cloud, client.get_instance_snapshot(instanceSnapshotName="second")["instanceSnapshot"]["arn"])[
        "consistency"] == "frozen"
    cloud.delete("one")
