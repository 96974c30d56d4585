"""Leases: which controller does what, where several work on one database.

Each piece of work that only one of them shall do has a name. Each controller says once in a while that it lives, by the
database's clock; the names are divided among those that live, and one that stopped saying so loses its own within seconds. A
lease has a number, which grows when it changes hands. Whoever writes by virtue of a lease asks for it in the same transaction
(:meth:`Lease.confirm`), so a controller that stood still, and does not know that it was taken for dead, writes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from skysail.store.database import Database
from skysail.store.schema import controllers, leases

log = logging.getLogger(__name__)
# How long a controller is taken to live after it said so, and how often it does.
LIFE_SECONDS, BEAT_SECONDS = 5.0, 1.0
# Made once: each transaction of a workflow or a host asks it, and to put it together takes longer than to ask.
_HELD = select(leases.c.holder, leases.c.number).where(leases.c.name == bindparam("of_name"))


# Asked first in a transaction: raises LeaseLost where another controller does this now.
Confirm = Callable[[Connection], None]


class LeaseLost(Exception):
    """Another controller does this now: what was begun by virtue of the lease is undone."""


def alone(connection: Connection) -> None:
    """The :data:`Confirm` of somebody who shares the database with nobody."""


@dataclass(frozen=True)
class Lease:
    """``holder`` may do what ``name`` says, as long as ``number`` is the lease's."""

    name: str
    holder: str
    number: int

    def confirm(self, connection: Connection) -> None:
        """Raises :class:`LeaseLost` unless it is still so; in a writing transaction, until that is committed."""
        row = connection.execute(_HELD, {"of_name": self.name}).first()
        if row is None or (row.holder, row.number) != (self.holder, self.number):
            raise LeaseLost(f"{self.name} is done by another controller")


class Shares:
    """One controller's share of the work in ``database``. ``place`` is what no two controllers that run have in common, but
    one and its successor; ``wanted`` names all that there is to do; ``agree`` is told the database's time once in a while."""

    def __init__(self, database: Database, place: str, wanted: Callable[[Connection], Iterable[str]],
                 agree: Callable[[float], None] = lambda now: None) -> None:
        self.holder = f"{uuid.uuid4()}"
        self._database = database
        self._place = place
        self._wanted = wanted
        self._agree = agree
        self._held: dict[str, Lease] = {}

    def find(self, name: str) -> Lease | None:
        """The lease of ``name``, where this controller held it when it was last renewed."""
        return self._held.get(name)

    def claim(self, name: str) -> Confirm | None:
        """The same, as what is asked in each transaction."""
        lease = self._held.get(name)
        return lease.confirm if lease is not None else None

    def renew(self) -> bool:
        """Live on, and take what is ours to do; whether that changed. Called every ``BEAT_SECONDS``."""
        with self._database.transaction() as connection:
            held = self._divide(connection)
        # What is as it was stays the same object: those that are asked together are told apart by that.
        held = {name: self._held[name] if self._held.get(name) == lease else lease for name, lease in held.items()}
        changed = held != self._held
        for what, names in (("done here", held.keys() - self._held.keys()),
                            ("done by another controller", self._held.keys() - held.keys())):
            if names:
                log.info("from now on %s: %s", what, ", ".join(sorted(names)))
        self._held = held
        return changed

    def leave(self) -> None:
        """Live no longer: the others need not wait."""
        with self._database.transaction() as connection:
            connection.execute(delete(controllers).where(controllers.c.id == self.holder))
        self._held = {}

    def _divide(self, connection: Connection) -> dict[str, Lease]:
        now = self._database.now(connection)
        self._agree(now)
        # Whoever was in this place before is gone, or about to.
        gone = (controllers.c.place == self._place) & (controllers.c.id != self.holder)
        until = connection.execute(select(controllers.c.until).where(controllers.c.id == self.holder)).scalar()
        if until is None or until >= now:
            gone |= controllers.c.until < now
        # else nobody could say so for a while, the others neither: they have until the next beat.
        connection.execute(delete(controllers).where(gone))
        if not connection.execute(update(controllers).where(controllers.c.id == self.holder).values(
                until=now + LIFE_SECONDS)).rowcount:
            connection.execute(insert(controllers).values(id=self.holder, place=self._place, until=now + LIFE_SECONDS))
        living = set(connection.execute(select(controllers.c.id)).scalars())
        known = {row.name: row for row in connection.execute(select(leases))}
        held: dict[str, Lease] = {}
        for name in set(self._wanted(connection)):
            row = known.pop(name, None)
            mine = _chosen(name, living) == self.holder
            if row is not None and row.holder == self.holder:
                if mine:
                    held[name] = Lease(name, self.holder, row.number)
                else:  # to one who came later
                    connection.execute(update(leases).where(leases.c.name == name).values(holder=""))
            elif mine and (row is None or row.holder not in living):
                held[name] = Lease(name, self.holder, row.number + 1 if row is not None else 1)
                if row is None:
                    connection.execute(insert(leases).values(name=name, holder=self.holder, number=1))
                else:
                    connection.execute(update(leases).where(leases.c.name == name).values(
                        holder=self.holder, number=row.number + 1))
        if known:  # their work is there no more
            connection.execute(delete(leases).where(leases.c.name.in_(known)))
        return held


def _chosen(name: str, living: Collection[str]) -> str:
    """Who of them has the name: evenly, and such that few names change hands when somebody comes or goes (rendezvous
    hashing)."""
    return max(living, key=lambda controller: hashlib.blake2b(f"{controller} {name}".encode()).digest())


def living(database: Database, connection: Connection) -> list[str]:
    """The places of the controllers that work on the database."""
    return [*connection.execute(select(controllers.c.place).where(controllers.c.until >= database.now(connection))
                                .order_by(controllers.c.place)).scalars()]
