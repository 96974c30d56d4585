"""kill -9 at every step boundary: of the controller over a simulated host, of the agent over real guests.

Each scenario lets its victim die before its first step, recovers, checks the whole world, lets it die before its second step,
and so on, until it outlives the work: the boundaries are enumerated by the program itself (see doomed.py). The guests of most
scenarios are real QEMU processes with a system of 47 bytes: it says ``B`` when it boots, and on the power button ``S``, and
goes off. It boots within milliseconds, so every boundary can have its turn.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from conftest import Cloud, RealCloud, eventually, taken_slot
from skysail.hypervisor import confinement
from skysail.hypervisor.guest import Record
from skysail.hypervisor.process import Pid, machine_boot
from skysail.images.library import Library
from skysail.network import links
from skysail.serve import processes
from skysail.serve.up import end_guests

DOOMED = (str(Path(__file__).parent / "doomed.py"), "{name}")
# Prints B, enables the power button (ACPI PM1, which SeaBIOS puts at port 0x600), waits for it, prints S, goes to S5.
TINY = bytes.fromhex("fabaf803b042eeb00aeeba0206b80001efba0006eda900017410baf803b053eeb00aeeba0406b80020effbf4faebe2")


# --- what the world holds

def rows(cloud: Cloud, query: str, *values: object) -> list[dict[str, Any]]:
    """Rows of the controller's database, read behind its back."""
    with sqlite3.connect(f"file:{cloud.config.database}?mode=ro", uri=True, timeout=30) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, values)]


def inventory(cloud: Cloud) -> dict[str, list[str]]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket)), timeout=30) as http:
        found: dict[str, list[str]] = http.get("http://agent/inventory").json()
        return found


def open_work(cloud: Cloud) -> list[dict[str, Any]]:
    return rows(cloud, "SELECT type, resource_name, status FROM operations WHERE NOT done")


def leaks(cloud: Cloud) -> list[str]:
    """What rows, host and machine do not agree on; empty when nothing is left over and nothing is missing."""
    found = []
    guests = {row["id"]: row for row in rows(cloud, "SELECT * FROM guests")}
    instances = {row["id"]: row for row in rows(cloud, "SELECT * FROM instances")}
    names = {row["resource_id"] for row in rows(cloud, "SELECT * FROM names WHERE resource_type = 'Instance'")}
    running = {guest for guest, row in guests.items() if row["role"] == "run"}
    if {row["instance_id"] for row in guests.values()} != set(instances):
        found.append(f"guests {guests} for instances {instances}")
    if names != set(instances):
        found.append(f"names of {names} for instances {set(instances)}")
    for row in guests.values():
        state, expected = instances.get(row["instance_id"], {}).get("state"), "running" if row["role"] == "run" else "stopped"
        if state != expected or row["observed_state"] != expected:
            found.append(f"{row['instance_name']}: role {row['role']}, state {state}, observed {row['observed_state']}")
    (host,) = rows(cloud, "SELECT generation, observed_generation FROM hosts")
    if host["generation"] != host["observed_generation"]:
        found.append(f"the host is behind its document: {host}")
    held = inventory(cloud)
    for kind in ("guests", "volumes") if isinstance(cloud, RealCloud) else ("guests",):
        if set(held[kind]) != set(guests):
            found.append(f"{kind} {held[kind]} for rows {sorted(guests)}")
    if not running <= set(held["ports"]) <= set(guests):
        found.append(f"ports {held['ports']} for rows {sorted(guests)}, of which run {sorted(running)}")
    if isinstance(cloud, RealCloud):
        found += machine_leaks(cloud, set(guests), running, len(held["ports"]))
    return found


def machine_leaks(cloud: RealCloud, guests: set[str], running: set[str], ports: int) -> list[str]:
    """The same for what the agent itself may not know of: processes, folders, files, taps, cgroups."""
    found = []
    work = sorted(owner for _, owner in qemus(cloud))
    if work != sorted(running):
        found.append(f"processes of {work} for running guests {sorted(running)}")
    folders = {path.name for path in cloud.config.guests_dir.iterdir()}
    if folders != guests:
        found.append(f"folders {folders} for guests {guests}")
    files = {path.name for path in cloud.config.volumes_dir.iterdir()}
    if files != {f"{guest}.qcow2" for guest in guests}:
        found.append(f"files {files} for guests {guests}")
    taps = [] if not links.exists(cloud.config.namespace) else [
        link.name for link in links.inside(cloud.config.namespace, links.every) if link.is_tap]
    if len(taps) != ports:
        found.append(f"taps {taps} for {ports} ports")
    ever = {row["guest"] for row in rows(cloud, "SELECT json_extract(arguments, '$.guest') AS guest FROM operations")}
    for guest in filter(None, ever):
        if any(folder.exists() for folder in confinement._folders(guest)) != (guest in running):
            found.append(f"cgroup of {guest}, which {'runs' if guest in running else 'does not run'}")
    return found


