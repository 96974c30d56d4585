"""The database: a fresh one and one that grew up with every version end up the same."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy.exc
from sqlalchemy import Connection, insert, inspect, select

import stores
from skysail.store.database import Database
from skysail.store.migrations import MIGRATIONS, _guests_without_public_ipv4, _leases
from skysail.store.postgres import Postgres
from skysail.store.schema import accounts, authorities, guests, hosts

# As version 2 made it.
GUESTS_2 = """
CREATE TABLE guests (
    id VARCHAR(64) NOT NULL, instance_id VARCHAR(64) NOT NULL, instance_name VARCHAR(255) NOT NULL, account_id VARCHAR(12)
    NOT NULL, host_id VARCHAR(64) NOT NULL, role VARCHAR(8) NOT NULL, starts INTEGER NOT NULL, reboots INTEGER NOT NULL,
    force BOOLEAN NOT NULL, vcpus INTEGER NOT NULL, memory_mib INTEGER NOT NULL, disk_gib INTEGER NOT NULL, image VARCHAR(64)
    NOT NULL, mac VARCHAR(17) NOT NULL, private_ipv4 VARCHAR(15) NOT NULL, public_ipv4 VARCHAR(15) NOT NULL, personality JSON
    NOT NULL, observed_state VARCHAR(16) NOT NULL, observed_starts INTEGER NOT NULL, observed_reboots INTEGER NOT NULL,
    reason VARCHAR NOT NULL, host_keys JSON NOT NULL, witnessed_at FLOAT, rx_bytes INTEGER NOT NULL, tx_bytes INTEGER
    NOT NULL,
    CONSTRAINT pk_guests PRIMARY KEY (id), CONSTRAINT uq_guests_mac UNIQUE (mac), CONSTRAINT uq_guests_private_ipv4 UNIQUE
    (private_ipv4), CONSTRAINT uq_guests_public_ipv4 UNIQUE (public_ipv4));
CREATE INDEX ix_guests_instance_id ON guests (instance_id);
CREATE INDEX ix_guests_host_id ON guests (host_id);
INSERT INTO guests VALUES ('g-1', 'i-1', 'one', '1', 'host-1', 'run', 1, 0, 0, 1, 512, 20, '', '52:54:00:00:00:01',
    '172.26.0.10', '192.0.2.10', '{}', '', 0, 0, '', '[]', NULL, 0, 0);
PRAGMA user_version = 2;
"""


def shape(path: Path) -> dict[str, set[tuple[object, ...]]]:
    """Columns and indexes of every table, in no order: a column that was added stands last."""
    with sqlite3.connect(path) as file:
        tables = [row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: {tuple(row[1:]) for row in file.execute(f"PRAGMA table_info({table})")}
                | {tuple(row[1:3]) for row in file.execute(f"PRAGMA index_list({table})")} for table in tables}


# A host as version 8 had it, in one zone of the only region.
HOSTS_8 = """
CREATE TABLE hosts (
    id VARCHAR(64) NOT NULL, region VARCHAR(32) NOT NULL, zone VARCHAR(4) NOT NULL, address VARCHAR NOT NULL, generation
    INTEGER NOT NULL, observed_generation INTEGER NOT NULL, vcpus INTEGER NOT NULL, memory_mib INTEGER NOT NULL, disk_gib
    INTEGER NOT NULL, accelerator VARCHAR(16) NOT NULL, seen_at FLOAT, CONSTRAINT pk_hosts PRIMARY KEY (id));
INSERT INTO hosts VALUES ('host-1', 'eu-west-1', 'b', 'unix:x', 7, 7, 4, 8192, 100, 'kvm', NULL);
"""


# Accounts as version 8 had them: each with the number of its only network.
ACCOUNTS_8 = """
CREATE TABLE accounts (
    id VARCHAR(12) NOT NULL, tenant INTEGER NOT NULL, name VARCHAR(64) NOT NULL, created_at FLOAT NOT NULL,
    CONSTRAINT pk_accounts PRIMARY KEY (id), CONSTRAINT uq_accounts_tenant UNIQUE (tenant),
    CONSTRAINT uq_accounts_name UNIQUE (name));
