"""Pages: keyset pagination behind Lightsail's opaque page tokens."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from skysail.kit.errors import invalid_input

PAGE_SIZE = 100
T = TypeVar("T")


def page(rows: Sequence[T], token: str | None, *, key: Callable[[T], str]) -> tuple[list[T], str | None]:
    """The page of ``rows`` (sorted by ``key``) behind ``token``, and the token of the next one (None at the end)."""
    after = _decode(token) if token else ""
    rest = [row for row in rows if key(row) > after]
    found = rest[:PAGE_SIZE]
    return found, _encode(key(found[-1])) if len(rest) > PAGE_SIZE else None


def _encode(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        raise invalid_input("The pageToken is not one of ours.", "Start again without it.") from None