def qemus(cloud: Cloud) -> list[tuple[int, str]]:
    """Pid and guest of every QEMU process of this cloud, as the machine knows them."""
    found = []
    for record in processes.guests(cloud.config):
        words = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
        found.append((record.pid, words[words.index(b"-name") + 1].decode().removeprefix("guest=")))
    return found


def handed_over(cloud: Cloud) -> dict[str, int]:
    """Pid by guest of those that run and are, by their record on the disk, somebody's server already."""
    records = {path.parent.name: msgspec.json.decode(path.read_bytes(), type=Record)
               for path in cloud.config.guests_dir.glob("*/guest.json")} if cloud.config.guests_dir.exists() else {}
    return {owner: pid for pid, owner in qemus(cloud) if owner in records and records[owner].made}


def guest_of(cloud: Cloud, name: str) -> str:
    (row,) = rows(cloud, "SELECT id FROM guests WHERE instance_name = ? AND role != 'gone'", name)
    return str(row["id"])


def pid_of(cloud: Cloud, name: str) -> int:
    guest = guest_of(cloud, name)
    (pid,) = [pid for pid, owner in qemus(cloud) if owner == guest]
    return pid


def serial(cloud: Cloud, name: str) -> str:
    """What the tiny system of instance ``name`` said, over all of its boots."""
    said = (cloud.config.guests_dir / guest_of(cloud, name) / "run" / "serial.log").read_text()
    return "".join(letter for letter in said if letter in "BS")


def settled_serial(cloud: Cloud, name: str) -> str:
    """:func:`serial`, once nothing was added for a while: firmware takes its time to come to the boot sector."""
    said = ""
    while (now := serial(cloud, name)) != said:
        said = now
        time.sleep(1.0)
    return said


def whole(cloud: Cloud, seconds: float = 120) -> None:
    """All work ends within ``seconds``, and then nothing is left over."""
    eventually(lambda: not open_work(cloud), seconds, f"all work ends: {open_work(cloud)}")
    try:
        eventually(lambda: not leaks(cloud), 20)
    except AssertionError:
        raise AssertionError(f"{leaks(cloud)}\n{cloud.log('agent')}") from None


# --- doom

class Doom:
    """Lets one process of a cloud die between two steps, over and over."""

    def __init__(self, cloud: Cloud, victim: str) -> None:
        self.cloud = cloud
        self.victim = victim
        self.deaths: dict[str, list[str]] = {}
        self.survivors: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        if self.victim in self.cloud.processes and self.cloud.processes[self.victim].poll() is None:
            self.cloud.kill(self.victim)
        self.cloud.start(self.victim, DOOMED)

    def arm(self, survived: list[str]) -> None:
        """Die before the first step that is not among these."""
        (self.cloud.folder / "doom").write_text("\n".join(survived))
        self.cloud.processes[self.victim].send_signal(signal.SIGUSR1)
        eventually(lambda: not (self.cloud.folder / "doom").exists(), what="the victim counts its steps")

    def dead(self) -> bool:
        return self.cloud.processes[self.victim].poll() is not None

    def disarm(self) -> None:
        self.arm(["everything"])

    def during(self, kind: str, act: Callable[[], Any], seconds: float = 240) -> str | None:
        """The victim dies before the first step of ``act`` before which it has not died in this kind of work, comes back, and
        all ends well. Says before which step that was; None when it has died before them all, and now lived."""
        deaths = self.deaths.setdefault(kind, [])
        assert len(deaths) < 200, f"no end of steps: {deaths}"
        self.survivors = {}
        before = len(rows(self.cloud, "SELECT id FROM operations"))
        self.arm(deaths)
        try:
            act()
        except (BotoCoreError, ClientError):
            eventually(self.dead, what="the victim is dead, as its caller saw")
        eventually(lambda: self.dead() or not (open_work(self.cloud) or leaks(self.cloud)), seconds, "death or a good end")
        died = None
        if self.dead():
            died = (self.cloud.folder / "steps").read_text().splitlines()[-1]
            deaths.append(died)
            self.survivors = handed_over(self.cloud)
            self.start()
            if len(rows(self.cloud, "SELECT id FROM operations")) == before:
                act()  # the controller died before the request was written down: its owner asks again
        else:
            self.disarm()
        whole(self.cloud, seconds)
        return died

    def everywhere(self, kind: str, act: Callable[[], Any], between: Callable[[], Any]) -> list[str]:
        """Each boundary of ``act`` in turn, ``between`` leading back to where ``act`` can be done again."""
        while self.during(kind, act) is not None:
            between()
        return self.deaths[kind]

    def missed(self) -> list[str]:
        """Effects of the agent that are no steps, so that it did not die before them (see doomed.py)."""
        path = self.cloud.folder / "steps.missed"
        return path.read_text().splitlines() if path.exists() else []


