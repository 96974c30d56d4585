"""Hosts that fail, as their operator and their customers have them: real controller, real agents over simulated guests, and a
program that turns machines off, or does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

import stores
from clouds import Cloud, eventually
from fleets import Machine, printed, row, told, write
from skysail.hosts import outages
from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run_apart, started_at
from skysail.store.database import Database
from skysail.store.schema import guests, host_zones, hosts, instances
from skysail.store.schema import outages as failures
from test_moving_instances import launch, running, state, where

# What a machine of the fleet is switched off by: it says what it is asked to, and its mode says what it does.
SWITCH = """#!/bin/sh
cd {folder}
echo "$@ $SKYSAIL_HOST $SKYSAIL_ADDRESS" >> asked
case $(cat mode) in
  fail) echo "nobody answers at the management controller" >&2; exit 1;;
  hang) sleep 600;;
esac
kill -9 $(cat "$1.pid") 2>/dev/null
exit 0
"""
POOL = 'engines = "sim"\nstorage = "ceph"\nceph_networks = ["10.0.8.0/24"]\n'


class Cable:
    """What lies between the controller and a host, and can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._ears = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._ears.getsockname()[1]
        self._cut = False
        self._ends = list[socket.socket]()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._ears.accept()
                if self._cut:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                self._ends += (near, far)
                for here, there in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(here, there), daemon=True).start()

    @staticmethod
    def _carry(here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := here.recv(65536):
                there.sendall(chunk)
        for end in (here, there):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._cut = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def mend(self) -> None:
        self._cut = False

    def close(self) -> None:
        self.cut()
        self._ears.close()


class Fleet:
    """A cloud whose controller runs no guests, and its hosts, each at the end of a cable."""

    def __init__(self, cloud: Cloud, machines: list[Machine], cables: list[Cable]) -> None:
        self.cloud = cloud
        self.machines = {one.host: one for one in machines}
        self.cables = {one.host: cable for one, cable in zip(machines, cables, strict=True)}

    def switch(self, mode: str) -> None:
        """What the program that turns hosts off does from now on: ``work``, ``fail`` or ``hang``."""
        (self.cloud.folder / "mode").write_text(mode)

    def asked(self) -> list[str]:
        """What it was called with so far."""
        path = self.cloud.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def dies(self, host: str) -> None:
        """Its power goes."""
        self.machines[host].kill("agent")

    def boots(self, host: str) -> None:
        self.machines[host].start("agent")
        self.note(host)

    def note(self, host: str) -> None:
        (self.cloud.folder / f"{host}.pid").write_text(str(self.machines[host].processes["agent"].pid))

    def host(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = told(self.cloud, "host", "show", name)
        return found

    def everywhere(self) -> Counter[str]:
        """The guests that run, by all agents that answer."""
        return Counter(one for machine in self.machines.values() if machine.processes["agent"].poll() is None
                       for one in running(machine))

    def ids(self) -> dict[str, str]:
        with stores.transaction(self.cloud.config) as connection:
            return {one.instance_name: one.id for one in connection.execute(select(guests))}

    def is_clean(self) -> None:
        verified = printed(self.cloud, "verify")
        assert verified.returncode == 0, verified.stdout


@contextlib.contextmanager
def fleet(policy: str = "restart", settings: str = POOL, count: int = 3, more: str = "") -> Iterator[Fleet]:
    folders = [Path(tempfile.mkdtemp(prefix="sky")) for _ in range(count + 1)]
    program = folders[0] / "switch"
    cloud = Cloud(folders[0], (
        f'engines = "sim"\nlocal_host = false\non_host_failure = "{policy}"\nfence = ["{program}"]\n'
        f'fence_after_seconds = 1\nfence_seconds = 3\n{more}'))
    program.write_text(SWITCH.format(folder=folders[0]))
    program.chmod(0o755)
    cloud.start("controller")
    made, cables = list[Machine](), list[Cable]()
    try:
        for number, folder in enumerate(folders[1:], 1):
            made.append(Machine(folder, cloud, f"host-{number}", settings))
            cables.append(Cable(made[-1].agent_port))
            made[-1].start("agent")
            write(cloud, insert(hosts).values(
                      id=made[-1].host, address=f"https://{made[-1].identity}@127.0.0.1:{cables[-1].port}"),
                  insert(host_zones).values(host_id=made[-1].host, region="us-east-1", zone="a"))
        one = Fleet(cloud, made, cables)
        one.switch("work")
        for name in one.machines:
            one.note(name)
            eventually(lambda name=name: row(cloud, name).facts and row(cloud, name).memory_mib, 60, f"{name} reports")
        yield one
    finally:
        for machine in made:
            machine.stop()
        cloud.stop()
        for cable in cables:
            cable.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def test_instances_of_a_host_that_is_off_for_certain_go_on_with_their_disks() -> None:
    with fleet() as here:
        cloud = here.cloud
        launch(cloud, "one", "two", "three", "four")
        client = cloud.client()
        former = Counter(where(cloud).values()).most_common(1)[0][0]
        one, off = (name for name, host in where(cloud).items() if host == former)
        other = next(name for name in here.machines if name != former)
        client.stop_instance(instanceName=off)
        eventually(lambda: state(cloud, off) == "stopped", 30)
        keys = client.get_instance_access_details(instanceName=one)["accessDetails"]["hostKeys"]

        def each_runs_once() -> bool:
            return here.everywhere() == Counter(guest for name, guest in here.ids().items() if name != off)

        # Nothing follows while nobody knows that it is off: the program fails, or does not come to an end.
        here.switch("fail")
        here.dies(former)
        eventually(lambda: here.host(former)["state"] == "failed", 30)
        eventually(here.asked, 30)
        assert here.asked()[0] == f"{former} 127.0.0.1 {former} 127.0.0.1"
        eventually(lambda: "nobody answers at the management" in here.host(former)["outage"]["error"], 30)
        shown = " ".join(printed(cloud, "host", "show", former).stdout.split())
        assert "tries so far: " in shown and f"{one} waits: its host is not known to be off" in shown, shown
        assert state(cloud, one) == "running", "nobody knows better"
        here.switch("hang")
        late = printed(cloud, "host", "fence", former)
        assert late.returncode == 1 and "did not finish within 3 s" in late.stderr, late.stderr
        assert where(cloud)[one] == where(cloud)[off] == former and sum(here.everywhere().values()) == 2

        here.switch("work")
        assert printed(cloud, "host", "fence", former).returncode == 0
        eventually(lambda: former not in where(cloud).values(), 30, "they go on elsewhere")
        eventually(lambda: state(cloud, one) == "running", 30)
        assert here.host(former)["state"] == "fenced" and state(cloud, off) == "stopped"
        details = client.get_instance_access_details(instanceName=one)["accessDetails"]
        assert details["hostKeys"] == keys, "it is the same one"
        assert each_runs_once()
        went = {left["instance"]: left["went_to"] for left in told(cloud, "host", "remains")}
        assert went == {name: where(cloud)[name] for name in (one, off)}
        refused = printed(cloud, "host", "fence", other)
        assert refused.returncode == 1 and "answers" in refused.stderr

        # It comes back with everything that it had, and does not run it.
        here.boots(former)
        eventually(lambda: here.host(former)["state"] == "ready", 60)
        eventually(lambda: told(cloud, "host", "remains") == [], 30, "nothing is left of them")
        assert running(here.machines[former]) == [] and each_runs_once()
        here.is_clean()
        client.start_instance(instanceName=off)
        eventually(lambda: state(cloud, off) == "running", 30)
        assert here.everywhere() == Counter(here.ids().values())
        # A host like any other: what runs there goes on there.
        launch(cloud, "five")
        assert where(cloud)["five"] == former


def test_a_cable_that_is_cut_is_no_failure_of_what_is_behind_it() -> None:
    with fleet(settings=POOL + "sample_seconds = 1\n", count=2, more="sample_seconds = 1\n") as here:
        cloud = here.cloud
        launch(cloud, "one", "two")
        former = where(cloud)["one"]
        with stores.transaction(cloud.config) as connection:
            instance = connection.execute(select(instances.c.id).where(instances.c.name == "one")).scalar_one()
        eventually(lambda: stores.rows(cloud.config, "SELECT * FROM meters WHERE instance_id = :id", id=instance), 30)
        here.switch("fail")
        here.cables[former].cut()
        eventually(lambda: here.host(former)["outage"] and here.host(former)["outage"]["tries"], 30)
        began = time.time()
        assert state(cloud, "one") == "running" and here.everywhere() == Counter(here.ids().values())

        def failed() -> float:
            found = cloud.client().get_instance_metric_data(
                instanceName="one", metricName="StatusCheckFailed_System", period=60, startTime=began - 120,
                endTime=began + 120, unit="Count", statistics=["Maximum"])["metricData"]
            return max((one["maximum"] for one in found), default=0.0)
        eventually(failed, 30, "its owner sees that nobody can say how it is")

        # The operator is mistaken, and the program would have been right.
        assert printed(cloud, "host", "fence", former, "--is-off").returncode == 0
        eventually(lambda: where(cloud)["one"] != former, 30)
        eventually(lambda: state(cloud, "one") == "running", 30)
        assert here.everywhere()[here.ids()["one"]] == 2, "which is why nobody may guess"
        here.cables[former].mend()
        eventually(lambda: here.everywhere() == Counter(here.ids().values()), 30, "the one that must not run is ended")
        eventually(lambda: "was not off when that was said" in cloud.log("controller"), 30)
        eventually(lambda: here.host(former)["state"] == "ready", 30)
        eventually(lambda: told(cloud, "host", "remains") == [], 30)
        here.is_clean()


@pytest.mark.long
def test_a_host_that_is_heard_again_in_time_keeps_its_instances() -> None:
    with fleet(count=2) as here:
        launch(here.cloud, "one")
        former = where(here.cloud)["one"]
        here.switch("fail")
        here.cables[former].cut()
        eventually(lambda: here.host(former)["outage"] and here.host(former)["outage"]["tries"], 30)
        here.cables[former].mend()
        eventually(lambda: here.host(former)["state"] == "ready" and here.host(former)["outage"] is None, 30)
        here.switch("work")
        time.sleep(3)
        assert where(here.cloud) == {"one": former}
        # It was turned off and on by hand, and nobody had to be asked.
        here.dies(former)
        here.boots(former)
        eventually(lambda: here.everywhere() == Counter(here.ids().values()), 60, "its instance is started again, there")
        assert where(here.cloud) == {"one": former}


def test_what_only_its_host_has_waits_for_it_unless_a_snapshot_will_do() -> None:
    with fleet("snapshot", 'engines = "sim"\n') as here:
        cloud, client = here.cloud, here.cloud.client()
        launch(cloud, "one", "two", "three")
        first = where(cloud)["one"]
        operations = client.create_instance_snapshot(instanceName="one", instanceSnapshotName="yesterday")["operations"]
        eventually(lambda: client.get_operation(operationId=operations[0]["id"])["operation"]["status"] == "Succeeded", 30)
        second = next(name for name in here.machines if name != first)
        assert told(cloud, "migrate", "one", "--to", second)["state"] == "succeeded"
        eventually(lambda: here.everywhere() == Counter(here.ids().values()), 30)
        shared = [name for name, host in where(cloud).items() if host == second]
        assert len(shared) == 2
        (stays,) = set(shared) - {"one"}
        lost = here.ids()["one"]

        here.cables[second].cut()
        here.switch("fail")
        eventually(lambda: here.host(second)["state"] == "failed", 30)
        assert printed(cloud, "host", "fence", second, "--is-off").returncode == 0
        eventually(lambda: where(cloud)["one"] == first, 30, "it begins again where its snapshot is")
        eventually(lambda: state(cloud, "one") == "running", 30)
        assert here.ids()["one"] != lost
        shown = here.host(second)["prospects"]
        assert [one["why"] for one in shown] == ["no other host has a snapshot of it"] and where(cloud)[stays] == second
        assert state(cloud, stays) == "pending", "that one is known to be down"

        # What it wrote since is kept, by the host that comes back, until its operator has seen to it.
        here.cables[second].mend()
        eventually(lambda: here.host(second)["state"] == "ready", 30)
        eventually(lambda: running(here.machines[second]) == [here.ids()[stays]], 30)
        eventually(lambda: state(cloud, stays) == "running", 30)
        (kept,) = told(cloud, "host", "remains", second)
        assert (kept["instance"], kept["snapshot"], kept["disks"]) == ("one", "yesterday", [lost])
        time.sleep(2)
        here.is_clean()
        assert lost in told_inventory(here.machines[second])["volumes"]
        assert lost not in told_inventory(here.machines[second])["ports"]
        held = printed(cloud, "host", "remove", second)
        assert held.returncode == 1 and "what is left of instance one" in held.stderr
        assert printed(cloud, "host", "remains", second, "--discard", "one").returncode == 0
        eventually(lambda: told(cloud, "host", "remains") == [], 30)
        assert lost not in told_inventory(here.machines[second])["volumes"]
        here.is_clean()


def told_inventory(machine: Machine) -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(machine.config.agent_socket))) as http:
        found: dict[str, Any] = http.get("http://agent/inventory").json()
        return found


