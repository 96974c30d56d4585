"""A machine becomes a host by a token: the real command on a folder of its own, against a real controller."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, delete, select, update

import stores
from clouds import Cloud, eventually, running_cloud
from fleets import authority, free_port, printed, row, told, write
from skysail import contract
from skysail.contract.facts import HostFacts
from skysail.hosts import admission, roster
from skysail.hosts.admission import Application, Refused, Token
from skysail.hosts.authority import Authority
from skysail.hosts.credentials import show
from skysail.kit import certificates
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.serve import membership, programs
from skysail.store.database import Database
from skysail.store.schema import host_zones, hosts, join_tokens
from skysail.store.vault import Vault

NOW = 1_800_000_000.0
DAY = 86400.0
FACTS = HostFacts(host="x", program="0", kernel="6", qemu="10", accelerator="tcg", accelerator_seen="", cpu="c", cpu_flags=(),
                  cpu_models=(), machine_types=(), guest_cpu="qemu64", guest_machine="q35")
root = pytest.mark.skipif(os.geteuid() != 0, reason="joining needs root")


@pytest.fixture
def open_cloud() -> Iterator[Cloud]:
    """A cloud with two zones that machines can join."""
    with running_cloud(f'join_listen = "127.0.0.1"\njoin_port = {free_port()}\n') as made:
        yield made


class Newcomer:
    """A machine of which nothing is there but its settings."""

    def __init__(self, settings: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sky"))
        (self.folder / "skysail.toml").write_text(f'engines = "sim"\ndetached = true\n{settings}')
        self.port = free_port()

    @property
    def config(self) -> Config:
        return load(str(self.folder))

    def skysail(self, *words: str, before: str = "", said: str = "") -> subprocess.CompletedProcess[str]:
        """``skysail WORDS`` there, to which ``said`` is said; Python's statements ``before`` run first."""
        return subprocess.run([sys.executable, "-c", f"{before}\nimport sys; from skysail.cli.main import main\n"
                               "sys.exit(main(sys.argv[1:]))", *words], capture_output=True, text=True, check=False,
                              input=said, env={**os.environ, "SKYSAIL_DATA": str(self.folder)})

    def join(self, made: dict[str, str], *more: str, before: str = "") -> subprocess.CompletedProcess[str]:
        return self.skysail("join", made["url"], "--port", str(self.port), *more, before=before, said=made["token"])

    def remove(self) -> None:
        with contextlib.suppress(SkysailError):
            programs.stop(self.config, "agent")
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def newcomer(settings: str = "") -> Iterator[Newcomer]:
    made = Newcomer(settings)
    try:
        yield made
    finally:
        made.remove()


@root
def test_a_fresh_machine_joins_and_is_given_instances(open_cloud: Cloud) -> None:
    made = told(open_cloud, "host", "token", "--zone", "us-east-1b")
    assert made["command"] == f"sudo ./skysail join {made['url']}"
    with newcomer() as machine, newcomer() as other:
        done = machine.join(made, "--name", "host-2")
        assert done.returncode == 0, done.stderr
        assert "this machine is host-2, in us-east-1b" in done.stderr and "waiting for the controller" in done.stderr
        found = told(open_cloud, "host", "show", "host-2")
        assert found["state"] == "ready" and found["zones"] == ["us-east-1b"] and found["facts"]["host"] == "host-2"
        assert found["facts"]["underlay"] == "127.0.0.1"
        client = open_cloud.client()
        write(open_cloud, delete(host_zones).where(host_zones.c.host_id == "host-1", host_zones.c.zone == "b"))
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["memory_mib"], 60, "it reports")
        client.create_instances(instanceNames=["there"], availabilityZone="us-east-1b", blueprintId="debian_12",
                                bundleId="nano_3_0")
        eventually(lambda: client.get_instance_state(instanceName="there")["state"]["name"] == "running", 60, "it runs")

        again = machine.join(made, "--name", "host-2")
        assert again.returncode == 0, again.stderr
        assert told(open_cloud, "host", "show", "host-2")["address"] == found["address"], "it is the same host"
        second = other.join(made, "--name", "host-3")
        assert second.returncode == 1 and "this token was used already" in second.stderr
        assert "host-3" not in [one["id"] for one in told(open_cloud, "host", "list")]

        secret = Token.parse(made["token"]).secret
        for file in (open_cloud.folder / "controller").glob("skysail.sqlite*"):
            assert secret.encode() not in file.read_bytes(), "the store has a hash of it"
        assert not (machine.folder / "controller").joinpath("skysail.sqlite").exists()
        assert not (machine.folder / "controller").joinpath("master.key").exists()
        assert machine.config.public_pool == open_cloud.config.public_pool and not machine.config.powerdns

        # There, the same commands look after the agent alone, and lead to the controller for all else.
        assert programs.names(machine.config) == ("agent",)
        elsewhere = machine.skysail("host", "list")
        assert elsewhere.returncode == 1 and "run this on the controller" in elsewhere.stderr
        assert machine.skysail("down").returncode == 0
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["state"] == "away", 60)
        assert machine.skysail("up").returncode == 0
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["state"] == "ready", 60)
        assert not programs.pid(machine.config, "controller")


