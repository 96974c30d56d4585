"""A fleet on one machine: hosts that are network namespaces, which join, are called over their underlay, and are cut off."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config as BotoConfig

from clouds import CACHE, ensure_image, eventually, taken_slot
from fleets import free_port
from skysail.hypervisor.process import PROGRAM
from skysail.kit.config import Config, load
from skysail.network.underlay import Underlay
from skysail.serve import endpoint, processes
from skysail.serve.dev import UIDS

pytestmark = pytest.mark.real


class Fleet:
    """A folder for a fleet in a slot of this machine."""

    def __init__(self, slot: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sky"))
        self.folder.chmod(0o755)
        self.name, self.underlay, self.port = f"skyf{slot}", f"100.115.{180 + slot}.0/24", free_port()
        self.uids = 4_000_000 + 1_000_000 * slot

    @property
    def config(self) -> Config:
        return load(str(self.folder))

    def skysail(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True, check=False,
                              env={**os.environ, "SKYSAIL_DATA": str(self.folder)})

    def make(self, count: int, *more: str) -> list[dict[str, Any]]:
        done = self.skysail("dev", "fleet", str(count), "--name", self.name, "--underlay", self.underlay, "--port",
                            str(self.port), "--uids", str(self.uids), "--json", *more)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def host(self, name: str) -> dict[str, Any]:
        done = self.skysail("host", "show", name, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def client(self) -> Any:
        key, secret = endpoint.credentials(self.config)
        return boto3.client("lightsail", region_name="us-east-1", endpoint_url=endpoint.url(self.config),
                            aws_access_key_id=key, aws_secret_access_key=secret,
                            config=BotoConfig(retries={"total_max_attempts": 1}))

    def launch(self, *names: str) -> None:
        client = self.client()
        client.create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        for name in names:
            eventually(lambda name=name: client.get_instance_state(instanceName=name)["state"]["name"] == "running", 120)

    def enter(self, host: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.skysail("dev", "enter", host, *words)

    @contextlib.contextmanager
    def session(self, name: str, script: str) -> Iterator[Callable[[str], str]]:
        """A login to an instance that stays open: what the script there answers to each line."""
        with subprocess.Popen([sys.executable, "-m", "skysail.cli.main", "ssh", name, "--", f"bash -c '{script}'"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "SKYSAIL_DATA": str(self.folder)}) as running:
            said, heard = running.stdin, running.stdout
            assert said is not None and heard is not None

            def ask(line: str) -> str:
                said.write(f"{line}\n")
                said.flush()
                return heard.readline().strip()

            try:
                yield ask
            finally:
                running.kill()

    def where(self, name: str) -> dict[str, dict[str, Any]]:
        """What ``explain placement`` says, by host."""
        done = self.skysail("explain", "placement", name, "--json")
        assert done.returncode == 0, done.stderr
        return {one["host"]: one for one in json.loads(done.stdout)}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    with taken_slot() as slot:
        made = Fleet(slot)
        try:
            yield made
        finally:
            made.skysail("dev", "stop")
            with contextlib.suppress(Exception):
                Underlay(made.name, made.underlay).remove()
            shutil.rmtree(made.folder, ignore_errors=True)


@pytest.mark.long
def test_three_hosts_on_one_machine(fleet: Fleet) -> None:
    made = fleet.make(3)
    assert [one["id"] for one in made] == ["host-1", "host-2", "host-3"] and {one["state"] for one in made} == {"ready"}
    assert len({one["address"].partition("@")[2] for one in made}) == 3, "each at an address of its own"
    for one in made:
        assert one["address"].partition("@")[2] == f"{one['facts']['underlay']}:8703", "which the others know it by, too"
        assert fleet.enter(one["id"], "hostname", "-I").stdout.split()[0] == one["facts"]["underlay"]
    assert fleet.enter("host-2", "bash", "-c", f"exec 3<>/dev/tcp/{made[2]['facts']['underlay']}/8703").returncode == 0
    assert fleet.enter("host-2", "false").returncode == 1 and "it has host-1" in fleet.enter("host-9", "true").stderr
    for name in ("host-1", "host-2", "host-3"):
        eventually(lambda name=name: fleet.host(name)["memory_mib"] and fleet.host(name)["images"], 60, f"{name} reports")

    # An owner's instances are spread, and a cordoned host is given none.
    fleet.launch("one", "two", "three")
    assert [fleet.host(f"host-{number}")["guests"] for number in (1, 2, 3)] == [1, 1, 1]
    assert fleet.skysail("host", "cordon", "host-2").returncode == 0
    fleet.launch("four", "five")
    assert [fleet.host(f"host-{number}")["guests"] for number in (1, 2, 3)] == [2, 1, 2]
    seen = fleet.where("four")
    assert seen["host-2"]["refusals"] == ["is cordoned"] and seen["host-2"]["place"] == 0
    (holder,) = [one for one in seen.values() if one["holds"]]
    assert holder["place"] == 1 and holder["of_owner"] == 1, "it would be placed where it is"

    verified = fleet.skysail("verify")
    assert verified.returncode == 0 and "rows and machine agree" in verified.stdout, verified.stdout + verified.stderr

    # Cut off from its controller a host is away, and back once the way is.
    port = ["ip", "-n", f"{fleet.name}-net", "link", "set", "p3"]
    subprocess.run([*port, "down"], check=True)
    eventually(lambda: fleet.host("host-3")["state"] == "away", 120)
    lonely = fleet.skysail("verify")
    assert lonely.returncode == 1 and "host host-3: its agent does not answer" in lonely.stdout
    subprocess.run([*port, "up"], check=True)
    eventually(lambda: fleet.host("host-3")["state"] == "ready", 120)

    # Nobody but the controller opens an agent: not a host with its own certificate either.
    knock = ("import ssl, sys, http.client; c = ssl.create_default_context(cafile=sys.argv[1] + '/authority.pem'); "
             "c.check_hostname = False; c.load_cert_chain(sys.argv[1] + '/host.pem'); "
             "h = http.client.HTTPSConnection(sys.argv[2], 8703, context=c); h.request('GET', '/document'); "
             "print(h.getresponse().read())")
    identity, other = fleet.folder / "fleet" / "host-1" / "agent" / "identity", made[1]["address"].partition("@")[2][:-5]
    tried = subprocess.run(["nsenter", f"--net=/run/netns/{fleet.name}-1", "--", sys.executable, "-c", knock, str(identity),
                            other], capture_output=True, text=True, check=False)
    assert tried.returncode != 0 and not tried.stdout, tried.stdout
    assert "alert" in tried.stderr or "closed connection without response" in tried.stderr, tried.stderr

    # It may be repeated, grow, and come back.
    assert [one["address"] for one in fleet.make(3)] == [one["address"] for one in made]
    assert fleet.skysail("dev", "stop").returncode == 0
    assert not list(Path("/run/netns").glob(f"{fleet.name}-*"))
    again = fleet.make(4)
    assert [one["address"] for one in again][:3] == [one["address"] for one in made]
    assert [one["id"] for one in again][3:] == ["host-4"]
    eventually(lambda: {fleet.host(one["id"])["state"] for one in again} == {"ready"}, 120)
    client = fleet.client()
    eventually(lambda: {one["state"]["name"] for one in client.get_instances()["instances"]} == {"running"}, 120)
    assert len(client.get_instances()["instances"]) == 5


def banner(address: str) -> bytes:
    """How the SSH server there greets; nothing when it does not."""
    with contextlib.suppress(OSError), socket.create_connection((address, 22), 10) as connection:
        return connection.recv(8)
    return b""


@pytest.mark.timeout(2400)
def test_hosts_with_real_guests(fleet: Fleet) -> None:
    """Each in a namespace of its own, with the machine's QEMU or another one's wrapper."""
    ensure_image("debian_12")
    wrapper = fleet.folder.with_name(f"{fleet.folder.name}-qemu")
    wrapper.mkdir(mode=0o755)
    try:
        (wrapper / PROGRAM).write_text(f'#!/bin/sh\nexec {shutil.which(PROGRAM)} "$@"\n')
        (wrapper / PROGRAM).chmod(0o755)
        made = fleet.make(2, "--engines", "real", "--stock", str(CACHE), "--qemu", f"host-2={wrapper}")
        assert {one["accelerator"] for one in made} <= {"kvm", "tcg"} and all(one["facts"]["machine_types"] for one in made)
        for one in made:
            eventually(lambda name=one["id"]: fleet.host(name)["images"], 120, "an image to launch")
        fleet.launch("one", "two")
        addresses = {one["name"]: one["publicIpAddress"] for one in fleet.client().get_instances()["instances"]}
        for name in ("one", "two"):
            (host,) = [where for where, one in fleet.where(name).items() if one["holds"]]
            folder = fleet.folder / "fleet" / host
            (guest,) = processes.guests(load(str(folder)))
            user = int(re.search(r"Uid:\t(\d+)", Path(f"/proc/{guest.pid}/status").read_text())[1])
            assert (user - fleet.uids) // UIDS == int(host[-1]) - 1, "no two hosts' guests are the same user"
            # It answers this machine, whichever host it is on.
            eventually(lambda place=addresses[name]: banner(place) == b"SSH-2.0-", 300)
        assert [fleet.host(f"host-{number}")["guests"] for number in (1, 2)] == [1, 1]
        # They have each other privately, on two hosts and on one; the login to the one that moves stays open.
        private = fleet.client().get_instance(instanceName="two")["instance"]["privateIpAddress"]
        with fleet.session("one", "cat") as echo, fleet.session("one", (
                f"while read -r _; do exec 3<>/dev/tcp/{private}/22; read -t 60 -r line <&3; exec 3>&-; "
                "echo ${line:0:7}; done")) as neighbour:
            assert echo("before") == "before" and neighbour("") == "SSH-2.0"
            (source,) = [where for where, one in fleet.where("one").items() if one["holds"]]
            moved = fleet.skysail("migrate", "one", "--json")
            assert moved.returncode == 0, moved.stdout + moved.stderr
            report = json.loads(moved.stdout)
            print(f"{report['source']} to {report['target']}: {report['report']}")
            assert report["source"] == source != report["target"]
            assert echo("after") == "after" and neighbour("") == "SSH-2.0"
        assert not fleet.host(source)["guests"]
        verified = fleet.skysail("verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert fleet.skysail("dev", "stop").returncode == 0
        assert not list(Path("/run/netns").glob(f"{fleet.name}-*"))
    finally:
        shutil.rmtree(wrapper)


def test_a_folder_with_something_else_is_left_alone(fleet: Fleet) -> None:
    (fleet.folder / "skysail.toml").write_text("port = 1\n")
    done = fleet.skysail("dev", "fleet", "1", "--name", fleet.name, "--underlay", fleet.underlay)
    assert done.returncode == 1 and "has something else in it" in done.stderr
    assert fleet.skysail("dev", "stop").returncode == 1
    assert not list(Path("/run/netns").glob(f"{fleet.name}-*"))
