"""Two hosts of one Ceph pool, each with a network of its own: what is done by the operator's commands, with real agents and
real guests. What may fail on the way is tried by test_migration_ceph.py and test_migrating.py.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

import stores
from ceph_clusters import CephCluster
from clouds import eventually
from fleets import printed, told
from skysail.network.underlay import Underlay
from skysail.store.schema import disks, guests, snapshots
from test_ceph_guests import settings
from test_migrating_fleet import Counting, counted

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(3600)]
# A port that leads to another one: within a network, or by way of a socket in a folder from one network to another.
_LEAD = """
import socket, sys
from skysail.hypervisor import ferry
place, target = sys.argv[1:]
if place.startswith("/"):
    made = socket.socket(socket.AF_UNIX)
    made.bind(place)
else:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", int(place)))
made.listen(64)
sys.argv[1:] = ["test", str(made.fileno()), target]
ferry.main()
"""


@contextlib.contextmanager
def within_reach(ceph: CephCluster, folder: Path, underlay: Underlay) -> Iterator[None]:
    """The cluster is at the loopback address of each of two hosts, as it is at this machine's."""
    dump = json.loads(ceph.admin("osd", "dump", "--format", "json"))
    mgr = json.loads(ceph.admin("mgr", "dump", "--format", "json"))
    mon = json.loads(ceph.admin("mon", "dump", "--format", "json"))
    places = [*(one["public_addrs"] for one in dump["osds"]), mgr["active_addrs"],
              *(one["public_addrs"] for one in mon["mons"])]
    ports = sorted({int(one["addr"].rpartition(":")[2]) for place in places for one in place["addrvec"]})
    leads = list[subprocess.Popen[bytes]]()
    try:
        for port in ports:
            middle = folder / str(port)
            leads.append(subprocess.Popen([sys.executable, "-c", _LEAD, str(middle), f"127.0.0.1:{port}"]))
            leads += [subprocess.Popen([*underlay.entering(number), sys.executable, "-c", _LEAD, str(port), str(middle)])
                      for number in (1, 2)]
        eventually(lambda: all((folder / str(port)).exists() for port in ports), 60, "the ways to the cluster are there")
        yield
    finally:
        for one in leads:
            one.terminate()
            one.wait()


@pytest.fixture
def counting(ceph: CephCluster, tmp_path: Path) -> Iterator[Counting]:
    # The pool has less room than guests are promised.
    with counted(settings="disk_overcommit = 100\n", more=settings(ceph.namespace()),
                 around=lambda underlay: within_reach(ceph, tmp_path, underlay)) as made:
        yield made


def test_a_host_is_emptied_whose_disks_are_in_a_pool(counting: Counting) -> None:
    cloud = counting.cloud
    client = cloud.client()

    def places() -> set[str]:
        with stores.transaction(cloud.config) as connection:
            return {host for table in (guests, disks, snapshots)
                    for host in connection.execute(select(table.c.host_id)).scalars()}

    def state(name: str) -> str:
        return str(client.get_instance_state(instanceName=name)["state"]["name"])

    client.create_instances(instanceNames=["two"], availabilityZone="us-east-1a", blueprintId="ticker", bundleId="nano_3_0")
    eventually(lambda: state("two") == "running", 300)
    client.stop_instance(instanceName="two", force=True)
    for name in ("data", "spare"):
        client.create_disk(diskName=name, availabilityZone="us-east-1a", sizeInGb=8)
        eventually(lambda name=name: client.get_disk(diskName=name)["disk"]["state"] == "available", 120)
    client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf")
    eventually(lambda: client.get_disk(diskName="data")["disk"]["attachmentState"] == "attached", 120,
               "it is attached wherever its row was")
    client.create_disk_snapshot(diskName="spare", diskSnapshotName="kept")
    eventually(lambda: client.get_disk_snapshot(diskSnapshotName="kept")["diskSnapshot"]["state"] == "completed", 120)
    eventually(lambda: state("two") == "stopped", 300)

    source, _ = counting.place()
    seen = told(cloud, "explain", "placement", "one")
    assert [one["refusals"] for one in seen] == [[], []], seen
    done = told(cloud, "migrate", "one")
    assert done["state"] == "succeeded" and done["report"]["disk_bytes"] == 0 < done["report"]["memory_bytes"], done
    print(json.dumps(done["report"]))
    counting.rests()
    counting.counts_once()
    assert counting.place()[0] != source
    verified = printed(cloud, "verify")
    assert verified.returncode == 0, verified.stdout

    for _ in range(2):
        leaving = counting.place()[0]
        emptied = printed(cloud, "host", "drain", leaving, "--json")
        assert emptied.returncode == 0, emptied.stdout + emptied.stderr
        print(emptied.stdout)
        assert places() == {counting.beyond(leaving).host}
        counting.rests()
        counting.counts_once()
        assert printed(cloud, "host", "uncordon", leaving).returncode == 0
    client.start_instance(instanceName="two")
    eventually(lambda: state("two") == "running", 300, "it starts where it is")
    eventually(lambda: client.get_disk(diskName="spare")["disk"]["state"] == "available", 60)
    verified = printed(cloud, "verify")
    assert verified.returncode == 0, verified.stdout
    for name in ("one", "two"):
        client.delete_instance(instanceName=name)
    client.delete_disk_snapshot(diskSnapshotName="kept")
    for name in ("data", "spare"):
        eventually(lambda name=name: client.get_disk(diskName=name)["disk"]["attachmentState"] == "detached", 300)
        client.delete_disk(diskName=name)
    eventually(lambda: places() == set(), 300, "everything goes where it was last")
