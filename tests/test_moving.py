"""``skysail db move``: all rows or none, compared, and the cloud goes on where they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import JSON, insert, inspect, null, select

import stores
from clouds import Cloud, eventually, running_cloud
from skysail.inspect.verify import verify
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.serve import moving
from skysail.serve.turn import turn
from skysail.store import copying
from skysail.store.database import Database, flaws
from skysail.store.migrations import MIGRATIONS
from skysail.store.postgres import Postgres
from skysail.store.schema import access_keys, accounts, guests, hosts, measurements, metadata, meters

SETTINGS = 'database = ""\n[regions]\n"us-east-1" = ["a", "b"]\n'


@pytest.fixture
def lived() -> Iterator[Cloud]:
    """A cloud on SQLite with a bit of everything."""
    with running_cloud(SETTINGS) as cloud:
        client = cloud.client()
        eventually(lambda: client.get_blueprints()["blueprints"], 30)
        client.create_instances(instanceNames=["one", "two", "gone"], availabilityZone="us-east-1a",
                                blueprintId="debian_12", bundleId="nano_3_0", tags=[{"key": "stage", "value": "tést"}])
        client.create_domain(domainName="example.com")
        client.create_disk(diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
        eventually(lambda: {found["state"]["name"] for found in client.get_instances()["instances"]} == {"running"}, 60)
        client.delete_instance(instanceName="gone")
        eventually(lambda: verify(cloud.config, 0.1) == [], 60)
        yield cloud


def skysail(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)})


def ended(cloud: Cloud) -> None:
    cloud.processes["controller"].terminate()
    cloud.processes["controller"].wait(60)


def names(cloud: Cloud) -> set[str]:
    return {found["name"] for found in cloud.client().get_instances()["instances"]}


def test_a_cloud_moves_and_goes_on(lived: Cloud) -> None:
    url = stores.server().create()
    before = (lived.folder / "skysail.toml").read_text()
    refused = skysail(lived, "db", "move", url)
    assert refused.returncode == 1 and "a controller works on the database" in refused.stderr, refused.stderr
    assert (lived.folder / "skysail.toml").read_text() == before
    ended(lived)
    file = lived.config.sqlite_file.read_bytes()

    moved = skysail(lived, "db", "move", url)
    assert moved.returncode == 0, moved.stderr
    assert "instances" in moved.stdout and "sha256" in moved.stdout, moved.stdout
    assert (lived.folder / "skysail.toml").read_text() == f'database = "{url}"\n' + before.replace('database = ""\n', "")
    assert lived.config.sqlite_file.read_bytes() == file, "the file stays as it was"

    lived.config = load(str(lived.folder))
    lived.start("controller")
    assert verify(lived.config, 0.2) == []
    assert names(lived) == {"one", "two"}
    client = lived.client()
    client.create_instances(instanceNames=["three"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    eventually(lambda: client.get_instance_state(instanceName="three")["state"]["name"] == "running", 60)
    assert verify(lived.config, 0.2) == []
    again = skysail(lived, "db", "move", url)
    assert again.returncode == 1 and "already" in again.stderr


# Ends itself before the NUMBERth table is compared, or once all is committed.
DYING = """
import os, signal, sys
from skysail.kit.config import load
from skysail.serve import moving
from skysail.store import copying

left = int(sys.argv.pop())
sums = copying._sum

def counted(connection, table):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(connection, table)