@root
def test_a_joining_that_is_killed_at_any_step_is_repeated_with_the_same_token(open_cloud: Cloud) -> None:
    """The steps are the files that it puts in their place; after each the machine may lose its power."""
    made = told(open_cloud, "host", "token", "--host", "host-2")
    killing = """
import os, sys
left = {left}
def step(event, args):
    global left
    if event == "os.rename" and str(args[1]).startswith(os.environ["SKYSAIL_DATA"]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(step)
"""
    with newcomer() as machine:
        killed = 0
        while (done := machine.join(made, before=killing.format(left=killed))).returncode == -9:
            killed += 1
            assert killed < 20
        assert done.returncode == 0 and killed >= 5, done.stderr
        assert told(open_cloud, "host", "show", "host-2")["state"] == "ready"
        assert [one["id"] for one in told(open_cloud, "host", "list")] == ["host-1", "host-2"]
        # And once more from each of its steps: a machine that is a host already.
        assert machine.join(made).returncode == 0


class Impostor(BaseHTTPRequestHandler):
    """Says that it is the controller, with a key of its own; ``heard`` keeps what it is told."""

    pem = b""
    heard: list[bytes] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.pem)

    def do_POST(self) -> None:
        self.heard.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@root
@pytest.mark.parametrize("shows_the_authority", [False, True])
def test_nothing_is_told_to_who_is_not_the_controller(open_cloud: Cloud, tmp_path: Path, shows_the_authority: bool) -> None:
    made = told(open_cloud, "host", "token")
    database = Database(tmp_path / "other.sqlite")
    database.migrate()
    with database.transaction() as connection:
        own = Authority.ensure(connection, Vault.at(tmp_path / "key"), time.time(), DAY)
    database.close()
    # The authority's certificate is no secret: who shows it still does not have its key.
    Impostor.pem, Impostor.heard = (authority(open_cloud) if shows_the_authority else own).pem, []
    server = HTTPServer(("127.0.0.1", 0), Impostor)
    context, key = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificates.new_key()
    show(context, own.certify_gate(key, time.time()) + certificates.key_pem(key))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with newcomer() as machine:
            done = machine.join(made | {"url": f"https://127.0.0.1:{server.server_port}"})
            assert done.returncode == 1, done.stderr
            told_why = "did not answer" if shows_the_authority else "is not the controller that made this token"
            assert told_why in done.stderr and Impostor.heard == []
            assert membership.find(machine.config) is None
            done = machine.join(made)
            assert done.returncode == 0, done.stderr
    finally:
        server.shutdown()
        server.server_close()


@root
def test_where_no_machine_can_join_that_is_said(cloud: Cloud) -> None:
    said = printed(cloud, "host", "token")
    assert said.returncode == 1 and "set join_listen in skysail.toml" in said.stderr
    with newcomer() as machine:
        done = machine.skysail("join", f"https://127.0.0.1:{free_port()}", "0" * 8 + "." + "0" * 64 + "." + "0" * 64)
        assert done.returncode == 1 and "nobody answers at" in done.stderr
        assert "no token" in machine.skysail("join", "https://127.0.0.1:1", "x").stderr
        done = machine.skysail("join", "http://127.0.0.1:1", "0" * 8 + "." + "0" * 64 + "." + "0" * 64)
        assert "is no address of a controller" in done.stderr


@root
def test_a_host_whose_certificate_ran_out_joins_again_as_itself(open_cloud: Cloud) -> None:
    cloud = open_cloud
    with newcomer() as machine:
        done = machine.join(told(cloud, "host", "token", "--host", "host-2"))
        assert done.returncode == 0, done.stderr
        # As if nobody had called it for as long as its certificate was good.
        cloud.kill("controller")
        assert machine.skysail("down").returncode == 0
        own, identity = membership.identity(machine.config), row(cloud, "host-2").address.split("@")[0].split("/")[-1]
        by, long_ago = authority(cloud), time.time() - cloud.config.certificate_seconds - DAY
        own.begin(identity, by.certify_host(identity, own.request(), long_ago), by.pem)
        assert machine.skysail("up").returncode == 0
        cloud.start("controller")
        log = cloud.folder / "controller.log"
        eventually(lambda: "certificate has expired" in log.read_text(), 60, "it is not spoken to")
        assert "this host is there already" not in log.read_text()
        taken = machine.join(told(cloud, "host", "token"), "--name", "host-2")
        assert taken.returncode == 1 and "there is a host host-2 already" in taken.stderr
        before = row(cloud, "host-2").address
        again = machine.join(told(cloud, "host", "token", "--host", "host-2"))
        assert again.returncode == 0, again.stderr
        eventually(lambda: told(cloud, "host", "show", "host-2")["state"] == "ready", 60)
        assert row(cloud, "host-2").address != before, "as another identity"


