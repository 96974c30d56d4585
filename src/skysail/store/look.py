"""A look at rows by code that may want to change them: whether it would, without a transaction that writes.

Only one transaction writes at a time. Who is asked again and again whether there is something to do, and mostly finds
nothing, is asked within a transaction that reads first.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Connection


class WouldWrite(Exception):
    """There is something to change."""


class _Look:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, statement: Any, *args: Any, **kwargs: Any) -> Any:
        if statement.is_dml:
            raise WouldWrite
        return self._connection.execute(statement, *args, **kwargs)


def look(connection: Connection) -> Connection:
    """The same connection, for who only executes statements: raises :class:`WouldWrite` in place of executing one that
    changes rows."""
    return cast(Connection, _Look(connection))