INSERT INTO accounts VALUES ('1', 7, 'admin', 1.0), ('2', 3, 'other', 2.0);
INSERT INTO access_keys VALUES ('AKIA1', '1', x'00', 1.0, NULL);
"""


def grown(path: Path) -> Path:
    """A database of version 2, with a guest in it."""
    made = Database(path)
    made.migrate()
    made.close()
    with sqlite3.connect(path) as file:
        file.execute("DROP TABLE guests")
        file.execute("DROP TABLE hosts")
        for table in ("host_zones", "networks", "accounts"):
            file.execute(f"DROP TABLE {table}")
        file.executescript(ACCOUNTS_8)
        file.executescript(HOSTS_8)
        file.executescript(GUESTS_2)
    return path


def test_an_old_database_becomes_what_a_fresh_one_is(tmp_path: Path) -> None:
    fresh, old = Database(tmp_path / "fresh.sqlite"), Database(grown(tmp_path / "old.sqlite"))
    for database in (fresh, old):
        for _ in range(2):
            database.migrate()
        database.close()
    assert shape(tmp_path / "fresh.sqlite") == shape(tmp_path / "old.sqlite")
    with sqlite3.connect(tmp_path / "old.sqlite") as file:
        assert file.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert file.execute("SELECT id, public_ipv4, public_ipv6 FROM guests").fetchall() == [("g-1", "192.0.2.10", None)]
        assert file.execute("SELECT * FROM host_zones").fetchall() == [("host-1", "eu-west-1", "b")]
        assert file.execute("SELECT id, vcpus FROM hosts").fetchall() == [("host-1", 4)]
        assert file.execute("SELECT number, account_id, region, peered FROM networks ORDER BY number").fetchall() == [
            (3, "2", "eu-west-1", 0), (7, "1", "eu-west-1", 0)]
        assert file.execute("SELECT network FROM guests").fetchall() == [(7,)], "it stays in the network that it is in"
        assert file.execute("SELECT * FROM accounts ORDER BY id").fetchall() == [("1", "admin", 1.0), ("2", "other", 2.0)]
        assert file.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_table_that_is_made_anew_keeps_its_rows_and_takes_guests_without_ipv4(tmp_path: Path) -> None:
    """From the version before that, with every column filled."""
    path = tmp_path / "skysail.sqlite"
    made = Database(path)
    made.migrate()
    with made.transaction() as connection:
        connection.execute(insert(accounts).values(id="1", name="a", created_at=0.0))
        connection.execute(insert(hosts).values(id="h", address=""))
    made.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        (made_as,) = file.execute("SELECT sql FROM sqlite_master WHERE name = 'guests'").fetchone()
        former = made_as.replace("public_ipv4 VARCHAR(15)", "public_ipv4 VARCHAR(15) NOT NULL").replace(
            "observed_addresses JSON,", "")
        assert former != made_as
        file.execute("DROP TABLE guests")
        file.execute(former)
        for index in guests.indexes:
            columns = ", ".join(column.name for column in index.columns)
            file.execute(f"CREATE {'UNIQUE' if index.unique else ''} INDEX {index.name} ON guests ({columns})")
        kinds = {row[1]: row[2] for row in file.execute("PRAGMA table_info(guests)")}
        values = {name: number if kind in ("INTEGER", "FLOAT", "BOOLEAN") else "[]" if kind == "JSON" else f"v{number}"
                  for number, (name, kind) in enumerate(kinds.items())} | {"account_id": "1", "host_id": "h"}
        file.execute(f"INSERT INTO guests ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", [*values.values()])
        file.execute(f"PRAGMA user_version = {MIGRATIONS.index(_guests_without_public_ipv4)}")
    again = Database(path)
    for _ in range(2):
        again.migrate()
    with again.transaction(write=False) as connection:
        kept = dict(connection.exec_driver_sql("SELECT * FROM guests").mappings().one())
        assert not connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    again.close()
    assert kept == values | {"observed_addresses": None}
    fresh = Database(tmp_path / "fresh.sqlite")
    fresh.migrate()
    fresh.close()
    assert shape(path) == shape(tmp_path / "fresh.sqlite")


@pytest.mark.parametrize("old", [False, True])
def test_an_ipv6_address_is_one_guests_alone(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "skysail.sqlite"
    database = Database(grown(path) if old else path)
    database.migrate()

    def values(number: int, ipv6: str | None) -> dict[str, object]:
        return {"id": f"g-{number}", "instance_id": "i", "instance_name": "i", "account_id": "9", "host_id": "h",
                "role": "run", "vcpus": 1, "memory_mib": 1, "disk_gib": 1, "image": "",
                "mac": str(number), "private_ipv4": str(number),
                "public_ipv4": str(number), "public_ipv6": ipv6, "personality": {}}

    with database.transaction() as connection:
        connection.execute(insert(accounts).values(id="9", name="a", created_at=0.0))
        connection.execute(insert(hosts).values(id="h", address=""))
        for number, ipv6 in ((2, None), (3, None), (4, "fd53::a")):
            connection.execute(insert(guests).values(**values(number, ipv6)))
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.transaction() as connection:
        connection.execute(insert(guests).values(**values(5, "fd53::a")))
    with database.transaction(write=False) as connection:
        assert len(connection.execute(select(guests.c.id).where(guests.c.public_ipv6.is_(None))).all()) == 2 + old
    database.close()


def test_the_regions_authority_becomes_that_of_the_first_account(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    made = Database(path)
    made.migrate()
    with made.transaction() as connection:
        connection.execute(insert(accounts).values(id="1", name="admin", created_at=0.0))
    made.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.executescript("ALTER TABLE accounts ADD COLUMN tenant INTEGER; UPDATE accounts SET tenant = 1; "
                           "DROP TABLE account_authorities; CREATE TABLE authorities (region VARCHAR(32) PRIMARY KEY, "
                           "public_key VARCHAR NOT NULL, private_sealed BLOB NOT NULL); "
                           "INSERT INTO authorities VALUES ('us-east-1', 'ssh-ed25519 A', x'00'); PRAGMA user_version = 5;")
    again = Database(path)
    again.migrate()
    with again.transaction(write=False) as connection:
        assert [tuple(row) for row in connection.execute(select(authorities))] == [("1", "us-east-1", "ssh-ed25519 A", b"\0")]
    again.close()


def test_a_database_on_postgresql_that_is_there_gets_what_came_later() -> None:
    """The first one there had leases, and no hosts elsewhere."""
    def columns(connection: Connection) -> dict[str, set[tuple[str, str, bool, str | None]]]:
        held = inspect(connection)
        return {table: {(one["name"], str(one["type"]), one["nullable"], one["default"]) for one in held.get_columns(table)}
                for table in held.get_table_names()}

    made = Database(Postgres(stores.server().create()))
    made.migrate()
    with made.transaction() as connection:
        fresh = columns(connection)
        connection.execute(insert(hosts).values(id="h", address=""))
        for table in ("host_authority", "join_tokens", "moves"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        for column in ("facts", "refused", "away_since", "cordoned", "name_server"):
            connection.exec_driver_sql(f"ALTER TABLE hosts DROP COLUMN {column}")
        connection.exec_driver_sql(f"UPDATE schema_version SET version = {MIGRATIONS.index(_leases) + 1}")
    for _ in range(2):
        made.migrate()
    with made.transaction(write=False) as connection:
        assert columns(connection) == fresh
        (kept,) = connection.execute(select(hosts)).all()
        assert (kept.facts, kept.refused, kept.cordoned, kept.name_server) == (None, "", False, True)
    made.close()