# A controller that dies when it comes to a point on the way: behind a commit of the outages' round that changed something, or
# one that says that a host is being fenced; when the program has spoken, and nobody wrote it down; or just behind that.
DOOMED = """
import os, signal
from skysail.hosts import outages
from skysail.resources import rescue
from skysail.serve import fencing, rounds
rescue.PORTION, outages.FIRST_PAUSE_SECONDS, fencing.ANSWER_SECONDS = 1, 1.0, 1.0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def doomed(owner, name, before, about=lambda self, done: True):
    plain = getattr(owner, name)
    def step(self, *told):
        if before:
            die()
        done = plain(self, *told)
        if about(self, done):
            die()
        return done
    setattr(owner, name, step)

match {point!r}:
    case "round":
        doomed(rounds.Round, "_go", False, lambda self, done: self.name == "outages" and done)
    case "tries":
        doomed(fencing.Fencer, "_tries", False)
    case "spoken":
        doomed(fencing.Fencer, "_settle", True)
    case "settled":
        doomed(fencing.Fencer, "_settle", False)
"""


def test_the_controller_dies_wherever_it_can_on_the_way() -> None:
    with fleet() as here:
        cloud = here.cloud
        names = ("one", "two", "three", "four", "five")
        launch(cloud, *names)
        former = Counter(where(cloud).values()).most_common(1)[0][0]
        cloud.kill("controller")
        here.dies(former)

        def dies(point: str) -> None:
            with contextlib.suppress(AssertionError):  # it may be over before it is healthy
                cloud.start("controller", before=DOOMED.format(point=point))
            assert cloud.processes["controller"].wait(60) == -signal.SIGKILL
            elsewhere = [host for name, host in where(cloud).items() if host != former]
            assert len(elsewhere) == len(names) - 2 or fenced(), "nothing goes on before it is known to be off"

        def fenced() -> bool:
            with stores.transaction(cloud.config) as connection:
                return connection.execute(select(failures.c.fenced_at)).scalar() is not None

        for point in ("round", "tries", "spoken"):
            dies(point)
        assert len(here.asked()) == 1 and not fenced(), "what the program said is not known"
        dies("settled")
        assert len(here.asked()) == 2 and fenced()
        # Each of the two goes on in a commit of its own; the first may have shared that of the program's word.
        while left := Counter(where(cloud).values())[former]:
            dies("round")
            assert Counter(where(cloud).values())[former] == left - 1
        cloud.start("controller")
        eventually(lambda: here.everywhere() == Counter(here.ids().values()), 60)
        here.boots(former)
        eventually(lambda: told(cloud, "host", "remains") == [], 60)
        eventually(lambda: {state(cloud, name) for name in names} == {"running"}, 30)
        assert here.everywhere() == Counter(here.ids().values()) and len(here.asked()) == 2
        here.is_clean()


