"""What differs between the databases that rows are kept in: a door with two engines, ``sqlite`` and ``postgres``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Engine

# How many connections are kept.
POOLED = 8


class Dialect(Protocol):
    """One database. Connections of its engine begin no transaction by themselves."""

    def engine(self) -> Engine:
        """A pool of connections."""
        ...

    def check(self) -> None:
        """Raises SkysailError when the database cannot be reached, or rows cannot be kept in it."""
        ...

    def exists(self) -> bool:
        """Whether a controller made its tables here. Raises SkysailError when the database cannot be reached."""
        ...

    def begin(self, connection: Connection, write: bool) -> None:
        """Begin a transaction. One that writes waits until it is the only one, and sees all that was committed before; one
        that reads sees one moment throughout."""
        ...

    def say(self, connection: Connection, statement: str) -> None:
        """A statement that ends a transaction, or begins or ends a savepoint, which all databases have in common."""
        ...

    def now(self, connection: Connection) -> float:
        """Seconds since the epoch by the database's own clock, which all controllers have in common."""
        ...

    def let_stand(self, connection: Connection) -> None:
        """The open transaction may take its time between statements."""
        ...

    def announce(self, connection: Connection) -> None:
        """The transaction is about to be committed: other controllers learn of it, if it wrote."""
        ...

    def tell(self, connection: Connection, resources: Collection[str]) -> None:
        """With its commit, other controllers learn that the transaction wrote something of ``resources``."""
        ...

    def heard(self) -> AsyncIterator[Sequence[str]]:
        """After each announcement of anybody the resources that it tells of, if any, and none of them whenever one may have
        been missed; until cancelled."""
        ...

    def is_open(self, connection: Connection) -> bool:
        """Whether a transaction is open, to the database's own knowledge."""
        ...

    def unreferenced(self, connection: Connection) -> AbstractContextManager[None]:
        """While it lasts, a table may be missing to those that refer to it, where the database needs that to change one."""
        ...

    def version(self, connection: Connection) -> int:
        """The schema's version; 0 where there are no tables, negative in a copy that no controller has worked on yet."""
        ...

    def set_version(self, connection: Connection, version: int) -> None: ...

    def flaws(self, connection: Connection) -> Iterator[tuple[str, str, str]]:
        """What the database itself finds wrong with what it holds: where, what is there, what should be."""
        ...
