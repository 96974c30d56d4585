"""Operations on a real database, without processes: each step repeated, each step failed, each operation resumed.

The desk is a controller's rows, actions and engine; a test plays the host by handing in its reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, RowMapping, insert, select, update

import stores
from skysail.contract.report import GuestReport, GuestState, HostReport, ImageReport
from skysail.hosts import desired
from skysail.hosts.client import AgentClient
from skysail.hosts.watch import Watch, write_report
from skysail.kit.clock import HandClock
from skysail.kit.config import load
from skysail.kit.errors import ApiError
from skysail.operations import history
from skysail.operations.engine import Engine
from skysail.operations.workflow import Step, StepFailed, Workflow
from skysail.resources import lifecycle
from skysail.resources.request import Request
from skysail.serve.controller import HOST, action_table, admin_credentials, initialise
from skysail.store.database import Database
from skysail.store.leases import alone
from skysail.store.schema import (
    guests,
    host_zones,
    hosts,
    images,
    instances,
    metadata,
    names,
    operations,
    ports,
    tags,
)
from skysail.store.vault import Vault

IMAGE = ImageReport(digest="0" * 64, blueprint="debian_12", name="Debian 12", user="admin", version="12", size_gib=2,
                    templated=True)


class Desk:
    """A controller without its processes."""

    def __init__(self, folder: Path) -> None:
        (folder / "skysail.toml").write_text(stores.setting() + 'engines = "sim"\n')
        self.config = config = load(str(folder))
        self.clock = HandClock()
        initialise(config, self.clock)
        self.account = admin_credentials(config, self.clock)["account_id"]
        self.database = Database.of(config)
        self.vault = Vault.at(config.master_key)
        self.actions = action_table(config, self.clock, self.vault)
        self.workflows: dict[str, Workflow] = dict(lifecycle.WORKFLOWS)
        self.seen: dict[str, GuestReport] = {}
        self.report()

    def ask(self, action: str, **params: Any) -> str:
        """Carry out one action; the id of its operation."""
        with self.database.transaction() as connection:
            answer = self.actions[action](connection, self.request(action, params))
        operations = answer["operations"] if "operations" in answer else [answer["operation"]]
        return str(operations[0]["id"])

    def request(self, action: str, params: dict[str, Any]) -> Request:
        return Request(account_id=self.account, region="us-east-1", action=action, params=params)

    def create(self, name: str = "one") -> str:
        return self.ask("CreateInstances", instanceNames=[name], availabilityZone="us-east-1a", blueprintId="debian_12",
                        bundleId="nano_3_0", tags=[{"key": "stage", "value": "test"}])

    def report(self, **states: GuestState) -> None:
        """The host reports: each named instance's guest in this state, having done all that its document asks for."""
        with self.database.transaction() as connection:
            document = desired.compile(connection, HOST, self.vault)
            for guest in document.guests:
                if guest.instance in states:
                    self.seen[guest.id] = GuestReport(id=guest.id, state=states[guest.instance], starts=guest.starts,
                                                      reboots=guest.reboots, reason="as the test says")
            write_report(connection, HOST, HostReport(
                host=HOST, boot="b", sequence=1, generation=document.generation, vcpus=4096, memory_mib=1 << 20, disk_gib=999,
                accelerator="sim", guests=tuple(self.seen.values()), images=(IMAGE,)), self.clock.now())

    def drive(self) -> int:
        """One pass of an engine that knows nothing but the rows, as after a restart."""
        return Engine(self.database, self.workflows, self.clock).drive()

    def follow(self) -> int:
        with self.database.transaction() as connection:
            return lifecycle.follow(connection, self.clock.now())

    def rows(self, table: Any) -> list[dict[str, Any]]:
        with self.database.transaction(write=False) as connection:
            return [dict(row) for row in connection.execute(select(table)).mappings()]

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        return {name: self.rows(table) for name, table in metadata.tables.items()}

    def operation(self, identifier: str) -> dict[str, Any]:
        return next(row for row in self.rows(operations) if row["id"] == identifier)

    def state(self, name: str = "one") -> str:
        return str(next(row["state"] for row in self.rows(instances) if row["name"] == name))

    def taken(self) -> set[str]:
        """Names that instances have."""
        return {row["name"] for row in self.rows(names) if row["resource_type"] == "Instance"}

    def running(self) -> None:
        self.create()
        self.report(one="running")
        self.drive()
        assert self.state() == "running"

    def stopped(self) -> None:
        self.running()
        self.ask("StopInstance", instanceName="one")
        self.report(one="stopped")
        self.drive()
        assert self.state() == "stopped"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.database.close()


def nothing(desk: Desk) -> None:
    """It is the other end of every test below."""