@root
def test_a_host_is_cordoned_drained_and_removed(open_cloud: Cloud) -> None:
    client = open_cloud.client()
    with newcomer() as machine:
        done = machine.join(told(open_cloud, "host", "token", "--host", "host-2", "--zone", "us-east-1b"))
        assert done.returncode == 0, done.stderr
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["memory_mib"], 60, "it reports")
        write(open_cloud, delete(host_zones).where(host_zones.c.host_id == "host-1", host_zones.c.zone == "b"))
        client.create_instances(instanceNames=["one"], availabilityZone="us-east-1b", blueprintId="debian_12",
                                bundleId="nano_3_0")
        eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "running", 60, "it runs")
        refused = printed(open_cloud, "host", "remove", "host-2")
        assert refused.returncode == 1 and "still holds instance one" in refused.stderr
        drained = printed(open_cloud, "host", "drain", "host-2")
        assert drained.returncode == 1 and "left: instance one (running)" in drained.stdout
        assert "one: stays on host-2: no host can take it in: host-1 does not serve the zone us-east-1b" in drained.stdout
        assert told(open_cloud, "host", "show", "host-2")["cordoned"]
        assert printed(open_cloud, "host", "uncordon", "host-2").returncode == 0
        assert not told(open_cloud, "host", "show", "host-2")["cordoned"]
        assert printed(open_cloud, "host", "cordon", "host-9").returncode == 1
        client.delete_instance(instanceName="one")
        eventually(lambda: printed(open_cloud, "host", "drain", "host-2").returncode == 0, 60, "nothing is left")
        assert printed(open_cloud, "host", "remove", "host-2").returncode == 0
        log = open_cloud.folder / "controller.log"
        eventually(lambda: "host host-2 is watched no more" in log.read_text(), 60, "it is called no more")
        assert [one["id"] for one in told(open_cloud, "host", "list")] == ["host-1"]


@root
def test_a_machine_that_was_removed_joins_anew_by_another_token(open_cloud: Cloud) -> None:
    """It still has a certificate, and the document of its former membership."""
    with newcomer() as machine:
        assert machine.join(told(open_cloud, "host", "token"), "--name", "host-2").returncode == 0
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["state"] == "ready", 60)
        former = row(open_cloud, "host-2").address
        assert printed(open_cloud, "host", "remove", "host-2").returncode == 0
        done = machine.join(told(open_cloud, "host", "token"), "--name", "host-2")
        assert done.returncode == 0, done.stderr
        assert "asking https://" in done.stderr and row(open_cloud, "host-2").address != former
        eventually(lambda: told(open_cloud, "host", "show", "host-2")["state"] == "ready", 60)


