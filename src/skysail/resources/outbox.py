"""The outbox: notices on their way, written with what they tell of and deleted once they were taken over.

A courier that is killed between the two sends one again, never none.
"""

from __future__ import annotations

import uuid

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.notices import Notice, Undeliverable
from skysail.store.schema import contact_methods, deliveries

# The first attempts come soon; an address that cannot be reached is tried for as long as mail is (RFC 5321, 4.5.4.1).
BACK_OFF_SECONDS = (5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
GIVE_UP_SECONDS = 4 * 86400.0
PORTION = 20


def put(connection: Connection, contact: RowMapping, subject: str, body: str, now: float) -> None:
    """A notice to a contact method goes out behind this transaction."""
    connection.execute(insert(deliveries).values(
        id=str(uuid.uuid4()), contact_method_id=contact["id"], endpoint=contact["endpoint"], subject=subject, body=body,
        created_at=now, due_at=now))


def due(connection: Connection, now: float) -> list[Notice]:
    """Notices to send now, the longest waiting first."""
    return [Notice(id=row.id, endpoint=row.endpoint, subject=row.subject, body=row.body, at=row.created_at)
            for row in connection.execute(select(deliveries).where(deliveries.c.due_at <= now)
                                          .order_by(deliveries.c.due_at).limit(PORTION))]


def delivered(connection: Connection, identifier: str) -> None:
    """The receiver took it over."""
    connection.execute(delete(deliveries).where(deliveries.c.id == identifier))


def failed(connection: Connection, identifier: str, failure: Undeliverable, now: float) -> None:
    """Try it again later; a receiver that does not exist makes its contact method ``Invalid``, and ends it."""
    row = connection.execute(select(deliveries).where(deliveries.c.id == identifier)).mappings().first()
    if row is None:
        return  # its contact method was deleted meanwhile
    attempts = row["attempts"] + 1
    later: float | None = now + BACK_OFF_SECONDS[min(attempts, len(BACK_OFF_SECONDS)) - 1]
    if failure.final or now - row["created_at"] > GIVE_UP_SECONDS:
        later = None
    connection.execute(update(deliveries).where(deliveries.c.id == identifier).values(
        attempts=attempts, due_at=later, error=str(failure)[:500]))
    if failure.final:
        connection.execute(update(contact_methods).where(contact_methods.c.id == row["contact_method_id"]).values(
            status="Invalid"))


def forget(connection: Connection, contact_method_id: str) -> None:
    """Whatever is on its way to a contact method is not sent any more."""
    connection.execute(delete(deliveries).where(deliveries.c.contact_method_id == contact_method_id))
