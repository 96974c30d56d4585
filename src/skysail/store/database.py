"""The database as one thing: open it, migrate it, take a transaction.

SQLite runs in WAL mode with ``synchronous=FULL``: an operation that was answered survives a power cut. A writing
transaction takes the write lock at its start (``BEGIN IMMEDIATE``), so two requests never both read a name as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, create_engine, event

from skysail.store import migrations


class Database:
    """One controller's store."""

    def __init__(self, path: Path) -> None:
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
                with self._begun(connection, write=True):
                    migrations.upgrade(connection)
            finally:
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")

    def transaction(self, write: bool = True) -> AbstractContextManager[Connection]:
        """A transaction: committed at the end of the ``with`` block, rolled back by an exception."""
        return self._transaction(write)

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Connection]:
        with self._engine.connect() as connection, self._begun(connection, write):
            yield connection

    @contextmanager
    def _begun(self, connection: Connection, write: bool) -> Iterator[None]:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()
