"""A host with a real guest fails, is turned off, and comes back: hosts that are namespaces of this machine, QEMU on each, and
a guest that counts (see test_migrating_fleet.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

import stores
from ceph_clusters import CephCluster
from clouds import eventually
from fleets import Station, printed, told
from skysail.hypervisor import confinement
from skysail.store.schema import disks, guests
from test_ceph import Store
from test_ceph_guests import settings
from test_migrating_ceph import within_reach
from test_migrating_fleet import Counting, counted

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(1800)]
# Ends the agent of a machine and all of its guests, which is what is left of one without power; once it may.
SWITCH = """#!{python}
import json, os, pathlib, signal, sys
folder = pathlib.Path({folder!r})
if not (folder / "may").exists():
    sys.exit("the power strip is locked")
told = json.loads((folder / "machines.json").read_text())[sys.argv[1]]
records = [json.loads(path.read_text()) for path in pathlib.Path(told["folder"]).glob("guests/*/guest.json")]
for pid in [told["agent"], *(one["process"]["pid"] for one in records if one["process"])]:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
# What a program is started by so that the machine seems to have booted since.
BOOTED = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"')


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    path = tmp_path / "switch"
    path.write_text(SWITCH.format(python=sys.executable, folder=str(tmp_path)))
    path.chmod(0o755)
    return path


def told_to(switch: Path, counting: Counting) -> None:
    """Let the switch know the machines as they are now."""
    (switch.parent / "machines.json").write_text(json.dumps({
        name: {"folder": str(one.folder), "agent": one.processes["agent"].pid} for name, one in counting.stations.items()}))


def boots(switch: Path, station: Station) -> None:
    """The machine of a host boots, with all that is on its disk."""
    boot = switch.parent / "boot"
    boot.write_text("00000000-0000-4000-8000-000000000001\n")
    entering = station.entering
    station.entering = (*entering, *BOOTED, str(boot))
    station.start("agent")
    station.entering = entering


def test_a_guest_goes_on_elsewhere_once_its_host_is_off_and_never_twice(switch: Path) -> None:
    with counted(settings=f'fence = ["{switch}"]\nfence_after_seconds = 5\non_host_failure = "snapshot"\n') as counting:
        cloud, client = counting.cloud, counting.cloud.client()
        told_to(switch, counting)
        first, _ = counting.place()
        operation = client.create_instance_snapshot(instanceName="one", instanceSnapshotName="early")["operations"][0]
        eventually(lambda: client.get_operation(operationId=operation["id"])["operation"]["status"] == "Succeeded", 120)
        assert counting.over(counting.begin())["state"] == "succeeded"
        counting.rests()
        second, lost = counting.place()
        station = counting.stations[second]

        with station.cut_off():
            eventually(lambda: told(cloud, "host", "show", second)["outage"], 180, "it has failed")
            eventually(lambda: "locked" in told(cloud, "host", "show", second)["outage"]["error"], 60)
            before = len(counting.counts(second, lost))
            eventually(lambda: len(counting.counts(second, lost)) > before + 3, 60, "it runs on behind its cable")
            assert counting.place() == (second, lost) and counting.state() == "running"

            (switch.parent / "may").touch()
            eventually(lambda: counting.place()[0] == first, 120, "it begins again where its snapshot is")
            eventually(lambda: counting.state() == "running", 180)
            ended = len(counting.counts(second, lost))
            station.processes["agent"].wait()
            again = counting.place()[1]
            eventually(lambda: len(counting.counts(first, again)) > 5, 60)

        # The machine boots, with its ledger of before, which says that it runs the guest.
        held = json.loads((station.folder / "agent" / "document.json").read_text())
        assert [one["role"] for one in held["guests"] if one["id"] == lost] == ["run"]
        boots(switch, station)
        eventually(lambda: told(cloud, "host", "show", second)["state"] == "ready", 120)
        eventually(lambda: [one["disks"] for one in told(cloud, "host", "remains", second)] == [[lost]], 60)
        before = len(counting.counts(first, again))
        eventually(lambda: len(counting.counts(first, again)) > before + 5, 60)
        assert confinement.holders(f"{station.folder}/guests/") == {}, "it does not run there"
        assert len(counting.counts(second, lost)) == ended, "and did not for a moment"
        verified = printed(cloud, "verify")
        assert verified.returncode == 0, verified.stdout

        # What it wrote is there until it is thrown away.
        volume = station.folder / "volumes" / f"{lost}.qcow2"
        assert volume.exists() and (station.folder / "guests" / lost / "guest.json").exists()
        assert printed(cloud, "host", "remains", second, "--discard", "one").returncode == 0
        eventually(lambda: told(cloud, "host", "remains") == [], 60)
        assert not volume.exists() and not (station.folder / "guests" / lost).exists()
        with stores.transaction(cloud.config) as connection:
            assert connection.execute(select(guests.c.id)).scalars().all() == [again]
        verified = printed(cloud, "verify")
        assert verified.returncode == 0, verified.stdout
        counting.counts_once()


def test_a_guest_in_a_pool_goes_on_elsewhere_with_its_disks(switch: Path, ceph: CephCluster, tmp_path: Path) -> None:
    cluster = ceph.namespace()
    store = Store(cluster, tmp_path)
    with counted(settings=f'fence = ["{switch}"]\nfence_after_seconds = 5\non_host_failure = "restart"\n'
                 "disk_overcommit = 1000\n", more=settings(cluster),
                 around=lambda underlay: within_reach(ceph, tmp_path, underlay)) as counting:
        cloud, client = counting.cloud, counting.cloud.client()
        told_to(switch, counting)
        client.create_disk(diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
        eventually(lambda: client.get_disk(diskName="data")["disk"]["state"] == "available", 120)
        with stores.transaction(cloud.config) as connection:
            data = connection.execute(select(disks.c.id)).scalar_one()
        store.pattern(store.cluster.file(data), 0x5A, write=True)
        client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf")
        eventually(lambda: client.get_disk(diskName="data")["disk"]["attachmentState"] == "attached", 120)
        failing, guest = counting.place()
        station, other = counting.stations[failing], counting.beyond(failing)
        keys = client.get_instance_access_details(instanceName="one")["accessDetails"]["hostKeys"]

        with station.cut_off():
            eventually(lambda: "locked" in (told(cloud, "host", "show", failing)["outage"] or {}).get("error", ""), 240)
            assert counting.place() == (failing, guest)
            (switch.parent / "may").touch()
            eventually(lambda: counting.place() == (other.host, guest), 120, "it goes on where its disks are seen, too")
            eventually(lambda: counting.state() == "running", 180)
        assert client.get_instance_access_details(instanceName="one")["accessDetails"]["hostKeys"] == keys
        assert counting.counts(other.host, guest), "it counts"

        boots(switch, station)
        eventually(lambda: told(cloud, "host", "show", failing)["state"] == "ready", 120)
        eventually(lambda: told(cloud, "host", "remains") == [], 60, "the host has let go of it")
        assert not (station.folder / "guests" / guest).exists()
        counting.counts_once()
        verified = printed(cloud, "verify")
        assert verified.returncode == 0, verified.stdout
        client.stop_instance(instanceName="one", force=True)
        eventually(lambda: counting.state() == "stopped", 120)
        store.pattern(store.cluster.file(data), 0x5A)
