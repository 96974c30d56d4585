"""Several controllers on one PostgreSQL, killed and stopped at random under load: nothing is done twice, nothing is left."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy import insert

import stores
from clouds import Cloud, eventually
from skysail.hosts import fleet
from skysail.inspect.verify import verify
from skysail.operations import engine
from skysail.serve import membership
from skysail.serve.membership import Membership
from skysail.store.schema import host_zones, hosts

# What committed steps there were, by the database's own word: whose, under which lock, in place of which one.
STEP_LOG = """
CREATE TABLE step_log (number BIGSERIAL, operation TEXT, was TEXT, is_now TEXT, who TEXT, alone BOOLEAN);
CREATE FUNCTION log_step() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO step_log (operation, was, is_now, who, alone) VALUES (new.id,
        concat_ws(' ', old.step, old.unwinding, old.done), concat_ws(' ', new.step, new.unwinding, new.done),
        current_setting('application_name'),
        EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()));
    RETURN new;
END $$;
CREATE TRIGGER log_step AFTER UPDATE ON operations FOR EACH ROW
    WHEN ((old.step, old.unwinding, old.done) IS DISTINCT FROM (new.step, new.unwinding, new.done))
    EXECUTE FUNCTION log_step();
"""

# All there is to do: a lease for each part of the hosts and of the operations, for each of five rounds, and the courier's.
WORK = len(fleet.PARTS) + len(engine.PARTS) + 5 + 1


class Controllers:
    """``count`` controllers, and as many simulated hosts that belong to no controller in particular."""

    def __init__(self, count: int) -> None:
        url = stores.server().create()
        self.all = [Cloud(Path(tempfile.mkdtemp(prefix="sky")), f'database = "{url}"\nengines = "sim"\nsample_seconds = 1\n'
                                                                'public_pool = "198.18.0.0/20"\n') for _ in range(count)]
        self.first = self.all[0]

    def start(self) -> None:
        for number, one in enumerate(self.all, 1):
            membership.keep(one.config, Membership(host=f"host-{number}", address="127.0.0.1", port=0))
            one.start("agent")
        self.first.start("controller")
        with stores.transaction(self.first.config) as connection:
            for number, one in enumerate(self.all[1:], 2):
                connection.execute(insert(hosts).values(id=f"host-{number}", address=f"unix:{one.config.agent_socket}"))
                for zone in "ab":
                    connection.execute(insert(host_zones).values(host_id=f"host-{number}", region="us-east-1", zone=zone))
            connection.exec_driver_sql(STEP_LOG)
        for one in self.all[1:]:
            (one.folder / "controller").mkdir(mode=0o700)
            shutil.copy(self.first.config.master_key, one.config.master_key)
            shutil.copy(self.first.folder / "credentials.json", one.folder / "credentials.json")
            one.start("controller")

    def rows(self, query: str) -> list[dict[str, Any]]:
        return stores.rows(self.first.config, query)

    def leases(self) -> dict[str, tuple[str, int]]:
        """The place and the number of each piece of work."""
        return {row["name"]: (row["place"], row["number"]) for row in self.rows(
            "SELECT name, place, number FROM leases JOIN controllers ON controllers.id = leases.holder "
            "WHERE until > extract(epoch FROM now())")}

    def place(self, one: Cloud) -> str:
        return next(place for place, _ in self.leases().values() if place.endswith(f":{one.folder}"))

    def shared_out(self) -> bool:
        """Every controller has a part of the work, and all of it is done."""
        found = self.leases()
        return len({place for place, _ in found.values()}) == len(self.all) and len(found) == WORK

    def close(self) -> None:
        for one in self.all:
            for process in one.processes.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
            one.stop()
            shutil.rmtree(one.folder, ignore_errors=True)


@pytest.fixture
def controllers() -> Iterator[Controllers]:
    made = Controllers(3)
    try:
        made.start()
        eventually(made.shared_out, 180, "the work is shared out")
        eventually(lambda: len(made.rows("SELECT 1 FROM images")) == 3, 180, "all hosts have reported")
        yield made
    finally:
        made.close()


def launch(cloud: Cloud, *names: str) -> None:
    cloud.client().create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId="debian_12",
                                    bundleId="nano_3_0")


def states(cloud: Cloud) -> dict[str, str]:
    return {one["name"]: one["state"]["name"] for one in cloud.client().get_instances()["instances"]}


def test_each_of_them_answers_and_all_see_the_same(controllers: Controllers) -> None:
    for number, one in enumerate(controllers.all):
        launch(one, f"i-{number}")
    for one in controllers.all:
        eventually(lambda one=one: states(one) == dict.fromkeys(("i-0", "i-1", "i-2"), "running"), 180)  # type: ignore[misc]
    assert {row["host_id"] for row in controllers.rows("SELECT host_id FROM guests")} == {"host-1", "host-2", "host-3"}
    assert len({row["who"] for row in controllers.rows("SELECT who FROM step_log")}) >= 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_others_carry_on(controllers: Controllers, how: signal.Signals) -> None:
    gone, *others = controllers.all
    place = controllers.place(gone)
    before = controllers.leases()
    gone.processes["controller"].send_signal(how)
    launch(others[0], "after")
    eventually(lambda: states(others[1]) == {"after": "running"}, 180, "the other two launch")

    def taken_over() -> dict[str, tuple[str, int]] | None:
        found = controllers.leases()
        return found if found.keys() == before.keys() and place not in {held for held, _ in found.values()} else None

    taken = eventually(taken_over, 180, "its work is taken over")
    for name, (holder, number) in before.items():
        assert holder != place or taken[name][1] > number, "a lease that changed hands has another number"

    if how is signal.SIGSTOP:
        gone.processes["controller"].send_signal(signal.SIGCONT)
    else:
        gone.start("controller")
    eventually(controllers.shared_out, 180, "it has a part again")
    launch(gone, "back")
    eventually(lambda: states(gone) == {"after": "running", "back": "running"}, 180)


class Customer:
    """Asks whichever controller, as often as it gets answers; what fails was not to be."""

    def __init__(self, controllers: Controllers, name: str, seed: int) -> None:
        self.controllers = controllers
        self.name = name
        self.random = random.Random(seed)
        self.answered = 0
        self.clients = [one.client() for one in controllers.all]

    def work(self, until: threading.Event) -> None:
        number = 0
        while not until.is_set():
            number += 1
            names = [f"{self.name}-{number}-{letter}" for letter in "abc"[:self.random.randint(1, 3)]]
            self.ask("create_instances", instanceNames=names, availabilityZone="us-east-1a", blueprintId="debian_12",
                     bundleId="nano_3_0")
            self.ask("allocate_static_ip", staticIpName=f"{names[0]}-ip")
            self.ask("attach_static_ip", staticIpName=f"{names[0]}-ip", instanceName=names[0])
            self.ask("create_disk", diskName=f"{names[0]}-disk", availabilityZone="us-east-1a", sizeInGb=8)
            for name in names:
                until.wait(self.random.random())
                self.ask(self.random.choice(("stop_instance", "reboot_instance", "delete_instance")), instanceName=name)
                self.ask("start_instance", instanceName=name)
            if self.random.random() < 0.5:
                self.ask("release_static_ip", staticIpName=f"{names[0]}-ip")
                self.ask("delete_disk", diskName=f"{names[0]}-disk")
                self.ask("delete_instance", instanceName=names[-1])

    def ask(self, action: str, **params: Any) -> None:
        with contextlib.suppress(ClientError, BotoCoreError):
            getattr(self.random.choice(self.clients), action)(**params)
            self.answered += 1


def torment(controllers: Controllers, pairs: int, seed: int) -> None:
    """So many times one is killed, and as many times one stands still, for longer than it is taken to live or for less."""
    chance = random.Random(seed)
    for how in chance.sample((signal.SIGKILL, signal.SIGSTOP), 2 * pairs, counts=(pairs, pairs)):
        time.sleep(chance.uniform(0.5, 3))
        victim = chance.choice(controllers.all)
        if how is signal.SIGKILL:
            victim.kill("controller")
            time.sleep(chance.uniform(0, 7))
            victim.start("controller")
        else:
            victim.processes["controller"].send_signal(signal.SIGSTOP)
            time.sleep(chance.choice((0.5, 3, 9)))
            victim.processes["controller"].send_signal(signal.SIGCONT)


@pytest.mark.timeout(3600)
def test_a_history_with_kills_at_random_is_whole(controllers: Controllers, request: pytest.FixtureRequest) -> None:
    pairs = 40 if request.config.getoption("--long") else 3
    seed, began = random.randrange(1 << 32), time.monotonic()
    print("seed", seed)
    ended = threading.Event()
    customers = [Customer(controllers, f"c{number}", seed + number) for number in range(4)]
    threads = [threading.Thread(target=one.work, args=[ended]) for one in customers]
    for thread in threads:
        thread.start()
    try:
        torment(controllers, pairs, seed)
        eventually(lambda: all(one.answered > 2 * pairs for one in customers), 120, "each customer was answered")
    finally:
        ended.set()
        for thread in threads:
            thread.join()

    eventually(controllers.shared_out, 180, "all three live")
    eventually(lambda: not controllers.rows("SELECT id FROM operations WHERE NOT done"), 300, "every operation ended")
    eventually(lambda: not controllers.rows("SELECT id FROM guests WHERE role = 'gone'"), 180, "what goes is gone")
    history(controllers)
    eventually(lambda: world(controllers) == [], 180, f"hosts hold what the rows say: {world(controllers)}")
    assert verify(controllers.first.config, 1.0) == []
    print(f"{time.monotonic() - began:.0f} s: {pairs} killed, {pairs} stopped, "
          f"{sum(one.answered for one in customers)} answers, "
          f"{len(controllers.rows('SELECT id FROM operations'))} operations, "
          f"{len(controllers.rows('SELECT 1 FROM step_log'))} steps by "
          f"{len(controllers.rows('SELECT DISTINCT who FROM step_log'))} processes, "
          f"leases changed hands {sum(number - 1 for _, number in controllers.leases().values())} times")


def history(controllers: Controllers) -> None:
    """Each operation went from step to step, each of which was committed once, by somebody who wrote alone."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in controllers.rows("SELECT * FROM step_log ORDER BY number"):
        assert row["alone"], row
        steps.setdefault(row["operation"], []).append(row)
    driven = {row["id"]: row for row in controllers.rows("SELECT id, status, workflow FROM operations WHERE workflow != ''")}
    assert steps.keys() == driven.keys(), "who has a workflow was carried on, and nobody else"
    for operation, taken in steps.items():
        assert taken[0]["was"] == "0 f f", taken
        for one, following in itertools.pairwise(taken):
            assert following["was"] == one["is_now"], f"{operation} was at two steps at once, or at one twice: {taken}"
        assert taken[-1]["is_now"].endswith(" t"), taken
        assert driven[operation]["status"] in ("Succeeded", "Failed", "Completed"), driven[operation]
    assert len({row["who"] for taken in steps.values() for row in taken}) > 1, "more than one controller drove them"


def world(controllers: Controllers) -> list[str]:
    """What is wrong with what the hosts really hold."""
    found, running, holders = [], Counter[str](), Counter[str]()
    for one in controllers.all:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(one.config.agent_socket)), timeout=30) as http:
            there, document = http.get("http://agent/inventory").json(), http.get("http://agent/document").json()
        running.update(there["running"])
        for guest in document["guests"]:
            port = guest["port"]
            holders.update(filter(None, (port.get(name) for name in ("private_ipv4", "public_ipv4", "public_ipv6", "mac"))))
    wanted = {row["guest"]: row for row in controllers.rows(
        "SELECT guests.id AS guest, instances.name, instances.state FROM instances "
        "LEFT JOIN guests ON guests.instance_id = instances.id")}
    for guest, row in wanted.items():
        if running[guest] != (row["state"] == "running"):
            found.append(f"{row['name']} is {row['state']}, {running[guest]} guests of it run")
    found += [f"guest {guest} of nobody runs" for guest in running.keys() - wanted.keys()]
    found += [f"{address} is given {times} times" for address, times in holders.items() if times > 1]
    return found
