"""kill -9 at every step boundary: of the controller over a simulated host, of the agent over real guests.

Each scenario lets its victim die before one step, recovers, checks the whole world, lets it die before the next one, and so
on, until it outlives the work: the boundaries are enumerated by the program itself (see doomed.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import Cloud, RealCloud, eventually
from crashing import (
    Doom,
    Life,
    create,
    guest_of,
    open_work,
    pid_of,
    qemus,
    ready,
    rows,
    running_tiny_cloud,
    serial,
    settled_serial,
    state,
    whole,
)
from skysail.hypervisor import confinement
from skysail.hypervisor.process import Pid
from skysail.kit.process import machine_boot, started_at
from skysail.serve.up import end_guests


@pytest.fixture(scope="module")
def tiny_cloud() -> Iterator[RealCloud]:
    """Real QEMU processes with the tiny system."""
    with running_tiny_cloud() as made:
        yield made


# --- the controller

def test_the_controller_dies_at_every_commit(cloud: Cloud) -> None:
    doom, life = Doom(cloud, "controller"), Life(cloud, "debian_12")
    ready(cloud, "debian_12")
    for act, between in ((life.create, lambda: life.done(life.delete)), (life.stop, lambda: life.done(life.start)),
                         (life.start, lambda: life.done(life.stop)), (life.reboot, lambda: None),
                         (life.delete, lambda: life.done(life.create))):
        deaths = doom.everywhere(act.__name__, act, between)
        # At least the request's own commit, the report's and the engine's.
        assert {"before a commit", "after a commit", "before a commit #3", "after a commit #3"} <= set(deaths), deaths
    assert not rows(cloud, "SELECT * FROM guests") and not rows(cloud, "SELECT * FROM instances")


# --- the agent

@pytest.mark.real
def test_the_agent_dies_at_every_step_of_create_and_delete(tiny_cloud: RealCloud) -> None:
    doom, life = Doom(tiny_cloud, "agent"), Life(tiny_cloud, "tiny")
    created = deleted = False
    while not (created and deleted):
        died = doom.during("create", life.create)
        created = died is None
        # One that had not been handed over may have been made again.
        eventually(lambda: serial(tiny_cloud, "one") in ("B", "BB"), what=f"it boots, after {died}")
        deleted = doom.during("delete", life.delete) is None
        assert not qemus(tiny_cloud) and not list(tiny_cloud.config.guests_dir.iterdir())
    assert not doom.missed(), doom.deaths
    assert {"confinement:spawn", "QemuGuest.save made ours", "files:_finish"} <= set(doom.deaths["create"])
    assert {"process:kill", "shutil:rmtree", "FilePool.remove"} <= set(doom.deaths["delete"])


@pytest.mark.real
def test_the_agent_dies_at_every_step_of_stop_start_and_reboot(tiny_cloud: RealCloud) -> None:
    doom, life = Doom(tiny_cloud, "agent"), Life(tiny_cloud, "tiny")
    life.done(life.create)
    eventually(lambda: serial(tiny_cloud, "one") == "B", what="it boots")
    acts = {life.stop: True, life.start: True, life.reboot: True}
    while any(acts.values()):
        for act in (life.stop, life.start, life.reboot):
            if act == life.reboot and not acts[act]:
                continue
            before = serial(tiny_cloud, "one")
            died = doom.during(act.__name__, act)
            acts[act] = died is not None
            eventually(lambda before=before: serial(tiny_cloud, "one") != before, what=f"it says something, after {died}")
            said = settled_serial(tiny_cloud, "one").removeprefix(before)
            # An orderly stop is heard by the guest; a start boots once. A guest that does not say which boot it is in may be
            # reset a second time by a second agent, never more.
            expected = {life.stop: {"S"}, life.start: {"B"}, life.reboot: {"B", "BB"}}[act]
            assert said in expected, (act.__name__, died, said)
    life.done(life.delete)
    assert not doom.missed(), doom.deaths


@pytest.mark.real
def test_the_agent_dies_at_every_step_of_a_snapshot(tiny_cloud: RealCloud) -> None:
    doom, life, client = Doom(tiny_cloud, "agent"), Life(tiny_cloud, "tiny"), tiny_cloud.client()
    life.done(life.create)
    pid = pid_of(tiny_cloud, "one")

    def snapshot() -> None:
        client.create_instance_snapshot(instanceName="one", instanceSnapshotName="snap")

    def forget() -> None:
        client.delete_instance_snapshot(instanceSnapshotName="snap")

    taken = forgotten = False
    while not (taken and forgotten):
        died = doom.during("snapshot", snapshot)
        taken = died is None
        assert client.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]["state"] == "available", died
        forgotten = doom.during("forget", forget) is None
        assert pid_of(tiny_cloud, "one") == pid, "the guest has seen nothing of it"
    assert {"Monitor.execute transaction", "QemuGuest.save copying", "os:rename"} <= set(doom.deaths["snapshot"])
    life.done(life.delete)
    assert not doom.missed(), doom.deaths
    assert not list(tiny_cloud.config.snapshots_dir.iterdir())


@pytest.mark.real
def test_the_agent_dies_at_every_step_of_a_disk(tiny_cloud: RealCloud) -> None:
    doom, life, client = Doom(tiny_cloud, "agent"), Life(tiny_cloud, "tiny"), tiny_cloud.client()
    life.done(life.create)
    client.create_disk(diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
    whole(tiny_cloud)
    client.create_disk_snapshot(diskName="data", diskSnapshotName="copy")
    whole(tiny_cloud)

    def restore() -> None:
        client.create_disk_from_snapshot(diskName="child", diskSnapshotName="copy", availabilityZone="us-east-1a", sizeInGb=9)

    def attach() -> None:
        client.attach_disk(diskName="child", instanceName="one", diskPath="/dev/xvdg")

    def delete() -> None:
        client.delete_disk(diskName="child")

    while doom.during("restore", restore) is not None:
        life.done(delete)
    while doom.during("attach", attach) is not None:
        # Off, detached, on again: each a kind of work of its own.
        life.done(life.stop)
        doom.during("detach", lambda: client.detach_disk(diskName="child"))
        life.done(life.start)
    life.done(life.delete)
    while doom.during("delete", delete) is not None:
        life.done(restore)
    assert not doom.missed(), doom.deaths
    client.delete_disk(diskName="data")
    client.delete_disk_snapshot(diskSnapshotName="copy")
    whole(tiny_cloud)
    assert not list(tiny_cloud.config.snapshots_dir.iterdir())


# --- what a crash or an accident leaves on the disk

@pytest.mark.real
def test_the_agent_dies_at_every_step_of_a_metadata_update(tiny_cloud: RealCloud) -> None:
    doom, life, turn = Doom(tiny_cloud, "agent"), Life(tiny_cloud, "tiny"), iter(range(1000))
    life.done(life.create)
    before = pid_of(tiny_cloud, "one")

    def act() -> None:
        tiny_cloud.client().update_instance_metadata_options(
            instanceName="one", httpPutResponseHopLimit=1 + next(turn) % 64, httpTokens="required")

    deaths = doom.everywhere("update", act, lambda: None)
    assert not doom.missed(), deaths
    assert {"Ledger.write", "Answerer._tell"} <= set(deaths), deaths
    shown = tiny_cloud.client().get_instance(instanceName="one")["instance"]["metadataOptions"]
    assert shown["state"] == "applied" and shown["httpTokens"] == "required"
    assert pid_of(tiny_cloud, "one") == before, "the guest ran on"
    life.done(life.delete)


@pytest.mark.real
def test_a_damaged_record_is_one_guests_trouble_and_costs_no_disk(tiny_cloud: RealCloud) -> None:
    for name in ("hurt", "sound"):
        create(tiny_cloud, name, "tiny")
    whole(tiny_cloud)
    pids = {name: pid_of(tiny_cloud, name) for name in ("hurt", "sound")}
    record = tiny_cloud.config.guests_dir / guest_of(tiny_cloud, "hurt") / "guest.json"
    volume = tiny_cloud.config.volumes_dir / f"{guest_of(tiny_cloud, 'hurt')}.qcow2"
    written, inode = record.read_bytes(), volume.stat().st_ino
    tiny_cloud.kill("agent")
    record.write_bytes(written[:100])
    tiny_cloud.start("agent")
    eventually(lambda: state(tiny_cloud, "hurt") == "pending", 60, "its state says that it is not well")
    (row,) = rows(tiny_cloud, "SELECT * FROM guests WHERE instance_name = 'hurt'")
    assert "guest.json" in row["reason"] or "record" in row["reason"]
    assert state(tiny_cloud, "sound") == "running"
    assert {name: pid_of(tiny_cloud, name) for name in pids} == pids and volume.stat().st_ino == inode
    tiny_cloud.kill("agent")
    record.write_bytes(written)
    tiny_cloud.start("agent")
    whole(tiny_cloud)
    assert {name: pid_of(tiny_cloud, name) for name in pids} == pids and volume.stat().st_ino == inode
    # Deleted while its record is damaged: everything goes all the same.
    tiny_cloud.kill("agent")
    record.write_bytes(b"")
    tiny_cloud.start("agent")
    for name in ("hurt", "sound"):
        tiny_cloud.client().delete_instance(instanceName=name)
    whole(tiny_cloud)


@pytest.mark.real
def test_a_lost_disk_is_not_replaced_by_a_blank_one(tiny_cloud: RealCloud) -> None:
    life = Life(tiny_cloud, "tiny")
    life.done(life.create)
    tiny_cloud.client().stop_instance(instanceName="one", force=True)
    whole(tiny_cloud)
    volume = tiny_cloud.config.volumes_dir / f"{guest_of(tiny_cloud, 'one')}.qcow2"
    aside = tiny_cloud.folder / "aside"
    volume.rename(aside)
    (operation,) = tiny_cloud.client().start_instance(instanceName="one")["operations"]
    eventually(lambda: not open_work(tiny_cloud), 120, "the start ends")
    ended = tiny_cloud.client().get_operation(operationId=operation["id"])["operation"]
    assert ended["status"] == "Failed" and "volume" in ended["errorDetails"], ended
    assert state(tiny_cloud, "one") == "stopped" and not volume.exists()
    aside.rename(volume)
    life.done(life.start, life.delete)


@pytest.mark.real
def test_ending_the_guests_ends_their_cgroups_too(tiny_cloud: RealCloud) -> None:
    life = Life(tiny_cloud, "tiny")
    life.done(life.create)
    tiny_cloud.kill("agent")
    assert end_guests(tiny_cloud.config) == 1
    guest = guest_of(tiny_cloud, "one")
    assert not qemus(tiny_cloud) and not any(folder.exists() for folder in confinement._folders(guest))
    tiny_cloud.start("agent")
    whole(tiny_cloud)
    life.done(life.delete)


@pytest.mark.real
def test_a_sweep_ends_what_works_in_its_own_folder_only() -> None:
    """Two clouds may run guests under the same user ids."""
    if os.geteuid() != 0:
        pytest.skip("other users' processes need root")
    root = Path(tempfile.mkdtemp(prefix="sky"))
    root.chmod(0o755)
    program = shutil.which("qemu-system-x86_64")
    assert program is not None
    pids = []
    for place in ("mine/g-1", "mine/g-11", "theirs/g-1"):
        folder = root / place / "run"
        folder.mkdir(parents=True)
        os.chown(folder, 2_999_999, 2_999_999)
        pids.append(confinement.spawn(
            [program, "-nodefaults", "-display", "none", "-S", "-chardev",
             f"socket,id=qmp,path={folder}/qmp.sock,server=on,wait=off"],
            uid=2_999_999, log=root / "log"))
        eventually(lambda folder=folder: (folder / "qmp.sock").exists(), what="QEMU listens")
    looker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)",
                               f"socket,id=qmp,path={root}/mine/g-1/run/qmp.sock,server=on,wait=off"])
    try:
        confinement.sweep(f"{root}/mine/g-1/")
        assert [started_at(pid) is not None for pid in pids] == [False, True, True]
        assert looker.poll() is None
        confinement.sweep(f"{root}/mine/")
        assert [started_at(pid) is not None for pid in pids] == [False, False, True]
    finally:
        looker.kill()
        looker.wait()
        confinement.sweep(f"{root}/")
        shutil.rmtree(root)


def test_a_pid_from_before_the_machines_reboot_is_nobodys() -> None:
    started = started_at(os.getpid())
    assert started is not None
    assert Pid(pid=os.getpid(), started=started, boot=machine_boot()).alive()
    assert not Pid(pid=os.getpid(), started=started, boot="an earlier one").alive()
    assert not Pid(pid=os.getpid(), started=started - 1, boot=machine_boot()).alive()
