"""QEMU processes whose disks are in a Ceph cluster: what they are given, what they reach, and what of their disks outlives
whom. The guests have a system of 47 bytes (see crashing.py); ``--long`` runs one of Debian, too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, update

import ceph_clusters
import stores
from ceph_clusters import POOL, CephCluster
from clouds import RealCloud, eventually, running_real_cloud
from crashing import guest_of, pid_of, qemus, running_tiny_cloud, serial
from skysail.contract.document import Origin, Volume
from skysail.hosts import desired
from skysail.hypervisor import disks, qemu
from skysail.hypervisor.qmp import Monitor
from skysail.storage.ceph import Cluster
from skysail.store.schema import guests, hosts, remains
from test_ceph import Store
from test_disks import create, ended, snapshot, stopped
from test_instances import state
from test_snapshots import tiny, volume_of

pytestmark = pytest.mark.real


def settings(cluster: Cluster) -> str:
    """What skysail.toml says of it. Its pool has room for less than guests are promised, and they do not fill it."""
    return (f'storage = "ceph"\nceph_pool = "{cluster.pool}"\nceph_namespace = "{cluster.namespace}"\n'
            f'ceph_user = "{cluster.user}"\nceph_conf = "{cluster.conf}"\nceph_keyring = "{cluster.keyring}"\n'
            'ceph_networks = ["127.0.0.1/32"]\ndisk_overcommit = 100\n')


@pytest.fixture(scope="module")
def cluster(ceph: CephCluster) -> Cluster:
    return ceph.namespace()


@pytest.fixture(scope="module")
def tiny_cloud(cluster: Cluster) -> Iterator[RealCloud]:
    """Real QEMU processes with a system of 47 bytes, which has no guest agent, their disks in the cluster."""
    if os.geteuid() != 0:
        pytest.skip("real guests need root")
    with running_tiny_cloud(more=settings(cluster)) as made:
        yield made


@pytest.fixture
def store(cluster: Cluster, tmp_path: Path) -> Store:
    return Store(cluster, tmp_path)


def cut_off(cloud: RealCloud, name: str) -> None:
    """kill -9 its process, and wait until another one runs."""
    client, guest, pid = cloud.client(), guest_of(cloud, name), pid_of(cloud, name)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: [one for one, owner in qemus(cloud) if owner == guest] not in ([pid], []), 300, "it is started again")
    eventually(lambda: state(client, name) == "running", 300)


def test_the_life_of_a_guest_whose_disks_are_in_a_cluster(tiny_cloud: RealCloud, store: Store) -> None:
    client = tiny(tiny_cloud, "one")
    guest, pid = guest_of(tiny_cloud, "one"), pid_of(tiny_cloud, "one")
    eventually(lambda: "B" in serial(tiny_cloud, "one"), what="it boots from its image")
    assert list(tiny_cloud.config.volumes_dir.iterdir()) == [], "nothing of it is on this host"
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    assert f'"image":"{guest}"' in words and store.cluster.key() not in words
    assert store.cluster.key() not in Path(f"/proc/{pid}/environ").read_bytes().decode()
    assert not (tiny_cloud.config.guests_dir / guest / "run" / "ceph.key").exists()

    create(client, "data")
    data = volume_of(client, "data")
    store.pattern(store.cluster.file(data), 0x5A, write=True)
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    made = snapshot(client, "one", "snap")
    held = asyncio.run(store.shelf.find(made["arn"].rpartition("/")[2]))
    assert held is not None and held.consistency == "crash" and pid_of(tiny_cloud, "one") == pid
    assert [copy.volume for copy in held.copies] == [guest, data]
    store.pattern(store.chain(Origin(snapshot=held.id, volume=data)), 0x5A)

    # It was cut off, and its disk held: the next process of it goes on.
    cut_off(tiny_cloud, "one")
    eventually(lambda: serial(tiny_cloud, "one").count("B") == 2, what="it boots from its disk again")

    ended(client, client.create_instances_from_snapshot(
        instanceNames=["two"], bundleId="micro_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"))
    client.delete_instance_snapshot(instanceSnapshotName="snap")
    stopped(client, "two")
    copied = volume_of(client, "two-data")
    store.pattern(store.cluster.file(copied), 0x5A)
    eventually(lambda: asyncio.run(store.shelf.observe()) == [], what="the snapshot goes, whatever was made of it")
    store.pattern(store.cluster.file(copied), 0x5A)
    ended(client, client.start_instance(instanceName="two"))

    stopped(client, "one")
    ended(client, client.detach_disk(diskName="data"))
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    ended(client, client.create_disk_from_snapshot(diskName="other", diskSnapshotName="copy", sizeInGb=9,
                                                   availabilityZone="us-east-1a"))
    store.pattern(store.cluster.file(volume_of(client, "other")), 0x5A)
    for name in ("one", "two"):
        ended(client, client.delete_instance(instanceName=name))
    client.delete_disk_snapshot(diskSnapshotName="copy")
    for name in ("data", "other", "two-data"):
        client.delete_disk(diskName=name)
    eventually(lambda: [name for name in store.names() if not name.startswith("_")] == [], 180, "its disks go with it")
    eventually(lambda: store.ask("trash", "ls", f"{POOL}/{store.cluster.namespace}") == [], 60, "nothing waits any more")


def test_a_guest_goes_on_from_its_disks_where_nothing_else_of_it_is(tiny_cloud: RealCloud, store: Store) -> None:
    """As on another host, when its own has failed: with the locks of the former process broken. What is told that it has none
    of its disks leaves them."""
    client = tiny(tiny_cloud, "heir")
    guest = guest_of(tiny_cloud, "heir")
    create(client, "legacy")
    volume = volume_of(client, "legacy")
    store.pattern(store.cluster.file(volume), 0x6B, write=True)
    ended(client, client.attach_disk(diskName="legacy", instanceName="heir", diskPath="/dev/xvdf"))
    (lock,) = store.ask("lock", "ls", store.cluster.image(guest).spec)
    keys = client.get_instance_access_details(instanceName="heir")["accessDetails"]["hostKeys"]
    (known,) = stores.rows(tiny_cloud.config, "SELECT ours FROM guests WHERE id = :id", id=guest)
    assert known["ours"] is not None, "its host has said what is inside"

    tiny_cloud.kill("agent")
    os.kill(pid_of(tiny_cloud, "heir"), signal.SIGKILL)
    shutil.rmtree(tiny_cloud.config.guests_dir / guest)
    with stores.transaction(tiny_cloud.config) as connection:
        host = connection.execute(select(guests.c.host_id).where(guests.c.id == guest)).scalar_one()
        connection.execute(update(guests).where(guests.c.id == guest).values(heir=True, observed_state="preparing"))
        desired.bump(connection, host)
    tiny_cloud.start("agent")
    said = tiny_cloud.config.guests_dir / guest / "run" / "serial.log"
    eventually(lambda: said.exists() and "B" in said.read_text(), 120, "it boots from its disk")
    eventually(lambda: state(client, "heir") == "running", 120)
    assert {one["locker"] for one in store.ask("lock", "ls", store.cluster.image(guest).spec)}.isdisjoint({lock["locker"]})
    assert client.get_instance_access_details(instanceName="heir")["accessDetails"]["hostKeys"] == keys
    eventually(lambda: not stores.rows(tiny_cloud.config, "SELECT heir FROM guests WHERE id = :id", id=guest)[0]["heir"], 30,
               "it has come into its own")
    stopped(client, "heir")
    store.pattern(store.cluster.file(volume), 0x6B)

    # The host is told that the guest went on elsewhere: its row is nobody's, and what is left is of no use.
    with stores.transaction(tiny_cloud.config) as connection:
        row = connection.execute(select(guests).where(guests.c.id == guest)).mappings().one()
        kept = ("id", "host_id", "instance_id", "instance_name", "account_id", "vcpus", "memory_mib", "disk_gib", "image",
                "mac", "private_ipv4", "network")
        connection.execute(insert(remains).values(
            **{name: row[name] for name in kept}, how="pool", went_to="elsewhere", left_at=time.time()))
        connection.execute(insert(hosts).values(id="elsewhere", address="unix:/nonexistent"))
        connection.execute(update(guests).where(guests.c.id == guest).values(host_id="elsewhere"))
        desired.bump(connection, host)
    eventually(lambda: stores.rows(tiny_cloud.config, "SELECT id FROM remains") == [], 60, "nothing of it is left here")
    assert not (tiny_cloud.config.guests_dir / guest).exists() and guest in store.names()
    with stores.transaction(tiny_cloud.config) as connection:
        connection.execute(update(guests).where(guests.c.id == guest).values(host_id=host, heir=True))
        connection.execute(delete(hosts).where(hosts.c.id == "elsewhere"))
        desired.bump(connection, host)
    ended(client, client.start_instance(instanceName="heir"))
    ended(client, client.delete_instance(instanceName="heir"))
    client.delete_disk(diskName="legacy")
    eventually(lambda: guest not in store.names(), 120, "its disk goes with it")


def test_a_guests_process_reaches_storage_and_nothing_else(tiny_cloud: RealCloud) -> None:
    """Its own user id, as a process that somebody broke out of has it, in the machine's network."""
    client = tiny(tiny_cloud, "fenced")
    uid = Path(f"/proc/{pid_of(tiny_cloud, 'fenced')}").stat().st_uid
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"

    def connects(user: int, address: str, port: int) -> bool:
        return subprocess.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "/usr/bin/python3", "-c",
                               probe, address, str(port)], capture_output=True, check=False).returncode == 0

    monitors = Path(tiny_cloud.config.ceph_conf).read_text().partition("v2:127.0.0.1:")[2].partition("/")[0]
    assert connects(uid, "127.0.0.1", int(monitors))
    listening = ("127.0.0.2", tiny_cloud.port)
    with subprocess.Popen(["/usr/bin/python3", "-c", "import socket, sys, time; s = socket.create_server((sys.argv[1], 0)); "
                           "print(s.getsockname()[1], flush=True); time.sleep(600)", listening[0]],
                          stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            port = int(other.stdout.readline())
            assert connects(1, listening[0], port) and not connects(uid, listening[0], port)
        finally:
            other.kill()
    ended(client, client.delete_instance(instanceName="fenced"))


def test_one_image_passes_from_one_process_to_another(ceph: CephCluster, tmp_path: Path) -> None:
    """What a migration needs of a shared disk: both have it open, one writes, then the other, which reads what the first
    wrote; the exclusive lock goes over, and nothing is copied."""
    store = Store(ceph.namespace(), tmp_path)
    path = store.ensure(Volume(id="handed", image="", size_gib=1))
    with _idle(store, tmp_path / "first", str(path)) as first, _idle(store, tmp_path / "second", str(path)) as second:
        owners = []
        for number, process in enumerate((first, second)):
            assert "wrote" in said(process, f"write -P {number + 1} {number}M 64k")
            assert "read 65536" in said(process, "read -P 1 0 64k")
            (lock,) = store.ask("lock", "ls", store.cluster.image("handed").spec)
            owners.append(lock["locker"])
        assert owners[0] != owners[1]


def test_a_process_that_lost_its_volume_does_not_write_it_any_more(ceph: CephCluster, tmp_path: Path) -> None:
    """One of a host that is not heard of, and goes on later."""
    store = Store(ceph.namespace(), tmp_path)
    path = store.ensure(Volume(id="lost", image="", size_gib=1))
    with _idle(store, tmp_path / "first", str(path)) as first, _idle(store, tmp_path / "second", str(path)) as second:
        assert "wrote" in said(first, "write -P 1 0 64k")
        os.kill(first.pid, signal.SIGSTOP)
        asyncio.run(store.pool.reclaim("lost"))
        assert "wrote" in said(second, "write -P 2 0 64k")
        os.kill(first.pid, signal.SIGCONT)
        assert "wrote" not in said(first, "write -P 3 0 64k")
        assert "read 65536" in said(second, "read -P 2 0 64k")


class Idle:
    """A QEMU that has an image as its disk and does not begin."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.pid = process.pid


def said(process: Idle, command: str) -> str:
    """What QEMU prints of a command of qemu-io(1) on its disk; '' when a pattern that is read is another one."""
    log = process.folder / "said"
    before = log.stat().st_size

    async def ask() -> None:
        monitor = await Monitor.connect(process.folder / "qmp.sock", 120)
        await monitor.execute("human-monitor-command", {"command-line": f'qemu-io -d {disks.SYSTEM} "{command}"'})
        await monitor.close()
    asyncio.run(ask())

    def printed() -> str:
        return log.read_bytes()[before:].decode(errors="replace")
    eventually(lambda: "\n" in printed(), what="QEMU says how it went")
    return "" if "verification failed" in printed() else printed()


@contextlib.contextmanager
def _idle(store: Store, folder: Path, file: str) -> Iterator[Idle]:
    folder.mkdir()
    (folder / "key").write_text(store.cluster.key())
    machine = qemu.Machine(id=folder.name, accelerator="tcg", vcpus=1, memory_mib=64, folder=str(folder), disk=(file,),
                           generation_id="11111111-2222-3333-4444-555555555555", key_file=str(folder / "key"))
    # Line by line, as on a terminal: it prints into a file.
    with (folder / "said").open("ab") as log, subprocess.Popen(
            ["stdbuf", "-oL", "qemu-system-x86_64", *qemu.argv(machine)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log) as process:
        try:
            yield Idle(folder, process)
        finally:
            process.kill()


@pytest.mark.long
def test_a_server_whose_disk_is_in_a_cluster(tmp_path: Path) -> None:
    """Debian from a template: launched, frozen for a snapshot, killed, and there again with what it wrote. It takes minutes
    of emulation; the tiny guests above show the same without a file system."""
    if reason := ceph_clusters.missing():
        pytest.skip(reason)
    with ceph_clusters.running_cluster("bluestore") as ceph, running_real_cloud(more=settings(ceph.namespace())) as cloud:
        client = cloud.client()
        began = time.monotonic()
        cloud.launch("one")
        print(f"first launch {time.monotonic() - began:.1f} s (template and its way into the pool)")
        began = time.monotonic()
        cloud.launch("two")
        print(f"second launch {time.monotonic() - began:.1f} s")
        cloud.ssh("one", "sudo sh -c 'echo kept > /var/kept; sync'")
        assert "ext4" in cloud.ssh("one", "findmnt -no FSTYPE /") and "20G" in cloud.ssh("one", "lsblk -dno SIZE /dev/vda")
        made = snapshot(client, "one", "snap")
        store = Store(Cluster.of(cloud.config), tmp_path)
        held = asyncio.run(store.shelf.find(made["arn"].rpartition("/")[2]))
        assert held is not None and held.consistency == "frozen"
        print(f"frozen for {held.frozen_ms:.0f} ms")
        cloud.ssh("one", "sudo sh -c 'echo later > /var/later; sync'")
        began = time.monotonic()
        cut_off(cloud, "one")
        print(f"running again {time.monotonic() - began:.1f} s after kill -9")
        assert cloud.ssh("one", "cat /var/kept /var/later").split() == ["kept", "later"]
        ended(client, client.create_instances_from_snapshot(
            instanceNames=["three"], bundleId="nano_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"))
        errors = "sudo dmesg | grep -ci 'ext4.*error' || true"
        assert cloud.ssh("three", f"cat /var/kept; test ! -e /var/later; {errors}").split() == ["kept", "0"]
        cloud.delete("one", "two", "three")
