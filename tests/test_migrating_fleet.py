"""Whole migrations between real agents: hosts that are namespaces of this machine, QEMU on each, and a guest that counts.

The guest is a boot sector (ticker.py), so that what of its memory or its disk is lost on the way, or runs twice, shows in
what it says on its serial line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import stores
import ticker
from clouds import Cloud, eventually
from fleets import Station, printed, stations, told
from skysail.images.library import Library, Manifest, file_digest
from skysail.store.schema import guests, hosts, moves

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
SLOW = ("--mib-per-second", "0.5")


class Counting:
    """A cloud of two hosts, and an instance ``one`` that counts on one of them."""

    def __init__(self, cloud: Cloud, pair: list[Station]) -> None:
        self.cloud = cloud
        self.stations = {one.host: one for one in pair}

    def launch(self) -> None:
        client = self.cloud.client()
        eventually(lambda: self.ready() == 2 and client.get_blueprints()["blueprints"], 120, "both hosts report")
        client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="ticker",
                                bundleId="nano_3_0")
        eventually(lambda: self.state() == "running", 180, "it runs")
        eventually(lambda: len(self.counts(*self.place())) > 5, 180, "it counts")

    def ready(self) -> int:
        with stores.transaction(self.cloud.config) as connection:
            return sum(bool(row.facts and row.memory_mib) for row in connection.execute(select(hosts)))

    def state(self) -> str:
        return str(self.cloud.client().get_instance_state(instanceName="one")["state"]["name"])

    def beyond(self, host: str) -> Station:
        """The other one."""
        return next(one for name, one in self.stations.items() if name != host)

    def place(self) -> tuple[str, str]:
        """The host and the id of the guest, by the rows."""
        with stores.transaction(self.cloud.config) as connection:
            found = connection.execute(select(guests.c.host_id, guests.c.id).where(guests.c.instance_name == "one")).one()
            return found.host_id, found.id

    def folder(self, host: str) -> Path:
        return self.stations[host].folder

    def serial(self, host: str, guest: str) -> Path:
        return self.folder(host) / "guests" / guest / "run" / "serial.log"

    def counts(self, host: str, guest: str) -> list[int]:
        return ticker.counts(self.serial(host, guest))

    def begin(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "skysail.cli.main", "migrate", "one", "--json", *more], text=True,
                                stdout=subprocess.PIPE, env={**os.environ, "SKYSAIL_DATA": str(self.cloud.folder)})

    def over(self, begun: subprocess.Popen[str]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(begun.communicate(timeout=600)[0])
        return answer

    def flows(self) -> None:
        """Some of it has gone over."""
        def seen() -> bool:
            with stores.transaction(self.cloud.config) as connection:
                row = connection.execute(select(moves.c.phase, moves.c.progress)).first()
                return row is not None and row.phase == "going" and bool(row.progress) and row.progress["disk_bytes"] > 0
        eventually(seen, 180, "it goes")

    def rests(self) -> None:
        """Nothing of the attempt is left."""
        def settled() -> bool:
            with stores.transaction(self.cloud.config) as connection:
                return connection.execute(select(moves.c.id)).first() is None
        eventually(settled, 180, "nothing of it is left")

    def counts_once(self) -> None:
        """It counts at one place alone, has lost nothing, and its processes are one."""
        host, guest = self.place()
        before = len(self.counts(host, guest))
        eventually(lambda: len(self.counts(host, guest)) > before + 5, 120, f"it counts on on {host}")
        assert ticker.complaints(self.serial(host, guest)) == []
        counted = self.counts(host, guest)
        assert counted == sorted(counted), "it was not started again"
        waiting = [path for one in self.stations.values() for path in one.folder.glob("guests/*/run/qmp.sock")]
        assert len(waiting) == 1, waiting


@pytest.fixture
def counting(request: pytest.FixtureRequest) -> Iterator[Counting]:
    """The guest's disk has as many MiB of ballast as the test's parameter says."""
    with counted(getattr(request, "param", 0)) as made:
        yield made


@contextlib.contextmanager
def counted(ballast_mib: int = 0, settings: str = "", busy: bool = False, **more: Any) -> Iterator[Counting]:
    """Such a cloud, whose controller has these settings, too; ``busy`` as for :func:`ticker.image`, ``more`` as for
    :func:`fleets.stations`."""
    if os.geteuid() != 0:
        pytest.skip("real guests need root")
    folder, stock = Path(tempfile.mkdtemp(prefix="sky")), Path(tempfile.mkdtemp(prefix="sky"))
    stock.chmod(0o755)
    path = ticker.image(stock / "ticker.qcow2", ballast_mib=ballast_mib, busy=busy)
    Library(stock).add(path, Manifest(
        digest=file_digest(path), blueprint="ticker", name="Ticker", group="ticker", version="1", user="admin",
        size_bytes=ticker.SIZE_BYTES, built=time.time()))
    cloud = Cloud(folder, f'engines = "sim"\nlocal_host = false\n{settings}')
    try:
        cloud.start("controller")
        with stations(cloud, 2, stock, **more) as pair:
            made = Counting(cloud, pair)
            made.launch()
            yield made
    finally:
        cloud.stop()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(stock, ignore_errors=True)


def test_an_instance_goes_over_with_all_that_it_is(counting: Counting) -> None:
    source, former = counting.place()
    last = counting.counts(source, former)[-1]
    done = counting.over(counting.begin())
    assert done["state"] == "succeeded" and done["source"] == source, done
    report = done["report"]
    print(json.dumps(report))
    assert report["pause_ms"] > 0 and report["memory_bytes"] > 0 and report["disk_bytes"] > 0 and report["rounds"] > 0
    target, guest = counting.place()
    assert target == done["target"] != source and guest != former
    assert counting.counts(target, guest)[0] >= last, "it went on, and did not begin again"
    counting.rests()
    counting.counts_once()
    assert not (counting.folder(source) / "guests" / former).exists()
    assert list((counting.folder(source) / "volumes").glob(f"{former}*")) == []
    verified = printed(counting.cloud, "verify")
    assert verified.returncode == 0, verified.stdout
    # It is a guest like any other: it is stopped and started where it is, and goes back.
    client = counting.cloud.client()
    client.stop_instance(instanceName="one", force=True)
    eventually(lambda: counting.state() == "stopped", 120)
    client.start_instance(instanceName="one")
    eventually(lambda: counting.state() == "running", 120)
    back = told(counting.cloud, "migrate", "one", "--to", source)
    assert back["state"] == "succeeded" and counting.place()[0] == source
    counting.rests()


@pytest.mark.parametrize("counting", [4], indirect=True)
def test_whatever_dies_one_of_the_two_has_it(counting: Counting) -> None:
    """On its way, each time: the source's agent, the target's, the target's process, the controller, the network for five
    seconds; and the target's disk is full."""
    cloud = counting.cloud

    def begun() -> tuple[str, Station, subprocess.Popen[str]]:
        source, _ = counting.place()
        going = counting.begin(*SLOW)
        counting.flows()
        return source, counting.beyond(source), going

    def ends(going: subprocess.Popen[str], source: str, *states: str) -> dict[str, Any]:
        done = counting.over(going)
        assert done["state"] in states, done["error"]
        assert done["state"] == "succeeded" or done["error"], done
        assert (counting.place()[0] == source) == (done["state"] == "failed")
        counting.rests()
        counting.counts_once()
        print(json.dumps(done))
        return done

    source, target, going = begun()
    counting.stations[source].kill("agent")
    counting.stations[source].start("agent")
    ends(going, source, "succeeded")

    source, target, going = begun()
    target.kill("agent")
    target.start("agent")
    ends(going, source, "succeeded")

    source, target, going = begun()
    with stores.transaction(cloud.config) as connection:
        coming = connection.execute(select(moves.c.id)).scalar_one()
    record = json.loads((target.folder / "guests" / coming / "guest.json").read_bytes())
    os.kill(record["process"]["pid"], signal.SIGKILL)
    ends(going, source, "failed")

    source, target, going = begun()
    cloud.kill("controller")
    cloud.start("controller")
    ends(going, source, "succeeded")

    source, target, going = begun()
    with target.cut_off():
        time.sleep(5)
    ends(going, source, "succeeded")

    source, _ = counting.place()
    volumes = counting.beyond(source).folder / "volumes"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", str(volumes)], check=True)
    try:
        done = ends(counting.begin(), source, "failed")
        assert "No space left" in done["error"], done
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", str(volumes)], check=True)
    verified = printed(cloud, "verify")
    assert verified.returncode == 0, verified.stdout