def test_a_controller_that_is_cut_off_itself_fences_nobody(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    config = Config(on_host_failure="restart", fence=("/bin/true",), fence_after_seconds=60)
    names = ("a", "b", "c", "d")

    def away(*silent: str) -> None:
        with database.transaction() as connection:
            for name in names:
                connection.execute(update(hosts).where(hosts.c.id == name).values(
                    away_since=1000.0 if name in silent else None))

    def due(now: float, began: float = 0.0) -> list[str]:
        with database.transaction() as connection:
            outages.follow(connection, config, now, began)
            return [one.host_id for one in outages.due(connection, now)]

    with database.transaction() as connection:
        for name in names:
            connection.execute(insert(hosts).values(id=name, address=f"https://{name}@192.0.2.1:8703", seen_at=1.0))
    away("a")
    assert due(1059.0) == [] and due(1060.0, began=1059.0) == [], "it has not tried to reach it for so long"
    away("a", "b", "c")
    assert due(1060.0) == []
    with database.transaction() as connection:
        found = outages.seen(connection)
        assert {one.error for one in found.values()} == {outages.CUT_OFF} and set(found) == {"a", "b", "c"}
        assert outages.ask(connection, "c", 1061.0) == 0, "its operator may know better"
        with pytest.raises(SkysailError, match="answers"):
            outages.ask(connection, "d", 1061.0)
    assert due(1061.0) == ["c"]
    away("a", "b")
    assert due(1062.0) == ["a", "b"]
    (first, *_) = wanted = one_due(database, 1062.0)
    assert [one.host_id for one in wanted] == ["a", "b"]
    with database.transaction() as connection:
        assert outages.tries(connection, first, 1062.0, 10.0)
        assert [one.host_id for one in outages.due(connection, 1062.0)] == ["b"]
        outages.fails(connection, first, "no answer", 1065.0)
        assert sorted(one.host_id for one in outages.due(connection, 1075.0)) == ["a", "b"], "later"
    # What comes of a try when the host was heard meanwhile says nothing of it as it is now.
    away("b")
    away("a", "b")
    with database.transaction() as connection:
        connection.execute(update(hosts).where(hosts.c.id == "a").values(away_since=1070.0))
        assert not outages.fenced(connection, "a", 1000.0, 1076.0) and not outages.is_fenced(connection, "a")
        assert outages.fenced(connection, "b", 1000.0, 1076.0) and outages.is_fenced(connection, "b")
    away("a")
    with database.transaction() as connection:
        assert not outages.is_fenced(connection, "b"), "it was heard"
        outages.follow(connection, config, 1077.0, 0.0)
        assert set(outages.seen(connection)) == {"a"}


def one_due(database: Database, now: float) -> list[outages.Due]:
    with database.transaction(write=False) as connection:
        return outages.due(connection, now)


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = tmp_path / "program"

    def run(text: str, timeout: float = 5.0) -> None:
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        asyncio.run(run_apart([str(script), "word"], env={"PATH": "/bin:/usr/bin", "TOLD": "so"}, timeout=timeout))

    run(f'test "$1 $TOLD ${{HOME-none}}" = "word so none" && sleep 60 & echo $! > {tmp_path}/left; exit 0')
    left = int((tmp_path / "left").read_text())
    os.kill(left, signal.SIGKILL)  # whoever it leaves behind is its own affair, and holds nobody up
    with pytest.raises(ProcessFailed, match="exited with 3: it is on fire"):
        run("echo it is on fire >&2; exit 3")
    with pytest.raises(ProcessFailed, match="did not finish within"):
        run(f"sleep 60 & echo $! > {tmp_path}/child; wait", 0.5)
    child = int((tmp_path / "child").read_text())
    eventually(lambda: started_at(child) is None, 10, "its child is gone, too")
    with pytest.raises(ProcessFailed, match="cannot be run"):
        asyncio.run(run_apart([str(tmp_path / "nothing")], env={}, timeout=1.0))
