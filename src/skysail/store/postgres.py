"""PostgreSQL: the rows of a fleet, for one controller or several.

A writing transaction takes one advisory lock at its start, which stands for SQLite's write lock: what an action reads stays
so until it is committed, whichever controller it runs in. At READ COMMITTED each statement sees all that was committed
before it, so that behind the lock nothing is taken twice, and there is no serialization failure to repeat. A reading
transaction waits for nobody: it sees one moment (REPEATABLE READ).

A controller that stands still in the middle of a transaction (a stopped process, a machine that swaps) has its session ended
by the server after ``PATIENCE_SECONDS``, which undoes the transaction and frees the lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL

from skysail.kit.errors import SkysailError
from skysail.store.dialect import POOLED

log = logging.getLogger(__name__)
# How long a transaction waits for others; how long the server waits for the next statement of one that writes, and of one
# that reads.
LOCK_SECONDS, PATIENCE_SECONDS, READING_SECONDS = 30, 5, 120
CHANNEL = "skysail"
# So many resources are named in one notification, which has to have less than 8,000 bytes; an id has 36.
TOLD_AT_ONCE = 200
_WRITERS = 0x736B79
# Which languages sort in orders of their own, each another.
_WORDS = ("a", "B", "_", "-", "aa", "a b", "é", "z")
# Of a backend that is gone, for good or for now, the kernel tells within these: the other machine may be without power.
_KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}


class Postgres:
    """The database at ``url`` (``postgresql://[user@]host[:port]/name``). The password is read from ``password_file`` at each
    connect, so that it can be changed while controllers run; without one the server takes us by our user id (peer), by a
    certificate, or without a question."""

    def __init__(self, url: str, password_file: str = "") -> None:
        self._url = url
        self._password_file = password_file

    @property
    def conninfo(self) -> dict[str, Any]:
        """What psycopg connects with."""
        url = make_url(self._url)
        found = {"host": url.host, "port": url.port, "dbname": url.database, "user": url.username} | dict(url.query)
        if self._password_file:
            found["password"] = Path(self._password_file).read_text().strip()
        settings = (f"-c lock_timeout={LOCK_SECONDS}s -c idle_in_transaction_session_timeout={READING_SECONDS}s "
                    "-c timezone=UTC")
        return {name: value for name, value in found.items() if value is not None} | _KEEPALIVE | {
            "connect_timeout": 10, "application_name": f"skysail {socket.gethostname()} {os.getpid()}", "options": settings}

    def engine(self) -> Engine:
        made = create_engine(URL.create("postgresql+psycopg"), pool_size=POOLED, isolation_level="AUTOCOMMIT",
                             json_deserializer=msgspec.json.decode)

        @event.listens_for(made, "do_connect")
        def _connect(_dialect: Any, _record: Any, _arguments: Any, _keywords: Any) -> Any:
            return psycopg.connect(**self.conninfo)
        return made

    def check(self) -> None:
        with self._reached() as connection:
            encoding = connection.info.parameter_status("server_encoding")
            found = connection.execute("SELECT word FROM unnest(%s::text[]) AS word ORDER BY word", [list(_WORDS)]).fetchall()
        if encoding != "UTF8" or [word for (word,) in found] != sorted(_WORDS):
            raise SkysailError(f"the database {self._url} does not sort by code points of UTF-8: pages would not be in the "
                               "order of their tokens", "make it with TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C': "
                               "docs/database.md")

    def exists(self) -> bool:
        with self._reached() as connection:
            return connection.execute("SELECT to_regclass('schema_version')").fetchone() != (None,)

    @contextmanager
    def _reached(self) -> Iterator[psycopg.Connection]:
        try:
            connection = psycopg.connect(**self.conninfo)
        except psycopg.OperationalError as unreachable:
            said = " ".join(str(unreachable).split())
            raise SkysailError(f"the database {self._url} cannot be reached: {said}",
                               "see that PostgreSQL runs there and lets this user in: docs/database.md") from unreachable
        with connection:
            yield connection

    def begin(self, connection: Connection, write: bool) -> None:
        if write:
            connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED")
            connection.exec_driver_sql("SELECT set_config('idle_in_transaction_session_timeout', "
                                       f"'{PATIENCE_SECONDS}s', true), pg_advisory_xact_lock({_WRITERS})")
        else:
            connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def say(self, connection: Connection, statement: str) -> None:
        connection.exec_driver_sql(statement)

    def now(self, connection: Connection) -> float:
        return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())::float8").scalar_one())

    def let_stand(self, connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")

    def announce(self, connection: Connection) -> None:
        # Delivered with the commit, once, however often it was said. A transaction without an id of its own wrote nothing.
        connection.exec_driver_sql(
            f"SELECT pg_notify('{CHANNEL}', '') WHERE pg_current_xact_id_if_assigned() IS NOT NULL")

    def tell(self, connection: Connection, resources: Collection[str]) -> None:
        # A member of a group that is rolled back tells nothing: a savepoint takes its notifications with it.
        named = sorted(resources)
        for first in range(0, len(named), TOLD_AT_ONCE):
            connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (CHANNEL, " ".join(named[first:first + TOLD_AT_ONCE])))

    async def heard(self) -> AsyncIterator[Sequence[str]]:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(**self.conninfo, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    yield ()  # what was said before is missed
                    async for notice in connection.notifies():
                        yield notice.payload.split()
            except (psycopg.Error, OSError) as lost:  # a standby does not listen; the password's file may be just replaced
                log.warning("other controllers are not heard: %s", " ".join(str(lost).split()))
            await asyncio.sleep(1.0)

    def is_open(self, connection: Connection) -> bool:
        if connection.invalidated:
            return False
        raw: Any = connection.connection.dbapi_connection
        return raw.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)

    @contextmanager
    def unreferenced(self, connection: Connection) -> Iterator[None]:
        yield

    @staticmethod
    def version(connection: Connection) -> int:
        if connection.exec_driver_sql("SELECT to_regclass('schema_version')").scalar_one() is None:
            return 0
        return int(connection.exec_driver_sql("SELECT version FROM schema_version").scalar_one())

    def set_version(self, connection: Connection, version: int) -> None:
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        connection.exec_driver_sql("DELETE FROM schema_version")
        connection.exec_driver_sql(f"INSERT INTO schema_version (version) VALUES ({version})")

    @staticmethod
    def flaws(connection: Connection) -> Iterator[tuple[str, str, str]]:
        """References are held to by the server, and its files are its own affair."""
        return iter(())
