"""SQLite: the rows of a cloud on one machine, in a file.

It runs in WAL mode with ``synchronous=FULL``: an operation that was answered survives a power cut. A writing transaction
takes the write lock at its start (``BEGIN IMMEDIATE``).
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event

from skysail.store.dialect import POOLED


class Sqlite:
    """The database in the file ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def engine(self) -> Engine:
        made = create_engine(f"sqlite:///{self._path}", pool_size=POOLED, connect_args={"timeout": 30},
                             json_deserializer=msgspec.json.decode)

        @event.listens_for(made, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # we begin transactions ourselves
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
                connection.execute(f"PRAGMA {pragma}")
        return made

    def check(self) -> None:
        """A file is made where there is none."""

    def exists(self) -> bool:
        return self._path.exists()

    def begin(self, connection: Connection, write: bool) -> None:
        if write:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            self.say(connection, "BEGIN")

    def say(self, connection: Connection, statement: str) -> None:
        # Each request does: not by way of SQLAlchemy's events.
        _driver(connection).execute(statement)

    def now(self, connection: Connection) -> float:
        return time.time()

    def let_stand(self, connection: Connection) -> None:
        """It may anyway."""

    def announce(self, connection: Connection) -> None:
        """There is one controller: it knows."""

    def tell(self, connection: Connection, resources: Collection[str]) -> None:
        """It knows that, too."""

    async def heard(self) -> AsyncIterator[Sequence[str]]:
        await asyncio.Event().wait()
        yield ()

    def is_open(self, connection: Connection) -> bool:
        return _driver(connection).in_transaction

    @contextmanager
    def unreferenced(self, connection: Connection) -> Iterator[None]:
        # A table that is made anew is missing for a moment. Not possible within a transaction.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        try:
            yield
        finally:
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")

    @staticmethod
    def version(connection: Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    def set_version(self, connection: Connection, version: int) -> None:
        connection.exec_driver_sql(f"PRAGMA user_version = {version}")

    @staticmethod
    def flaws(connection: Connection) -> Iterator[tuple[str, str, str]]:
        for row in connection.exec_driver_sql("PRAGMA integrity_check"):
            if row[0] != "ok":
                yield "database", str(row[0]), "a sound file"
        for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield (f"database, table {row[0]}", f"row {row[1]} points at a row of {row[2]} that is not there",
                   "no dangling references")


def _driver(connection: Connection) -> sqlite3.Connection:
    raw: Any = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)
    return raw
