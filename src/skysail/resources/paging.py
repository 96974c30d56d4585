"""Pages: keyset pagination behind Lightsail's opaque page tokens.

A token holds the sort key of its page's last row, so rows that come and go between two calls neither repeat nor hide others.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Column, Connection, RowMapping, Select, tuple_

from skysail.kit.errors import invalid_input

PAGE_SIZE = 100
T = TypeVar("T")


def page(rows: Sequence[T], token: str | None, *, key: Callable[[T], str]) -> tuple[list[T], str | None]:
    """The page of ``rows`` (few, and sorted by ``key``) behind ``token``, and the token of the next one (None at the end)."""
    after = _decode(token, (str,))[0] if token else ""
    rest = [row for row in rows if key(row) > after]
    found = rest[:PAGE_SIZE]
    return found, _encode([key(found[-1])]) if len(rest) > PAGE_SIZE else None


def read(connection: Connection, query: Select[Any], token: str | None, *keys: Column[Any],
         newest_first: bool = False) -> tuple[Sequence[RowMapping], str | None]:
    """The page of ``query`` behind ``token``, sorted by ``keys`` (together unique, and an index's next columns after those
    that the query compares), and the token of the next one. Reads no row of another page."""
    if token:
        after, last = tuple_(*keys), tuple_(*_decode(token, tuple(key.type.python_type for key in keys)))
        query = query.where(after < last if newest_first else after > last)
    rows = connection.execute(query.order_by(*(key.desc() if newest_first else key for key in keys))
                              .limit(PAGE_SIZE + 1)).mappings().all()
    found = rows[:PAGE_SIZE]
    return found, _encode([found[-1][key.name] for key in keys]) if len(rows) > PAGE_SIZE else None


def _encode(last: list[str | float]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(last)).decode()


def _decode(token: str, types: tuple[type, ...]) -> tuple[Any, ...]:
    try:
        found = msgspec.json.decode(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        return tuple(msgspec.convert(value, kind) for value, kind in zip(found, types, strict=True))
    except (binascii.Error, UnicodeError, ValueError, TypeError):
        raise invalid_input("The pageToken is not one of ours.", "Start again without it.") from None
