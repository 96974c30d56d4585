"""The database as one thing: open it, migrate it, take a transaction.

One transaction writes at a time, and waits for its turn at its start, so two requests never both read a name as free: not in
one controller, and not in several that share a PostgreSQL.

Writing transactions that come while another one is under way share its commit, each as a savepoint of its own: one sync of
the disk for all of them (group commit). Nobody outside sees, and no caller goes on with, what is not on the disk.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.store import migrations
from skysail.store.dialect import POOLED, Dialect
from skysail.store.postgres import Postgres
from skysail.store.schema import metadata
from skysail.store.sqlite import Sqlite

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
    """One controller's store: a SQLite file, or what another dialect opens."""

    def __init__(self, store: Path | Dialect) -> None:
        # SQLite lets a writer that has to wait sleep for up to 100 ms at a time, and whoever comes first then goes first.
        # Only writers of other processes (the operator's, other controllers) are met that way; those of this one wait here.
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._group: _Group | None = None
        self._dialect = Sqlite(store) if isinstance(store, Path) else store
        self._engine = self._dialect.engine()

    @classmethod
    def of(cls, config: Config) -> Database:
        """The database that the configuration names."""
        return cls(_dialect(config))

    def migrate(self) -> None:
        """Bring the schema to this version; safe to repeat, all migrations one transaction. Raises SkysailError when the
        database cannot be reached or used, RuntimeError when it is of a newer version."""
        self._dialect.check()
        with self._engine.connect() as connection, self._dialect.unreferenced(connection):
            self._dialect.begin(connection, write=True)
            with self._ended(connection):
                version = self._dialect.version(connection)
                migrations.upgrade(connection, abs(version))
                if version != len(migrations.MIGRATIONS):
                    self._dialect.set_version(connection, len(migrations.MIGRATIONS))

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    def exists(self) -> bool:
        """Whether a controller made its tables here. Raises SkysailError when the database cannot be reached."""
        return self._dialect.exists()

    def check(self) -> None:
        """Raises SkysailError when the database cannot be reached, or rows cannot be kept in it."""
        self._dialect.check()

    def now(self, connection: Connection) -> float:
        """Seconds since the epoch by the database's own clock, which all controllers have in common."""
        return self._dialect.now(connection)

    def require_current(self, connection: Connection) -> None:
        """Raises SkysailError unless the schema is this program's."""
        version = self._dialect.version(connection)
        if version != len(migrations.MIGRATIONS):
            raise SkysailError(f"the database has schema version {version}, this program's is {len(migrations.MIGRATIONS)}",
                               "run: sudo ./skysail up")

    def begin_copy(self, connection: Connection) -> None:
        """Make empty tables for a copy, which may take its time; a copy that no controller has worked on makes way. Raises
        SkysailError when there is a cloud here."""
        self._dialect.let_stand(connection)
        if self._dialect.version(connection) > 0:
            raise SkysailError("the database to move to holds a cloud already", "name an empty one")
        metadata.drop_all(connection)
        metadata.create_all(connection)
        self._dialect.set_version(connection, -len(migrations.MIGRATIONS))

    def tell(self, connection: Connection, resources: Collection[str]) -> None:
        """Let all controllers hear that this transaction, which writes, wrote something of these resources, once it is
        committed."""
        self._dialect.tell(connection, resources)

    async def heard(self) -> AsyncIterator[Sequence[str]]:
        """Each time another controller, or this one, may have committed something: of which resources, as far as it was
        told."""
        async for resources in self._dialect.heard():
            yield resources

    def transaction(self, write: bool = True) -> AbstractContextManager[Connection]:
        """A transaction: committed at the end of the ``with`` block, rolled back by an exception. One that writes must not
        be begun within another one that does."""
        return self._write() if write else self._read()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        connection = self._begun(write=False)
        with connection, self._ended(connection):
            yield connection

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
                with self._savepoint(group):
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

    @contextmanager
    def _savepoint(self, group: _Group) -> Iterator[None]:
        """One member of the group: what it wrote goes with its exception, what the others wrote stays. Where that cannot be
        (a full disk makes SQLite give up the whole transaction), the group has failed."""
        connection, say = group.connection, self._dialect.say
        try:
            say(connection, "SAVEPOINT member")
        except BaseException as failure:  # the connection was lost, with what others of the group wrote
            group.failure = failure
            raise
        try:
            yield
        except BaseException as raised:
            try:
                say(connection, "ROLLBACK TO member")
                say(connection, "RELEASE member")
            except BaseException:
                group.failure = raised
            raise
        try:
            say(connection, "RELEASE member")
        except BaseException as failure:
            group.failure = failure
            raise
        group.members += 1

    def _open(self) -> _Group:
        self._group = _Group(self._begun(write=True))
        return self._group

    def _close(self, group: _Group) -> None:
        """Commit the group, or fail all of it."""
        self._group = None
        try:
            if group.failure is None:
                self._dialect.announce(group.connection)
                group.connection.exec_driver_sql("COMMIT")
        except BaseException as failure:
            group.failure = failure
        finally:
            try:
                if self._dialect.is_open(group.connection):
                    group.connection.exec_driver_sql("ROLLBACK")
                group.connection.close()
            finally:
                group.ended.set()

    def _begun(self, write: bool) -> Connection:
        """A connection with a transaction. One that was kept may have been lost meanwhile: nothing was begun on it yet, so
        that another one will do."""
        for attempt in range(POOLED + 1):
            connection = self._engine.connect()
            try:
                self._dialect.begin(connection, write)
                return connection
            except BaseException as failure:
                connection.close()
                if attempt == POOLED or not (isinstance(failure, DBAPIError) and failure.connection_invalidated):
                    raise
        raise AssertionError

    @contextmanager
    def _ended(self, connection: Connection) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._dialect.is_open(connection):
                self._dialect.say(connection, "ROLLBACK")
            raise
        self._dialect.say(connection, "COMMIT")

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()


def _dialect(config: Config) -> Dialect:
    if config.database:
        return Postgres(config.database, config.database_password_file)
    return Sqlite(config.sqlite_file)


def flaws(connection: Connection) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the database itself: where, what is there, what should be."""
    kind: type[Sqlite] | type[Postgres] = Sqlite if connection.dialect.name == "sqlite" else Postgres
    yield from kind.flaws(connection)
    version = kind.version(connection)
    if version != len(migrations.MIGRATIONS):
        yield "database", f"schema version {version}", f"version {len(migrations.MIGRATIONS)} of this program"