def create(cloud: Cloud, name: str, blueprint: str) -> None:
    cloud.client().create_instances(instanceNames=[name], availabilityZone="us-east-1a", blueprintId=blueprint,
                                    bundleId="nano_3_0")


def ready(cloud: Cloud, blueprint: str) -> None:
    eventually(lambda: blueprint in {found["blueprintId"] for found in cloud.client().get_blueprints()["blueprints"]}, 30,
               f"{blueprint} is ready")


class Life:
    """The five operations on one instance, each leading to the next."""

    def __init__(self, cloud: Cloud, blueprint: str) -> None:
        self.cloud = cloud
        self.blueprint = blueprint

    def create(self) -> None:
        create(self.cloud, "one", self.blueprint)

    def stop(self) -> None:
        self.cloud.client().stop_instance(instanceName="one")

    def start(self) -> None:
        self.cloud.client().start_instance(instanceName="one")

    def reboot(self) -> None:
        self.cloud.client().reboot_instance(instanceName="one")

    def delete(self) -> None:
        self.cloud.client().delete_instance(instanceName="one")

    def done(self, *acts: Callable[[], None]) -> None:
        """These acts, one after the other, each to its end."""
        for act in acts:
            act()
            whole(self.cloud)


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

@pytest.fixture(scope="module")
def tiny_cloud() -> Iterator[RealCloud]:
    """Real QEMU processes with the tiny system, from an image library of their own."""
    if os.geteuid() != 0:
        pytest.skip("real guests need root")
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    library = Library(folder / "images")
    library.directory.mkdir()
    raw = (TINY.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")
    (folder / "tiny.raw").write_bytes(raw)
    library.import_file(folder / "tiny.raw", hashlib.sha256(raw).hexdigest(), "tiny", "Tiny", "admin", "raw")
    with taken_slot() as slot:
        made = RealCloud(folder, slot, folder)
        try:
            made.start("agent")
            made.start("controller")
            ready(made, "tiny")
            yield made
        finally:
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)


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
    assert {"confinement:spawn", "QemuGuest.save made", "files:_finish"} <= set(doom.deaths["create"])
    assert {"confinement:kill", "shutil:rmtree", "FilePool.remove"} <= set(doom.deaths["delete"])


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


# --- what a crash or an accident leaves on the disk

def state(cloud: Cloud, name: str) -> str:
    found: str = cloud.client().get_instance_state(instanceName=name)["state"]["name"]
    return found


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
        assert [confinement.started_at(pid) is not None for pid in pids] == [False, True, True]
        assert looker.poll() is None
        confinement.sweep(f"{root}/mine/")
        assert [confinement.started_at(pid) is not None for pid in pids] == [False, False, True]
    finally:
        looker.kill()
        looker.wait()
        confinement.sweep(f"{root}/")
        shutil.rmtree(root)


def test_a_pid_from_before_the_machines_reboot_is_nobodys() -> None:
    started = confinement.started_at(os.getpid())
    assert started is not None
    assert Pid(pid=os.getpid(), started=started, boot=machine_boot()).alive()
    assert not Pid(pid=os.getpid(), started=started, boot="an earlier one").alive()
    assert not Pid(pid=os.getpid(), started=started - 1, boot=machine_boot()).alive()