# Workflow, how to get there, the request, what the host then reports, and the state that follows (none: it is gone).
WORK: list[tuple[str, Callable[[Desk], None], tuple[str, dict[str, Any]], GuestState, str]] = [
    ("create", nothing, ("CreateInstances", {}), "running", "running"),
    ("start", Desk.stopped, ("StartInstance", {"instanceName": "one"}), "running", "running"),
    ("stop", Desk.running, ("StopInstance", {"instanceName": "one"}), "stopped", "stopped"),
    ("reboot", Desk.running, ("RebootInstance", {"instanceName": "one"}), "running", "running"),
    ("delete", Desk.running, ("DeleteInstance", {"instanceName": "one"}), "gone", ""),
]


def begun(desk: Desk, prepare: Callable[[Desk], None], request: tuple[str, dict[str, Any]]) -> str:
    prepare(desk)
    action, params = request
    return desk.create() if action == "CreateInstances" else desk.ask(action, **params)


def test_every_workflow_is_tested_here() -> None:
    assert {work[0] for work in WORK} == set(lifecycle.WORKFLOWS)


@pytest.mark.parametrize(("workflow", "prepare", "request_", "seen", "state"), WORK, ids=lambda value: str(value)[:10])
def test_a_repeated_step_changes_nothing(desk: Desk, workflow: str, prepare: Callable[[Desk], None],
                                         request_: tuple[str, dict[str, Any]], seen: GuestState, state: str) -> None:
    identifier = begun(desk, prepare, request_)
    waiting = desk.everything()
    assert desk.drive() == 0 and desk.everything() == waiting, "it waits for the host"
    desk.report(one=seen)
    operation = desk.operation(identifier)
    for step in lifecycle.WORKFLOWS[workflow].steps:
        once: dict[str, Any] = {}
        for _ in range(3):
            with desk.database.transaction() as connection:
                assert step.do(connection, operation, desk.clock.now())  # type: ignore[arg-type]
            once = once or desk.everything()
            assert desk.everything() == once
    desk.drive()
    done = desk.everything()
    assert desk.operation(identifier)["done"] and desk.operation(identifier)["status"] == "Succeeded"
    assert desk.drive() == 0 and desk.follow() == 0 and desk.everything() == done
    assert [row["state"] for row in desk.rows(instances)] == ([state] if state else [])
    assert bool(desk.rows(guests)) == bool(state)


@pytest.mark.parametrize(("workflow", "prepare", "request_", "seen", "state"), WORK, ids=lambda value: str(value)[:10])
def test_a_failed_step_unwinds(desk: Desk, workflow: str, prepare: Callable[[Desk], None],
                               request_: tuple[str, dict[str, Any]], seen: GuestState, state: str) -> None:
    for failing in range(len(lifecycle.WORKFLOWS[workflow].steps)):
        steps = list(lifecycle.WORKFLOWS[workflow].steps)

        def fail(connection: Connection, operation: RowMapping, now: float,
                 do: Callable[..., bool] = steps[failing].do) -> bool:
            do(connection, operation, now)  # what it wrote before it failed is rolled back
            raise StepFailed("Broken", "the test broke it")

        steps[failing] = dataclasses.replace(steps[failing], do=fail)
        desk.workflows[workflow] = Workflow(workflow, tuple(steps))
        identifier = begun(desk, prepare, request_)
        customer_was_told = desk.operation(identifier)["status"]
        desk.report(one=seen)
        desk.drive()
        ended = desk.operation(identifier)
        assert ended["done"]
        # A status that the customer has been given as final stays.
        assert ended["status"] == (customer_was_told if customer_was_told == "Succeeded" else "Failed")
    if workflow == "create":
        for table in (instances, ports, tags):
            assert not desk.rows(table), table
        assert desk.taken() == set()
        (guest,) = desk.rows(guests)
        assert guest["role"] == "gone"
        desk.report(one="gone")
        desk.follow()
        assert not desk.rows(guests)
    if workflow == "start":
        (guest,) = desk.rows(guests)
        assert guest["role"] == "stop" and desk.state() == "stopped"


