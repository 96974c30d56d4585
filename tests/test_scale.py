"""What a controller of many hosts and instances does without reading all of them, and does no worse for it."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as SqlEngine
from sqlalchemy import event, insert, select, update

import stores
from skysail.hosts.fleet import PARTS, lease_name
from skysail.hosts.placement import NAMED, Need, NoHost
from skysail.kit.config import Config
from skysail.kit.errors import ApiError
from skysail.operations import history
from skysail.operations.engine import Engine
from skysail.operations.workflow import Step, Workflow
from skysail.resources import addresses, lifecycle, placing
from skysail.resources.request import Request
from skysail.store.database import Database
from skysail.store.look import WouldWrite, look
from skysail.store.schema import accounts, guests, host_zones, hosts, images, instances, operations

NEED = Need(zone="us-east-1a", blueprint="debian_12", vcpus=2, memory_mib=512, disk_gib=20)
NETWORK = "10.9.0.0/25"


class Clock:
    def now(self) -> float:
        return 100.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = stores.fresh(tmp_path)
    made.migrate()
    with made.transaction() as connection:
        connection.execute(insert(accounts).values(id="1", name="a", created_at=0.0))
    yield made
    made.close()


def fleet(database: Database, count: int, **of_last: Any) -> None:
    """So many hosts of one zone, the last of which is otherwise."""
    with database.transaction() as connection:
        for number in range(count):
            of_this = of_last if number == count - 1 else {}
            connection.execute(insert(hosts).values(id=f"h{number:03}", address="", **{
                "vcpus": 8, "memory_mib": 8192, "disk_gib": 400, "cordoned": True, **of_this}))
            connection.execute(insert(host_zones).values(host_id=f"h{number:03}", region="us-east-1", zone="a"))
            connection.execute(insert(images).values(
                host_id=f"h{number:03}", digest="0", blueprint="debian_12", name="Debian", user="admin", version="12",
                size_gib=2))


def guest(number: int, host: str, **more: Any) -> dict[str, Any]:
    address = str(ipaddress.IPv4Network(NETWORK)[10 + number])
    return {"id": f"g{number}", "instance_id": f"i{number}", "instance_name": f"n{number}", "account_id": "1",
            "host_id": host, "role": "run", "vcpus": 1, "memory_mib": 512, "disk_gib": 20, "image": "0", "mac": f"m{number}",
            "private_ipv4": address, "personality": {}, **more}


def test_a_host_is_found_among_many_however_few_fit(database: Database) -> None:
    fleet(database, 3 * placing.LOOKED_AT, cordoned=False)
    with database.transaction(write=False) as connection:
        for _ in range(10):
            assert placing.choose(connection, Config(), "1", 100.0, NEED) == [f"h{3 * placing.LOOKED_AT - 1:03}"]
        with pytest.raises(NoHost, match=f"and {3 * placing.LOOKED_AT - NAMED} other hosts neither"):
            placing.choose(connection, Config(), "1", 100.0, Need(
                zone="us-east-1a", blueprint="debian_12", vcpus=99, memory_mib=512, disk_gib=20))


def test_several_at_once_are_spread_and_fit_together(database: Database) -> None:
    fleet(database, 3)
    with database.transaction() as connection:
        connection.execute(update(hosts).values(cordoned=False, memory_mib=512 + 1024))
        assert sorted(placing.choose(connection, Config(), "1", 100.0, NEED, 6)) == 2 * ["h000"] + 2 * ["h001"] + 2 * ["h002"]
        with pytest.raises(NoHost):
            placing.choose(connection, Config(), "1", 100.0, NEED, 7)
        assert placing.choose(connection, Config(), "1", 100.0, NEED, 2, "h001") == ["h001", "h001"]


def test_addresses_are_given_once_until_there_is_none(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "FEW", 20)
    fleet(database, 1)
    free = ipaddress.IPv4Network(NETWORK).num_addresses - addresses.KEPT - 2
    with database.transaction() as connection:
        taken = set()
        for number in range(free):
            address = addresses.free_private(connection, NETWORK)
            assert address not in taken and ipaddress.IPv4Address(address) in ipaddress.IPv4Network(NETWORK)
            assert number > addresses.FEW or address == str(ipaddress.IPv4Network(NETWORK)[10 + number]), "the lowest of few"
            taken.add(address)
            connection.execute(insert(guests), guest(number, "h000", private_ipv4=address))
        with pytest.raises(ApiError, match="no address left"):
            addresses.free_private(connection, NETWORK)


def test_whether_an_operation_has_to_wait_is_asked_while_others_write(database: Database) -> None:
    def through(connection: Any, operation: Any, now: float) -> bool:
        found = connection.execute(select(accounts.c.created_at).where(accounts.c.id == "1")).scalar_one()
        if found:
            connection.execute(update(accounts).values(name="through"))
        return bool(found)

    with database.transaction() as connection:
        for number in range(3):
            history.record(connection, Request("1", "us-east-1", "", {}), now=1.0, type="T", resource_name="x",
                           resource_type="Instance", resource_id=f"x{number}", status="Started", workflow="w")
    engine = Engine(database, {"w": Workflow("w", (Step("through", through),))}, Clock())
    with database.transaction():
        asked = threading.Thread(target=engine.drive, daemon=True)
        asked.start()
        asked.join(20)
        assert not asked.is_alive(), "all of them wait, so that it needs no turn of those who write"
    with database.transaction() as connection:
        connection.execute(update(accounts).values(created_at=1.0))
    assert engine.drive() == 3
    with database.transaction(write=False) as connection:
        assert connection.execute(select(operations.c.status)).scalars().all() == ["Succeeded"] * 3
        assert connection.execute(select(accounts.c.name)).scalar_one() == "through"


def test_the_image_of_a_host_is_found_without_those_of_others(database: Database) -> None:
    if database.dialect != "sqlite":
        pytest.skip("counts the steps of SQLite's virtual machine")
    fleet(database, 500)
    with database.transaction() as connection:
        connection.execute(insert(images), [
            {"host_id": "h007", "digest": digest, "blueprint": blueprint, "name": "", "user": "", "version": version,
             "size_gib": 2} for digest, blueprint, version in (("2", "debian_12", "12"), ("1", "debian_12", "12"),
                                                               ("00", "debian_12", "11"), ("4", "nginx", "99"))])
    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    with database.transaction(write=False) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.set_progress_handler(count, 1)
        found = placing.image(connection, "h007", "debian_12")
        driver.set_progress_handler(None, 0)
        assert found["digest"] == "0", "the newest, and of several the same one each time"
        assert placing.image(connection, "h007", "lamp") == {}
    assert 0 < asked < 500, asked
    print(asked)


def test_where_many_are_open_those_that_something_is_told_of_are_asked_first(
        database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skysail.operations.engine.LOOKED_AT_ONCE", 5)
    asked: list[str] = []
    ready: set[str] = set()

    def through(connection: Any, operation: Any, now: float) -> bool:
        asked.append(operation["resource_id"])
        return operation["resource_id"] in ready

    def record(*numbers: int) -> None:
        with database.transaction() as connection:
            for number in numbers:
                history.record(connection, Request("1", "us-east-1", "", {}), now=1.0 + number, type="T", resource_name="x",
                               resource_type="Instance", resource_id=f"x{number:02}", status="Started", workflow="w")

    def drive(told: tuple[str, ...] = ()) -> list[str]:
        asked.clear()
        engine.drive(told)
        return sorted(asked)

    engine = Engine(database, {"w": Workflow("w", (Step("through", through),))}, Clock())
    record(*range(4))
    assert drive() == drive() == ["x00", "x01", "x02", "x03"], "few are all asked each time"
    record(*range(4, 20))
    assert {f"x{number:02}" for number in range(5)} <= set(drive())
    assert len(drive(("x09",))) < 10 and "x09" in asked
    ready.add("x09")
    assert drive(("x09", "gone")).count("x09") == 2, "asked, and then driven"
    record(20)
    ready.add("x20")
    assert drive().count("x20") == 2, "what is new is asked at once"
    ready.update(f"x{number:02}" for number in range(20))
    until = time.monotonic() + 60
    while (left := still_open(database)) and time.monotonic() < until:
        engine.drive()
    assert not left, "nobody told of these, and their turn came"


def still_open(database: Database) -> int:
    with database.transaction(write=False) as connection:
        return len(connection.execute(select(operations.c.id).where(operations.c.done.is_(False))).all())


def test_open_operations_are_found_by_an_index(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    if database.dialect != "sqlite":
        pytest.skip("a planner that counts rows reads a table of two whole")
    monkeypatch.setattr("skysail.operations.engine.LOOKED_AT_ONCE", 1)
    with database.transaction() as connection:
        for number in range(2):
            history.record(connection, Request("1", "us-east-1", "", {}), now=1.0, type="T", resource_name="x",
                           resource_type="Instance", resource_id=f"x{number}", status="Started", workflow="w")
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        asked.append((statement, parameters))

    event.listen(SqlEngine, "before_cursor_execute", note)
    try:
        Engine(database, {"w": Workflow("w", (Step("waits", lambda *_: False),))}, Clock()).drive(("x0", "x1"))
    finally:
        event.remove(SqlEngine, "before_cursor_execute", note)
    with database.transaction(write=False) as connection:
        plans = [" ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))
                 for statement, parameters in asked if "FROM operations" in statement]
    assert len(plans) == 4
    assert all("USING INDEX ix_operations_open_" in plan and "B-TREE" not in plan for plan in plans), plans


def test_who_looks_does_not_write(database: Database) -> None:
    with database.transaction() as connection:
        looking = look(connection)
        assert looking.execute(select(accounts.c.name)).scalar_one() == "a"
        with pytest.raises(WouldWrite):
            looking.execute(update(accounts).values(name="b"))
        assert connection.execute(select(accounts.c.name)).scalar_one() == "a"


def test_instances_that_are_as_their_guests_are_not_read_each_second(database: Database) -> None:
    fleet(database, 1)

    def run(*numbers: int, state: str = "running", seen: str = "running") -> None:
        with database.transaction() as connection:
            for number in numbers:
                connection.execute(insert(instances).values(
                    id=f"i{number}", account_id="1", region="us-east-1", zone="a", name=f"n{number}",
                    blueprint_id="debian_12", blueprint_name="Debian", bundle_id="nano_3_0", username="admin",
                    key_pair_name="k", state=state, created_at=0.0))
                connection.execute(insert(guests), guest(number, "h000", observed_state=seen, observed_starts=1))

    def followed() -> tuple[int, int]:
        """How many changed, and how many instructions of SQLite's machine that took; none on another database."""
        taken = [0]

        def count() -> None:
            taken[0] += 1

        with database.transaction() as connection:
            raw: Any = connection.connection.dbapi_connection
            if connection.dialect.name == "sqlite":
                raw.set_progress_handler(count, 1)
            try:
                return lifecycle.follow(connection, 1.0), taken[0]
            finally:
                if connection.dialect.name == "sqlite":
                    raw.set_progress_handler(None, 1)

    run(*range(5))
    assert followed()[0] == 0
    _, of_few = followed()
    run(*range(5, 100))
    unchanged, of_many = followed()
    assert unchanged == 0 and of_many <= of_few + 20
    run(100, seen="halted")
    run(101, state="pending")
    assert followed()[0] == 2
    with database.transaction(write=False) as connection:
        found = dict(connection.execute(select(instances.c.id, instances.c.state)).all())
    assert (found["i100"], found["i101"], found["i0"]) == ("stopped", "running", "running")


def test_leases_do_not_become_more_with_the_hosts() -> None:
    names = {lease_name(f"host-{number}") for number in range(10_000)}
    assert names == set(PARTS)
