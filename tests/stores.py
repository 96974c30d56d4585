"""Where the rows of tests are: in SQLite, or with ``SKYSAIL_TEST_DATABASE=postgresql`` in databases of a PostgreSQL of one's
own, Debian's, which runs unprivileged in a temporary folder on a unix socket for as long as the test run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from sqlalchemy import Connection, text

from skysail.kit.config import Config
from skysail.store.database import Database
from skysail.store.postgres import Postgres
from skysail.store.sqlite import Sqlite

POSTGRESQL = os.environ.get("SKYSAIL_TEST_DATABASE", "sqlite") == "postgresql"
# How bytes are written in SQL, their digits in the first group of a match.
BLOB = r"'\\x\1'" if POSTGRESQL else r"x'\1'"
# Whom Debian's package makes; a server refuses to run as root.
_ACCOUNT = "postgres"
# Who runs the tests is let in by the kernel's word (peer), as whoever the test wants to be; ``guarded`` shows a password.
_ACCESS = "local all guarded scram-sha-256\nlocal all all peer map=tests\n"


class Server:
    """A PostgreSQL in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        (programs,) = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))[-1:] or [None]
        assert programs, "PostgreSQL is not installed: apt-get install postgresql"
        self._programs = programs.parent
        self._as = ["setpriv", f"--reuid={_ACCOUNT}", f"--regid={_ACCOUNT}", "--clear-groups"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(folder, _ACCOUNT, _ACCOUNT)
        folder.chmod(0o755)
        self._log = (folder / "log").open("ab")
        self._do("initdb", "-U", "skysail", "--auth=peer", "--no-sync", "--encoding=UTF8", "--locale=C")
        (folder / "data/pg_hba.conf").write_text(_ACCESS)
        (folder / "data/pg_ident.conf").write_text("tests /^.*$ skysail\n")
        self.start()

    def start(self) -> None:
        """Run it, and wait until it answers. It ends with the tests, however they end; the machine's power stays on."""
        self.process = subprocess.Popen(
            [*self._as, *(["--pdeathsig=QUIT"] if self._as else []), self._programs / "postgres", "-D", self.folder / "data",
             "-k", self.folder, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200"],
            stdout=self._log, stderr=self._log, cwd="/")
        end = time.monotonic() + 120
        while True:
            try:
                return self.run("SELECT 1")
            except psycopg.OperationalError:
                assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()[-3000:]
                time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash of the machine would."""
        if self.process.poll() is None:
            self._do("pg_ctl", "stop", "-m", "immediate")
            self.process.wait()

    def _do(self, program: str, *words: str) -> None:
        subprocess.run([*self._as, self._programs / program, "-D", self.folder / "data", *words], check=True,
                       stdout=self._log, stderr=self._log, cwd="/")

    def run(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(host=str(self.folder), user="skysail", dbname=database, autocommit=True) as connection:
            connection.execute(statement)

    def url(self, name: str, user: str = "skysail") -> str:
        return f"postgresql://{user}@/{name}?host={self.folder}"

    def create(self) -> str:
        """The URL of a new database."""
        name = f"cloud{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
        return self.url(name)

    def remove(self) -> None:
        self.stop()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def server() -> Server:
    """This test run's."""
    made = Server(Path(tempfile.mkdtemp(prefix="skypg")))
    atexit.register(made.remove)
    return made


def setting() -> str:
    """The line of a new cloud's configuration that says where its rows are."""
    return f'database = "{server().create()}"\n' if POSTGRESQL else ""


def fresh(folder: Path) -> Database:
    """An empty database; on SQLite in ``folder``."""
    return Database(Postgres(server().create()) if POSTGRESQL else folder / "skysail.sqlite")


@contextlib.contextmanager
def transaction(config: Config, write: bool = True) -> Iterator[Connection]:
    """A transaction behind the controller's back."""
    database = Database.of(config)
    try:
        with database.transaction(write) as connection:
            yield connection
    finally:
        database.close()


def rows(config: Config, query: str, **values: object) -> list[dict[str, Any]]:
    """What a query in SQL finds."""
    with transaction(config, write=False) as connection:
        return [dict(row) for row in connection.execute(text(query), values).mappings()]


def change(config: Config, statement: str, **values: object) -> int:
    """How many rows a statement in SQL changed."""
    with transaction(config) as connection:
        return int(connection.execute(text(statement), values).rowcount)


@contextlib.contextmanager
def unreferenced(config: Config) -> Iterator[Connection]:
    """A transaction in which no reference is looked at."""
    engine = (Postgres(config.database) if config.database else Sqlite(config.sqlite_file)).engine()
    with engine.connect() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica" if config.database else "PRAGMA foreign_keys=OFF")
        yield connection
    engine.dispose()


@contextlib.contextmanager
def put_back(config: Config) -> Iterator[None]:
    """Whatever is done to the rows meanwhile is undone. Nobody else may be connected."""
    if config.database:
        name = urlsplit(config.database).path.strip("/")
        server().run(f"CREATE DATABASE former TEMPLATE {name}")
        yield
        for statement in (f"DROP DATABASE {name} WITH (FORCE)", f"ALTER DATABASE former RENAME TO {name}"):
            server().run(statement)
        return
    with unreferenced(config) as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    before = config.sqlite_file.read_bytes()
    yield
    for tail in ("-wal", "-shm"):
        config.sqlite_file.with_name(config.sqlite_file.name + tail).unlink(missing_ok=True)
    config.sqlite_file.write_bytes(before)
