"""The store's transactions: each whole or not at all, on the disk before anybody goes on, one commit where they meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError

import stores
from clouds import eventually
from skysail.store.database import Database
from skysail.store.postgres import Postgres
from skysail.store.schema import accounts


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    made = Database(Postgres(stores.server().create()) if request.param == "postgresql" else tmp_path / "skysail.sqlite")
    made.migrate()
    yield made
    made.close()


def put(connection: Connection, name: str) -> None:
    connection.execute(insert(accounts).values(id=name, name=name, created_at=0.0))


def held(database: Database) -> set[str]:
    with database.transaction(write=False) as connection:
        return set(connection.execute(select(accounts.c.name)).scalars())


def statements(database: Database) -> list[str]:
    said: list[str] = []
    event.listen(database._engine, "before_cursor_execute", lambda *call: said.append(call[2]))
    return said


def together(database: Database, *bodies: Callable[[Connection], None]) -> list[Future[None]]:
    """Transactions that come while another one, of ``first``, is under way; its outcome, and theirs in the order given."""
    def run(body: Callable[[Connection], None]) -> None:
        with database.transaction() as connection:
            body(connection)

    begun, go = threading.Event(), threading.Event()

    def first(connection: Connection) -> None:
        put(connection, "first")
        begun.set()
        assert go.wait(30)

    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        done = [pool.submit(run, first)]
        assert begun.wait(30)
        for number, body in enumerate(bodies):
            done.append(pool.submit(run, body))
            eventually(lambda number=number: database._waiting == number + 1, 30)  # type: ignore[misc]
        go.set()
    return done


def test_transactions_that_come_together_share_one_commit(database: Database) -> None:
    said = statements(database)
    for one in together(database, *(lambda connection, name=f"n{number}": put(connection, name) for number in range(5))):
        one.result()
    assert held(database) >= {"first", *(f"n{number}" for number in range(5))}
    looks = 0 if database.dialect == "sqlite" else 1  # which begin and end at SQLite's own driver
    assert (len([one for one in said if one.startswith("BEGIN")]), said.count("COMMIT")) == (1 + looks, 1 + looks)


def test_one_that_fails_leaves_the_others_whole(database: Database) -> None:
    def refused(connection: Connection) -> None:
        put(connection, "half")
        raise ValueError("refused")

    first, good, bad, twice, last = together(
        database, lambda connection: put(connection, "good"), refused, lambda connection: put(connection, "good"),
        lambda connection: put(connection, "last"))
    first.result(), good.result(), last.result()
    with pytest.raises(ValueError, match="refused"):
        bad.result()
    with pytest.raises(IntegrityError):
        twice.result()
    assert held(database) == {"first", "good", "last"}
    with database.transaction() as connection:
        put(connection, "after")
    assert "after" in held(database)


def test_a_commit_that_fails_fails_everybody_in_it(database: Database) -> None:
    def dangling(connection: Connection) -> None:
        # Looked at when it is committed, not before.
        connection.exec_driver_sql(
            "PRAGMA defer_foreign_keys=ON" if connection.dialect.name == "sqlite" else "ALTER TABLE access_keys "
            "ALTER CONSTRAINT fk_access_keys_account_id DEFERRABLE INITIALLY DEFERRED")
        connection.exec_driver_sql(
            "INSERT INTO access_keys (id, account_id, secret_sealed, created_at) VALUES ('k', 'x', '', 0)")

    for one in together(database, lambda connection: put(connection, "good"), dangling):
        with pytest.raises(DBAPIError, match=r"(?i)foreign key"):
            one.result()
    assert held(database) == set()
    with database.transaction() as connection:
        put(connection, "after")
    assert held(database) == {"after"}


def test_a_transaction_that_the_database_gives_up_fails_everybody_in_it(database: Database) -> None:
    def given_up(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT OR ROLLBACK INTO accounts (id, name, created_at) VALUES ('first', 'other', 0)"
            if connection.dialect.name == "sqlite" else "SELECT pg_terminate_backend(pg_backend_pid())")

    first, good, bad = together(database, lambda connection: put(connection, "good"), given_up)
    for one in (first, bad):
        with pytest.raises(DBAPIError):
            one.result()
    # Whoever waits has its turn in no certain order: behind the one that failed, it is of the next group.
    behind = set() if isinstance(good.exception(), DBAPIError) else {"good"}
    assert held(database) == behind
    with database.transaction() as connection:
        put(connection, "after")
    assert held(database) == behind | {"after"}


def test_nobody_goes_on_before_the_commit(database: Database) -> None:
    """Those of a group return when all of it is on the disk: what they then tell their callers stays so."""
    seen: list[set[str]] = []

    def write(name: str, gate: threading.Event | None = None) -> None:
        with database.transaction() as connection:
            put(connection, name)
            if gate is not None:
                begun.set()
                assert gate.wait(30)
        seen.append(held(database))

    begun, gate = threading.Event(), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(write, "a", gate)]
        assert begun.wait(30)
        done += [pool.submit(write, "b"), pool.submit(write, "c")]
        eventually(lambda: database._waiting == 2, 30)
        assert held(database) == set()
        gate.set()
        for one in done:
            one.result()
    assert seen == [{"a", "b", "c"}] * 3