class Office:
    """The rows that machines are let in by, with time in our hands."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self.connection = connection
        self.authority = Authority.ensure(connection, Vault.at(folder / "key"), NOW, DAY)

    def token(self, **more: str) -> Token:
        return admission.make_token(self.connection, self.authority, NOW, 3600, **more)

    def ask(self, token: Token, /, *, now: float = NOW, key: certificates.Key | None = None,
            **more: Any) -> admission.Admission:
        request = certificates.pem(certificates.request(key or certificates.new_key())).decode()
        asked = {"token": token.id, "secret": token.secret, "name": "host-2", "zone": "", "address": "192.0.2.7",
                 "port": 8703, "request": request, "facts": FACTS} | more
        return admission.admit(self.connection, self.authority, Application(**asked), ("r1a", "r1b"), now)

    def refused(self, token: Token, /, **more: Any) -> str:
        before = [self.connection.execute(select(table)).all() for table in (hosts, host_zones, join_tokens)]
        with pytest.raises(Refused) as why:
            self.ask(token, **more)
        assert [self.connection.execute(select(table)).all() for table in (hosts, host_zones, join_tokens)] == before
        return why.value.what


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    database = stores.fresh(tmp_path)
    database.migrate()
    with database.transaction() as connection:
        yield Office(connection, tmp_path)
    database.close()


def test_a_token_lets_one_machine_in_once_within_its_time(office: Office) -> None:
    token, key = office.token(), certificates.new_key()
    assert office.refused(token, now=NOW + 3601) == "this token's time is over"
    assert office.refused(token, secret="0" * 64) == office.refused(token, token="0" * 8) == "this token is not known here"
    first = office.ask(token, key=key)
    assert (first.host, first.zones) == ("host-2", ("r1a",))
    assert office.refused(token, name="host-3") == "this token was used already"
    again = office.ask(token, key=key, address="2001:db8::7", now=NOW + 60)
    assert (again.host, again.identity) == (first.host, first.identity), "its answer was lost"
    (found,) = office.connection.execute(select(hosts)).all()
    assert found.address == f"https://{first.identity}@[2001:db8::7]:8703" and not found.name_server and not found.cordoned
    assert office.refused(token, key=key, now=NOW + 3601) == "this token's time is over"
    office.token()
    admission.make_token(office.connection, office.authority, NOW + 7200, 60)
    assert len(office.connection.execute(select(join_tokens)).all()) == 1, "those whose time is over are forgotten"


def test_the_others_learn_of_a_host_that_joins(office: Office) -> None:
    """Their networks span it from then on: its facts came with it, and are no news when it tells them once more."""
    def generations() -> dict[str, int]:
        return {row.id: row.generation for row in office.connection.execute(select(hosts))}

    office.ask(office.token(), facts=msgspec.structs.replace(FACTS, underlay="192.0.2.7"))
    before = generations()
    office.ask(office.token(), name="host-3", facts=msgspec.structs.replace(FACTS, underlay="192.0.2.8"))
    assert generations()["host-2"] > before["host-2"]
    joined = generations()
    office.ask(office.token(), name="host-4", facts=msgspec.structs.replace(FACTS, underlay=""))
    assert generations() == joined | {"host-4": generations()["host-4"]}, "it has no underlay, or one that nobody reaches"
    office.ask(office.token(host="host-3"), facts=msgspec.structs.replace(FACTS, underlay="192.0.2.9"))
    assert generations()["host-2"] > joined["host-2"], "another machine is that host now"


def test_name_and_zone_are_the_operators_before_the_machines(office: Office) -> None:
    for name in ("", "Host", "a.b", "-a", "a" * 64, "a\n"):
        assert "is no name for a host" in office.refused(office.token(), name=name)
    with pytest.raises(SkysailError, match="is no name"):
        office.token(host="A")
    assert office.ask(office.token(host="host-7"), name="mine").host == "host-7"
    assert "there is a host host-7 already" in office.refused(office.token(), name="host-7")
    bound = office.token(zone="r1b")
    assert "this token is for the zone r1b" in office.refused(bound, zone="r1a")
    assert office.ask(bound, name="host-8").zones == ("r1b",)
    assert office.ask(office.token(), name="host-9", zone="r1b").zones == ("r1b",)
    for place in ("", "192.0.2.7/x", "a@b", "192.0.2.7:1", "h x", "10.0.0.256", "10.0.0", "web.7", "::1%]", "fe80::1%eth0"):
        assert "is no address" in office.refused(office.token(), name="host-10", address=place)
    assert "this cloud has no zone r9z" in office.refused(office.token(), name="host-10", zone="r9z")


def test_a_machine_that_takes_a_hosts_place_is_another_one(office: Office) -> None:
    first = office.ask(office.token())
    office.connection.execute(update(hosts).values(generation=7, cordoned=True))
    second = office.ask(office.token(host="host-2"), zone="r1b", address="192.0.2.8")
    (found,) = office.connection.execute(select(hosts)).all()
    assert second.identity != first.identity and second.zones == ("r1a",), "it serves what the host did"
    assert found.address == f"https://{second.identity}@192.0.2.8:8703" and found.generation == 7 and found.cordoned


def test_a_token_does_not_outlive_the_place_that_it_led_to(office: Office) -> None:
    key, token = certificates.new_key(), office.token()
    first = office.ask(token, key=key)
    assert office.ask(token, key=key).identity == first.identity
    bound, others = office.token(host="host-2"), certificates.new_key()
    second = office.ask(bound, key=others)
    assert office.refused(token, key=key) == "this token is not known here", "it would get its successor's identity"
    assert office.ask(bound, key=others).identity == second.identity
    roster.remove(office.connection, "host-2")
    third = office.token()
    office.ask(third)
    assert office.refused(bound, key=others) == "this token is not known here"


def test_who_speaks_another_contract_or_asks_nonsense_is_refused(office: Office) -> None:
    token = office.token()
    foreign = msgspec.structs.replace(FACTS, contract=contract.VERSION + 2)
    assert f"speaks version {contract.VERSION + 2} of the contract" in office.refused(token, facts=foreign)
    assert "no request for a certificate" in office.refused(token, request="x")
    assert office.ask(token).host == "host-2"
    for text in ("", "a.b.c", f"{token} x", str(token).upper()):
        with pytest.raises(SkysailError, match="no token"):
            Token.parse(text)
    assert Token.parse(f" {token}\n") == token
