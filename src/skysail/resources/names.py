"""One namespace per account and region over all resource types; GetActiveNames.

Clients match the word "already" in the error of a name in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select

from skysail.kit.errors import invalid_input
from skysail.resources import paging
from skysail.resources.request import Request
from skysail.store.schema import names

SYNTAX = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.\-]{0,253}[A-Za-z0-9])")

# The region's default key pair has this name, also before it is made.
DEFAULT_KEY_PAIR = "LightsailDefaultKeyPair"


# Domains belong to no region, and share no names with what does.
GLOBAL = "global"


def everywhere(request: Request) -> Request:
    """The same call, where resources without a region have their names."""
    return replace(request, region=GLOBAL)


def claim(connection: Connection, request: Request, name: str, resource_type: str, resource_id: str) -> None:
    """Take ``name`` for a new resource; raises InvalidInputException when it is malformed or in use."""
    if not SYNTAX.fullmatch(name):
        raise invalid_input(f"The name {name[:60]!r} is not valid.", "A name has 2 to 255 letters, digits, '-', '_' or '.'"
                            " and starts and ends with a letter or digit.")
    if name == DEFAULT_KEY_PAIR and resource_type != "KeyPair":
        raise invalid_input(f"The name {DEFAULT_KEY_PAIR} is kept for the region's default key pair.")
    if find(connection, request, name) is not None:
        raise invalid_input(f"Some names are already in use: {name}")
    connection.execute(insert(names).values(account_id=request.account_id, region=request.region, name=name,
                                            resource_type=resource_type, resource_id=resource_id))


def find(connection: Connection, request: Request, name: str) -> RowMapping | None:
    """The caller's resource ``name``, of whatever type, or None."""
    return connection.execute(select(names).where(
        names.c.account_id == request.account_id, names.c.region == request.region,
        names.c.name == name)).mappings().first()


def release(connection: Connection, account_id: str, region: str, name: str) -> None:
    """The name is free again."""
    connection.execute(delete(names).where(
        names.c.account_id == account_id, names.c.region == region, names.c.name == name))


class Names:
    """GetActiveNames."""

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetActiveNames": self.list}

    def list(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = select(names.c.name).where(names.c.account_id == request.account_id, names.c.region == request.region)
        found, token = paging.read(connection, query, request.params.get("pageToken"), names.c.name)
        return {"activeNames": [row["name"] for row in found], "nextPageToken": token}
