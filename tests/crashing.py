"""What the tests of crashes share: a look at everything that a cloud holds, and a way to let a process die between two steps.

The guests of most scenarios are real QEMU processes with a system of 47 bytes: it says ``B`` when it boots, and on the power
button ``S``, and goes off. It boots within milliseconds, so every boundary can have its turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from botocore.exceptions import BotoCoreError, ClientError

import estates
import stores
from clouds import Cloud, RealCloud, eventually, running_real_cloud
from skysail.hypervisor import confinement
from skysail.hypervisor.record import Record
from skysail.images import foreign
from skysail.images.library import Library
from skysail.kit.config import load
from skysail.metadata.process import holders
from skysail.network import links
from skysail.serve import processes
from skysail.serve.up import end_guests

# Prints B, enables the power button (ACPI PM1, which SeaBIOS puts at port 0x600), waits for it, prints S, goes to S5.
TINY = bytes.fromhex("fabaf803b042eeb00aeeba0206b80001efba0006eda900017410baf803b053eeb00aeeba0406b80020effbf4faebe2")


@contextlib.contextmanager
def running_tiny_cloud(more: str = "") -> Iterator[RealCloud]:
    """A cloud of real QEMU processes with the tiny system, from an image library of its own; ``more`` goes to
    skysail.toml."""
    with running_real_cloud(more=more) as made:
        made.stop()
        settings = (made.folder / "skysail.toml").read_text()
        for name, former in (("images", made.config.images_dir), ("templates", made.config.templates_dir)):
            settings = settings.replace(str(former), str(made.folder / name))
        (made.folder / "skysail.toml").write_text(settings)
        made.config = load(str(made.folder))
        library = Library(made.config.images_dir)
        library.directory.mkdir()
        raw = (TINY.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")
        (made.folder / "tiny.raw").write_bytes(raw)
        foreign.take_in(foreign.Origin(source=str(made.folder / "tiny.raw"), sha256=hashlib.sha256(raw).hexdigest()),
                        foreign.Blueprint(id="tiny", name="Tiny", user="admin"), library, made.config.importer_uid)
        made.start("agent")
        made.start("controller")
        ready(made, "tiny")
        try:
            yield made
        finally:
            made.stop()
            end_guests(made.config)


# --- what the world holds

def rows(cloud: Cloud, query: str, **values: object) -> list[dict[str, Any]]:
    """Rows of the controller's database, read behind its back."""
    return stores.rows(cloud.config, query, **values)


def inventory(cloud: Cloud) -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket)), timeout=30) as http:
        found: dict[str, Any] = http.get("http://agent/inventory").json()
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
    try:
        held = inventory(cloud)
    except httpx.HTTPError as silent:  # it died after it was last looked at
        return [f"the agent does not answer: {silent}"]
    disks = {row["id"] for row in rows(cloud, "SELECT id FROM disks")}
    snapshots = {row["id"] for row in rows(cloud, "SELECT id FROM snapshots")}
    wanted = {"guests": set(guests), "snapshots": snapshots}
    if isinstance(cloud, RealCloud):
        wanted["volumes"] = set(guests) | disks
    peered = {row["number"]: row["account_id"] for row in rows(cloud, "SELECT * FROM networks WHERE peered")}
    for guest, numbers in held["reached_by"].items():
        own = guests[guest]["network"] if guest in guests else 0
        joined = {own, *(number for number in peered if own in peered and peered[number] == peered[own])}
        if set(numbers) != joined:
            found.append(f"{guest} is reached by networks {numbers}, by the rows by {joined}")
    found += [f"{kind} {held[kind]} for rows {sorted(rows)}" for kind, rows in wanted.items() if set(held[kind]) != rows]
    if not running <= set(held["ports"]) <= set(guests):
        found.append(f"ports {held['ports']} for rows {sorted(guests)}, of which run {sorted(running)}")
    if isinstance(cloud, RealCloud):
        found += machine_leaks(cloud, set(guests), running, len(held["ports"]))
        files = {path.name for path in cloud.config.volumes_dir.iterdir()}
        if files != {f"{volume}.qcow2" for volume in wanted["volumes"]}:
            found.append(f"files {files} for volumes {wanted['volumes']}")
        folders = {path.name for path in cloud.config.snapshots_dir.iterdir()}
        if folders != snapshots:
            found.append(f"folders {folders} for snapshots {snapshots}")
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
    answerers = holders(f"skysail-metadata:{cloud.config.data}")
    if len(answerers) > 1 or (guests and not answerers):
        found.append(f"processes {list(answerers)} answer for metadata of {len(guests)} guests")
    taps = [] if not links.exists(cloud.config.namespace) else [
        link.name for link in links.inside(cloud.config.namespace, links.every) if link.is_tap]
    if len(taps) != ports:
        found.append(f"taps {taps} for {ports} ports")
    ever = {json.loads(row["arguments"]).get("guest")
            for row in rows(cloud, "SELECT CAST(arguments AS TEXT) AS arguments FROM operations")}
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
    (row,) = rows(cloud, "SELECT id FROM guests WHERE instance_name = :name AND role != 'gone'", name=name)
    return str(row["id"])


def pid_of(cloud: Cloud, name: str) -> int:
    guest = guest_of(cloud, name)
    (pid,) = [pid for pid, owner in qemus(cloud) if owner == guest]
    return pid


def serial(cloud: Cloud, name: str) -> str:
    """What the tiny system of instance ``name`` said, over all of its boots."""
    said = (cloud.config.guests_dir / guest_of(cloud, name) / "run" / "serial.log").read_text()
    return "".join(letter for letter in said if letter in "BS")


def state(cloud: Cloud, name: str) -> str:
    found: str = cloud.client().get_instance_state(instanceName=name)["state"]["name"]
    return found


def settled_serial(cloud: Cloud, name: str) -> str:
    """:func:`serial`, once nothing was added for a while: firmware takes its time to come to the boot sector."""
    said = ""
    while (now := serial(cloud, name)) != said:
        said = now
        time.sleep(1.0)
    return said


def whole(cloud: Cloud, seconds: float = 300) -> None:
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
        with (self.cloud.folder / f"{self.victim}.log").open("ab") as out:
            self.cloud.processes[self.victim] = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "doomed.py"), self.victim],
                env={**os.environ, "SKYSAIL_DATA": str(self.cloud.folder)}, stdout=out, stderr=out)
        estates.note(self.cloud.folder, self.victim, self.cloud.processes[self.victim].pid)
        eventually(lambda: self.cloud._healthy(self.victim), 60, f"the doomed {self.victim} is healthy")

    def arm(self, survived: list[str]) -> None:
        """Die before the first step that is not among these."""
        (self.cloud.folder / "doom").write_text("\n".join(survived))
        self.cloud.processes[self.victim].send_signal(signal.SIGUSR1)
        eventually(lambda: not (self.cloud.folder / "doom").exists(), what="the victim counts its steps")

    def dead(self) -> bool:
        return self.cloud.processes[self.victim].poll() is not None

    def disarm(self) -> None:
        self.arm(["everything"])

    def during(self, kind: str, act: Callable[[], Any], seconds: float = 600) -> str | None:
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
