"""The controller follows the rows of its hosts: who appears is watched, who goes is left, without a restart."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from clouds import Cloud, eventually
from skysail.serve import membership
from skysail.serve.membership import Membership
from skysail.store.database import Database
from skysail.store.schema import guests, host_zones, hosts


class Listener:
    """A socket where an agent might be: takes connections, and says nothing."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.taken = 0
        self.held: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.held.append(self._listener.accept()[0])
                self.taken += 1

    def hang_up(self) -> None:
        """End what was taken, as an agent that restarts does: whoever still wants it comes again."""
        while self.held:
            one = self.held.pop()
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()


class Relay(Listener):
    """Stands before a real agent, and counts the documents that it is sent."""

    def __init__(self, path: Path, agent: Path) -> None:
        self.agent = agent
        self.documents = 0
        super().__init__(path)

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                self.held += [near, far]
                try:
                    far.connect(str(self.agent))
                except OSError:
                    near.close()
                    continue
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=[source, target, source is near], daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                self.documents += down and data.startswith(b"PUT /document ")
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[Listener]:
    made = Listener(path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def second() -> Iterator[Cloud]:
    """Another simulated host: an agent over a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    made = Cloud(folder)
    membership.keep(made.config, Membership(host="host-2", address="127.0.0.1", port=0))
    try:
        made.start("agent")
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def write(cloud: Cloud, *statements: Any) -> None:
    database = Database.of(cloud.config)
    try:
        with database.transaction() as connection:
            for statement in statements:
                connection.execute(statement)
    finally:
        database.close()


def row(cloud: Cloud, host: str) -> Any:
    database = Database.of(cloud.config)
    try:
        with database.transaction(write=False) as connection:
            return connection.execute(select(hosts).where(hosts.c.id == host)).one()
    finally:
        database.close()


def test_a_host_that_appears_is_given_instances_without_a_restart(cloud: Cloud, second: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30, "a blueprint")
    write(cloud, insert(hosts).values(id="host-2", address=f"unix:{second.config.agent_socket}"),
          insert(host_zones).values(host_id="host-2", region="us-east-1", zone="b"),
          delete(host_zones).where(host_zones.c.host_id == "host-1", host_zones.c.zone == "b"))
    eventually(lambda: row(cloud, "host-2").vcpus, 30, "the second host reports")
    client.create_instances(instanceNames=["there"], availabilityZone="us-east-1b", blueprintId="debian_12",
                            bundleId="nano_3_0")
    eventually(lambda: client.get_instance_state(instanceName="there")["state"]["name"] == "running", 60, "it runs")
    database = Database.of(cloud.config)
    with database.transaction(write=False) as connection:
        assert connection.execute(select(guests.c.host_id, guests.c.observed_state)).all() == [("host-2", "running")]
    database.close()


def test_a_host_that_goes_is_left(cloud: Cloud, tmp_path: Path) -> None:
    with listening(tmp_path / "a") as first, listening(tmp_path / "b") as other:
        write(cloud, insert(hosts).values(id="host-2", address=first.address))
        eventually(lambda: first.taken, 30, "it is talked to")
        first.hang_up()
        eventually(lambda: first.held, 30, "it is talked to again after it broke off")

        write(cloud, update(hosts).where(hosts.c.id == "host-2").values(address=other.address))
        eventually(lambda: other.taken, 30, "it is talked to where it is now")
        first.hang_up()
        taken = first.taken
        time.sleep(2)
        assert first.taken == taken, "nobody comes to where it was"

        write(cloud, delete(hosts).where(hosts.c.id == "host-2"))
        eventually(lambda: "host host-2 is watched no more" in cloud.log("controller").split(other.address)[-1], 30)
        other.hang_up()
        taken = other.taken
        time.sleep(2)
        assert other.taken == taken, "nobody comes to one that went"
    assert row(cloud, "host-1").seen_at, "the others are watched as before"


def test_a_document_goes_out_when_it_changed_and_when_the_host_may_have_lost_it(cloud: Cloud, second: Cloud,
                                                                                 tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay", second.config.agent_socket)
    try:
        write(cloud, insert(hosts).values(id="host-2", address=relay.address))

        def holds() -> bool:
            found = row(cloud, "host-2")
            return bool(found.seen_at) and found.observed_generation == found.generation > 0
        write(cloud, update(hosts).where(hosts.c.id == "host-2").values(generation=7))
        eventually(holds, 60, "it has its document")
        settled(relay)
        sent = relay.documents
        time.sleep(7)
        assert relay.documents == sent, "nothing changed"

        write(cloud, update(hosts).where(hosts.c.id == "host-2").values(generation=8))
        eventually(lambda: relay.documents > sent, 60, "it changed")
        settled(relay)

        second.kill("agent")
        (second.folder / "agent/document.json").unlink()
        sent = relay.documents
        second.start("agent")
        eventually(lambda: relay.documents > sent and holds(), 60, "it has its document again, though that did not change")

        write(cloud, update(hosts).where(hosts.c.id == "host-2").values(generation=3))
        eventually(lambda: row(cloud, "host-2").generation > 8 and holds(), 60, "rows of an older day move on")
    finally:
        relay.close()


def settled(relay: Relay) -> None:
    """Wait until no document has gone out for a while."""
    last, at = relay.documents, time.monotonic()
    while time.monotonic() < at + 2:
        if relay.documents != last:
            last, at = relay.documents, time.monotonic()
        time.sleep(0.1)