@pytest.mark.parametrize("failing", range(4))
def test_steps_are_undone_in_the_opposite_order(desk: Desk, failing: int) -> None:
    """Four steps that each write a row; the one that fails, and all before it, take theirs back."""
    undone = []

    def step(number: int) -> Step:
        def do(connection: Connection, operation: RowMapping, now: float) -> bool:
            connection.execute(insert(tags).values(resource_id="test", key=str(number), value=None))
            if number == failing:
                raise StepFailed("Broken", "the test broke it")
            return True

        def undo(connection: Connection, operation: RowMapping, now: float) -> None:
            undone.append(number)
            connection.execute(tags.delete().where(tags.c.key == str(number)))
        return Step(f"step {number}", do, undo)

    desk.workflows["four"] = Workflow("four", tuple(step(number) for number in range(4)))
    with desk.database.transaction() as connection:
        history.record(connection, Request(desk.account, "us-east-1", "", {}), now=1.0, type="Four", resource_name="x",
                       resource_type="Instance", resource_id="x", status="Started", workflow="four")
    engine = Engine(desk.database, desk.workflows, desk.clock)
    (identifier,) = [row["id"] for row in desk.rows(operations)]
    # One transaction at a time, each by an engine that has just been started.
    while engine._advance(identifier, alone) == "on":
        engine = Engine(desk.database, desk.workflows, desk.clock)
    assert undone == list(range(failing, -1, -1)) and not desk.rows(tags)
    ended = desk.operation(identifier)
    assert (ended["status"], ended["error_code"], ended["done"]) == ("Failed", "Broken", True)


def test_one_operation_that_cannot_go_on_does_not_hold_up_the_others(desk: Desk) -> None:
    with desk.database.transaction() as connection:
        history.record(connection, Request(desk.account, "us-east-1", "", {}), now=1.0, type="Unknown", resource_name="x",
                       resource_type="Instance", resource_id="x", status="Started", workflow="from a later version")
    desk.running()


def test_a_launch_that_fails_says_why_and_leaves_nothing(desk: Desk) -> None:
    identifier = desk.create()
    desk.report(one="failed")
    desk.drive()
    ended = desk.operation(identifier)
    assert (ended["status"], ended["error_details"]) == ("Failed", "as the test says")
    assert not desk.rows(instances) and not desk.taken()
    again = desk.create()
    desk.report(one="gone")  # the first one's guest: the second has not been looked at
    assert {row["role"] for row in desk.rows(guests)} == {"gone", "run"}
    assert not desk.operation(again)["done"]


@pytest.mark.parametrize("request_", ["create", "StartInstance", "RebootInstance"])
def test_a_guest_that_powers_itself_off_meanwhile_ends_the_operation(desk: Desk, request_: str) -> None:
    if request_ == "create":
        identifier = desk.create()
    else:
        (desk.stopped if request_ == "StartInstance" else desk.running)()
        identifier = desk.ask(request_, instanceName="one")
    desk.report(one="halted")
    desk.drive()
    assert desk.operation(identifier)["done"] and desk.operation(identifier)["status"] == "Succeeded"
    desk.follow()
    assert desk.state() == "stopped" and desk.rows(guests)[0]["role"] == "stop"


def test_a_stop_does_not_take_an_older_report_for_its_own(desk: Desk) -> None:
    desk.stopped()
    desk.ask("StartInstance", instanceName="one")
    stop = desk.ask("StopInstance", instanceName="one", force=True)
    desk.drive()
    assert not desk.operation(stop)["done"] and desk.state() == "stopping", "the host may be starting it at this moment"
    desk.report(one="stopped")
    desk.drive()
    assert desk.operation(stop)["done"] and desk.state() == "stopped"
    assert all(row["done"] for row in desk.rows(operations))


def test_an_instance_follows_its_guest(desk: Desk) -> None:
    desk.running()
    for seen, state in (("crashed", "pending"), ("running", "running"), ("crashed", "pending"), ("halted", "stopped")):
        desk.report(one=seen)  # type: ignore[arg-type]
        desk.follow()
        assert desk.state() == state


def test_one_hosts_large_image_keeps_nobody_from_its_blueprint(desk: Desk) -> None:
    """What it says of itself decides nothing elsewhere; where all are too large, it is said how much is needed."""
    with desk.database.transaction() as connection:
        connection.execute(insert(hosts).values(id="host-2", address="nowhere:"))
        connection.execute(insert(host_zones).values(host_id="host-2", region="us-east-1", zone="a"))
        connection.execute(insert(images).values(host_id="host-2", digest="1" * 64, blueprint=IMAGE.blueprint, name="",
                                                 user="", version="zzz", size_gib=9999))
    desk.running()
    with desk.database.transaction() as connection:
        connection.execute(update(images).values(size_gib=9999))
    with pytest.raises(ApiError, match="needs a disk of 9999 GB"):
        desk.create("two")


def test_a_database_that_is_behind_its_host_moves_past_it_but_not_to_the_last_number(desk: Desk) -> None:
    def overtaken(claims: int) -> int:
        with desk.database.transaction() as connection:
            connection.execute(update(hosts).values(generation=5, observed_generation=claims))
        Watch(HOST, AgentClient("unix:/nowhere"), desk.database, desk.clock, desk.vault, lambda told: None)._overtake()
        return int(desk.rows(hosts)[0]["generation"])

    assert overtaken(70) == 71
    assert 5 < overtaken(2**62) < 2**40
