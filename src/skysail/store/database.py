"""The database as one thing: open it, migrate it, take a transaction.

SQLite runs in WAL mode with ``synchronous=FULL``: an operation that was answered survives a power cut. A writing
transaction takes the write lock at its start (``BEGIN IMMEDIATE``), so two requests never both read a name as free.

Writing transactions that come while another one is under way share its commit, each as a savepoint of its own: one sync of
the disk for all of them (group commit). Nobody outside sees, and no caller goes on with, what is not on the disk.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, create_engine, event

from skysail.store import migrations

# The first of a group waits for the last one.
_MEMBERS = 32


class _Group:
    """Writing transactions that are committed together."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.members = 0
        self.ended = threading.Event()
        self.failure: BaseException | None = None


class Database:
    """One controller's store."""

    def __init__(self, path: Path) -> None:
        # SQLite lets a writer that has to wait sleep, for up to 100 ms at a time, while others go first. Writers of this
        # process wait here instead; only those of others (the operator's) are met that way.
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._group: _Group | None = None
        self._engine = create_engine(f"sqlite:///{path}", pool_size=8, connect_args={"timeout": 30},
                                     json_deserializer=msgspec.json.decode)

        @event.listens_for(self._engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # we begin transactions ourselves
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
                connection.execute(f"PRAGMA {pragma}")

    def migrate(self) -> None:
        """Bring the schema to this version; safe to repeat, all migrations one transaction."""
        with self._engine.connect() as connection:
            # A table that is made anew is missing for a moment, to those that refer to it. Not possible within a transaction.
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                try:
                    migrations.upgrade(connection)
                except BaseException:
                    connection.exec_driver_sql("ROLLBACK")
                    raise
                connection.exec_driver_sql("COMMIT")
            finally:
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")

    def transaction(self, write: bool = True) -> AbstractContextManager[Connection]:
        """A transaction: committed at the end of the ``with`` block, rolled back by an exception. One that writes must not
        be begun within another one that does."""
        return self._write() if write else self._read()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            driver = _driver(connection)
            driver.execute("BEGIN")
            try:
                yield connection
            except BaseException:
                driver.execute("ROLLBACK")
                raise
            driver.execute("COMMIT")

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """Be one of a group: begin it, or be a savepoint of the one that is open; commit it, unless somebody waits for the
        turn, who then will. Also a refusal waits for the commit: it may rest on what others of the group wrote."""
        refusal: BaseException | None = None
        with self._counting:
            self._waiting += 1
        with self._turn:
            with self._counting:
                self._waiting -= 1
            group = self._group or self._open()
            try:
                with _savepoint(group):
                    yield group.connection
            except BaseException as raised:
                refusal = raised
            with self._counting:
                last = self._waiting == 0
            if last or group.failure is not None or group.members >= _MEMBERS:
                self._close(group)
        group.ended.wait()
        if group.failure is not None and group.failure is not refusal:
            raise group.failure
        if refusal is not None:
            raise refusal

    def _open(self) -> _Group:
        connection = self._engine.connect()
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except BaseException:
            connection.close()
            raise
        self._group = _Group(connection)
        return self._group

    def _close(self, group: _Group) -> None:
        """Commit the group, or fail all of it."""
        self._group = None
        try:
            if group.failure is None:
                group.connection.exec_driver_sql("COMMIT")
        except BaseException as failure:
            group.failure = failure
        finally:
            try:
                if _driver(group.connection).in_transaction:
                    group.connection.exec_driver_sql("ROLLBACK")
                group.connection.close()
            finally:
                group.ended.set()

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()


@contextmanager
def _savepoint(group: _Group) -> Iterator[None]:
    """One member of the group: what it wrote goes with its exception, what the others wrote stays. Where that cannot be (a
    full disk makes SQLite give up the whole transaction), the group has failed."""
    driver = _driver(group.connection)
    driver.execute("SAVEPOINT member")
    try:
        yield
    except BaseException as raised:
        try:
            driver.execute("ROLLBACK TO member")
            driver.execute("RELEASE member")
        except BaseException:
            group.failure = raised
        raise
    try:
        driver.execute("RELEASE member")
    except BaseException as failure:
        group.failure = failure
        raise
    group.members += 1


def _driver(connection: Connection) -> sqlite3.Connection:
    """SQLite's own connection: what begins and ends each request goes there, and not by way of SQLAlchemy's events."""
    raw: Any = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)
    return raw
