"""Pages of long lists: each row once, whatever comes and goes meanwhile, and never more rows read than the page has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert

import stores
from clouds import Cloud, eventually
from skysail.kit.clock import HandClock
from skysail.resources import accounts, names
from skysail.resources.key_pairs import KeyPairs
from skysail.resources.operation_log import OperationLog
from skysail.resources.request import Request
from skysail.store.database import Database
from skysail.store.migrations import MIGRATIONS
from skysail.store.schema import key_pairs, operations
from skysail.store.vault import Vault

REGION = "us-east-1"
MANY = 100_000


def rows(account: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Operations, three to a moment, over fifty resources."""
    return [{"id": f"{number * 7919 % 1_000_003:09}", "account_id": account, "region": REGION, "type": "T",
             "resource_name": f"web-{number % 50}", "resource_type": "Instance", "resource_id": "x",
             "status": "Succeeded", "created_at": 1000.0 + number // 3, "status_changed_at": 0.0}
            for number in range(start, start + count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, str]]:
    database = stores.fresh(tmp_path_factory.mktemp("pages"))
    database.migrate()
    with database.transaction() as connection:
        account = accounts.create_account(connection, "first", 0.0)
        for start in range(0, MANY, 5000):  # PostgreSQL waits for the next statement of one that writes for seconds only
            connection.execute(insert(operations), rows(account, 5000, start))
    yield database, account
    database.close()


def steps_of(connection: Connection, ask: Any) -> int:
    """How many thousands of steps SQLite's machine made for ``ask``: a measure of work that no other process disturbs."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    raw = connection.connection.driver_connection
    raw.set_progress_handler(tick, 1000)
    ask()
    raw.set_progress_handler(None, 0)
    return count


@pytest.mark.parametrize(("action", "params"), [
    ("GetOperations", {}), ("GetOperationsForResource", {"resourceName": "web-7"})])
def test_a_page_of_a_hundred_thousand_operations_is_cheap(store: tuple[Database, str], action: str,
                                                          params: dict[str, Any]) -> None:
    if stores.POSTGRESQL:
        pytest.skip("counts the steps of SQLite's machine; the indexes are the same")
    database, account = store
    list_ = OperationLog().actions()[action]
    with database.transaction(write=False) as connection:
        statements: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda *call: statements.append(call[2]))
        token = None
        for _ in range(10):
            request = Request(account, REGION, action, {**params, **({"pageToken": token} if token else {})})
            answer: dict[str, Any] = {}
            assert steps_of(connection, lambda request=request, answer=answer:
                            answer.update(list_(connection, request))) <= 10
            assert len(answer["operations"]) == 100
            token = answer["nextPageToken"]
        assert len(statements) == 10 and all("LIMIT" in statement for statement in statements)


def test_operations_come_newest_first_each_once_while_more_are_made(store: tuple[Database, str]) -> None:
    database, account = store
    log = OperationLog()
    seen: list[tuple[float, str]] = []
    token, made = None, 0
    while True:
        with database.transaction() as connection:
            params = {"resourceName": "web-7", **({"pageToken": token} if token else {})}
            answer = log.list_for_resource(connection, Request(account, REGION, "GetOperationsForResource", params))
            seen += [(found["createdAt"], found["id"]) for found in answer["operations"]]
            connection.execute(insert(operations), rows(account, 50, MANY + made))
            made += 50
        token = answer["nextPageToken"]
        if token is None:
            break
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) == MANY // 50


def test_a_store_of_the_first_version_gets_the_indexes(tmp_path: Path) -> None:
    database = Database(tmp_path / "old.sqlite")
    with database.transaction() as connection:
        MIGRATIONS[0](connection)
        for index in operations.indexes:
            index.drop(connection)
        connection.exec_driver_sql("CREATE INDEX ix_operations_listing ON operations (account_id, region, created_at)")
        connection.exec_driver_sql("PRAGMA user_version = 1")
    database.migrate()
    with database.transaction(write=False) as connection:
        found = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index'").scalars())
    database.close()
    assert {"ix_operations_newest", "ix_operations_of_resource", "ix_operations_open_by_age"} <= found
    assert not {"ix_operations_listing", "ix_operations_open"} & found


def test_names_and_key_pairs_page_while_rows_come_and_go(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    pairs = KeyPairs(HandClock(), Vault.at(tmp_path / "master.key"))
    with database.transaction() as connection:
        account = accounts.create_account(connection, "first", 0.0)
        made = [f"key-{number:03}" for number in range(250)]
        for name in made:
            names.claim(connection, Request(account, REGION, "", {}), name, "KeyPair", name)
        connection.execute(insert(key_pairs), [
            {"id": name, "account_id": account, "region": REGION, "name": name, "public_key": "k", "fingerprint": "f",
             "is_default": False, "created_at": 0.0} for name in made])
        for action, member, of in ((names.Names().list, "activeNames", str), (pairs.list, "keyPairs", lambda k: k["name"])):
            seen: list[str] = []
            token = None
            while True:
                answer = action(connection, Request(account, REGION, "", {"pageToken": token} if token else {}))
                seen += [of(found) for found in answer[member]]
                token = answer["nextPageToken"]
                if token is None:
                    break
                if member == "activeNames":  # one that was shown goes, one comes in front of the place
                    names.release(connection, account, REGION, seen[-1])
                    names.claim(connection, Request(account, REGION, "", {}), f"a-{len(seen)}", "KeyPair", "x")
            assert seen == made


def test_every_list_pages_through_boto3(cloud: Cloud) -> None:
    """All actions that list, through boto3's own paginators: each item once, the same twice."""
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 20, "a blueprint is ready")
    expected = []
    for start in range(0, 120, 20):
        batch = [f"web-{number:03}" for number in range(start, start + 20)]
        client.create_instances(instanceNames=batch, availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        expected += batch
    for action, member, name in (
            ("get_instances", "instances", "name"), ("get_active_names", "activeNames", None),
            ("get_operations", "operations", "id"), ("get_key_pairs", "keyPairs", "name"),
            ("get_bundles", "bundles", "bundleId"), ("get_blueprints", "blueprints", "blueprintId")):
        def walk(action: str = action, member: str = member, name: str | None = name) -> list[Any]:
            return [found[name] if name else found for page in client.get_paginator(action).paginate()
                    for found in page[member]]

        first = walk()
        assert first == walk() and len(first) == len(set(first))
        if action == "get_instances":
            assert first == expected
        if action == "get_operations":
            assert len(first) == 120
    assert len(client.get_instances()["instances"]) == 100


def test_a_name_is_free_again_at_once(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 20, "a blueprint is ready")
    identities = set()
    for _ in range(5):
        client.create_instances(instanceNames=["phoenix"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        identities.add(client.get_instance(instanceName="phoenix")["instance"]["arn"])
        client.delete_instance(instanceName="phoenix")
        assert "phoenix" not in client.get_active_names()["activeNames"]
        assert client.get_instances()["instances"] == []
        with pytest.raises(client.exceptions.NotFoundException):
            client.get_instance(instanceName="phoenix")
    assert len(identities) == 5
    client.create_key_pair(keyPairName="phoenix")  # for a resource of another type too


def test_the_default_key_pairs_name_is_not_for_instances(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 20, "a blueprint is ready")
    client.create_key_pair(keyPairName="laptop")
    for key in ({}, {"keyPairName": "laptop"}):
        with pytest.raises(client.exceptions.InvalidInputException, match="is kept for the region's default key pair"):
            client.create_instances(instanceNames=["LightsailDefaultKeyPair"], availabilityZone="us-east-1a",
                                    blueprintId="debian_12", bundleId="nano_3_0", **key)
    assert client.get_active_names()["activeNames"] == ["laptop"]
    assert client.download_default_key_pair()["privateKeyBase64"]


def test_a_name_with_a_dot_is_found_again(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 20, "a blueprint is ready")
    client.create_instances(instanceNames=["www.example"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    assert client.get_instance(instanceName="www.example")["instance"]["name"] == "www.example"
    client.delete_instance(instanceName="www.example")