copying._sum = counted
moving.point = lambda config, there: os.kill(os.getpid(), signal.SIGKILL)
moving.move(load(), sys.argv.pop(), "", print)
"""


def dies(cloud: Cloud, url: str, before: int) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, url, str(before)],
                          env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_crash_in_the_middle_leaves_the_cloud_where_it_was(lived: Cloud) -> None:
    url = stores.server().create()
    ended(lived)
    for before in (1, 20, 1000):
        dies(lived, url, before)
        there = Database(Postgres(url))
        with there.transaction(write=False) as connection:
            found = inspect(connection).get_table_names()
        there.close()
        assert bool(found) == (before == 1000), "all or nothing"
    # All of it was committed, and the configuration does not say so: the cloud goes on in its file.
    lived.start("controller")
    lived.client().delete_instance(instanceName="two")
    eventually(lambda: names(lived) == {"one"}, 30)
    eventually(lambda: verify(lived.config, 0.1) == [], 60)
    ended(lived)
    # The copy that nobody worked on makes way for the next one.
    assert skysail(lived, "db", "move", url).returncode == 0
    lived.config = load(str(lived.folder))
    lived.start("controller")
    assert names(lived) == {"one"} and verify(lived.config, 0.2) == []


def test_whoever_waited_for_a_move_does_not_go_on_as_if_there_had_been_none(lived: Cloud) -> None:
    ended(lived)
    said: list[str] = []

    def wait() -> None:
        with pytest.raises(SkysailError, match="was changed meanwhile"), turn(lived.config, said.append):
            pass
    with ThreadPoolExecutor(1) as other:
        with turn(lived.config, print):
            waiting = other.submit(wait)
            eventually(lambda: said, 60, "it waits")
            moving.point(lived.config, msgspec.structs.replace(lived.config, database="postgresql:///elsewhere"))
        waiting.result()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "skysail.sqlite")
    made.migrate()
    with made.transaction() as connection:
        connection.execute(insert(accounts).values(id="1", name="ü ' \\ %s", created_at=0.1 + 0.2))
        connection.execute(insert(access_keys).values(
            id="k", account_id="1", secret_sealed=bytes(range(256)), created_at=1e-9))
        connection.execute(insert(hosts).values(id="h", address="unix:x"))
        for number, origin in enumerate((JSON.NULL, null(), {"a": [1, None, "\u0000 \U0001f600"]})):
            connection.execute(insert(guests).values(
                id=f"g-{number}", instance_id="i", instance_name="i", account_id="1", host_id="h", role="run", vcpus=1,
                memory_mib=1, disk_gib=1, image="", mac=str(number), private_ipv4=str(number), personality={"b": 1, "a": 2},
                origin=origin, rx_bytes=2**40 + number, force=bool(number)))
        connection.execute(insert(meters).values(instance_id="i", sampled_at=1.5, rx_bytes=2**62))
        connection.execute(insert(measurements), [
            {"instance_id": "i", "seconds": 60, "at": 2**33 + 60 * number, "stats": b"\0" * (number % 3)}
            for number in range(copying.PORTION * 2 + 7)])
    yield made
    made.close()


@pytest.fixture
def target() -> Iterator[Database]:
    made = Database(Postgres(stores.server().create()))
    yield made
    made.close()


def everything(store: Database) -> dict[str, list[tuple[Any, ...]]]:
    with store.transaction(write=False) as connection:
        return {table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
                for table in metadata.sorted_tables}


def test_a_copy_is_exact(source: Database, target: Database) -> None:
    copied = copying.copy(source, target)
    assert {one.table: one.rows for one in copied if one.rows} == {
        "accounts": 1, "access_keys": 1, "hosts": 1, "guests": 3, "meters": 1, "measurements": copying.PORTION * 2 + 7}
    assert everything(source) == everything(target)
    for store in (source, target):
        with store.transaction(write=False) as connection:
            assert connection.execute(select(guests.c.id).where(guests.c.origin.is_(null()))).scalars().all() == ["g-1"]
    target.migrate()
    with target.transaction() as connection:
        assert list(flaws(connection)) == []
    with pytest.raises(SkysailError, match="holds a cloud"):
        copying.copy(source, target)


def test_a_copy_that_differs_is_none(source: Database, target: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = copying._values
    monkeypatch.setattr(copying, "_values", lambda table, row: exact(table, row) | (
        {"rx_bytes": 0} if row.get("id") == "g-1" else {}))
    with pytest.raises(SkysailError, match="the copy of guests differs"):
        copying.copy(source, target)
    with target.transaction(write=False) as connection:
        assert inspect(connection).get_table_names() == []


def test_only_what_is_current_is_copied(source: Database, target: Database) -> None:
    with source.transaction() as connection:
        connection.exec_driver_sql(f"PRAGMA user_version = {len(MIGRATIONS) - 1}")
    with pytest.raises(SkysailError, match="schema version"):
        copying.copy(source, target)


def test_the_configuration_keeps_what_else_it_says(tmp_path: Path) -> None:
    written = tmp_path / "skysail.toml"
    written.write_text('# mine\nport = 1\ndatabase = ""  # a file\n[regions]\n"us-east-1" = ["a"]\n')
    written.chmod(0o640)
    config = load(str(tmp_path))
    there = msgspec.structs.replace(config, database="postgresql:///d", database_password_file="/etc/p")
    moving.point(config, there)
    assert written.read_text() == ('database = "postgresql:///d"\ndatabase_password_file = "/etc/p"\n# mine\nport = 1\n'
                                   '[regions]\n"us-east-1" = ["a"]\n')
    assert load(str(tmp_path)) == there and written.stat().st_mode & 0o777 == 0o640
