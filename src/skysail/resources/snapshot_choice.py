"""Which snapshot a request means: one by its name, or an automatic one by its source and its day."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, RowMapping

from skysail.kit.errors import invalid_input, not_found
from skysail.resources import names, snapshot_rows
from skysail.resources.request import Request
from skysail.resources.snapshot_rows import WHOLE

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# What snapshots are made of.
SOURCES = {"InstanceSnapshot": "Instance", "DiskSnapshot": "Disk"}


def choose(connection: Connection, request: Request, kind: str, named: str, sourced: str) -> RowMapping:
    """The whole snapshot of ``kind`` that the request means: its parameter ``named`` is the snapshot's name, or its parameter
    ``sourced`` that of the instance or disk of which it is an automatic one. Raises InvalidInputException and
    NotFoundException."""
    name, source = request.params.get(named), request.params.get(sourced)
    if bool(name) == bool(source):
        raise invalid_input(f"Name either {named} or {sourced}.")
    if source:
        found = names.find(connection, request, source)
        if found is None or found["resource_type"] != SOURCES[kind]:
            raise not_found(f"The {SOURCES[kind]} does not exist: {source}")
        return automatic(connection, found, request.params)
    refuse_day(request.params, sourced)
    return whole(connection, request, str(name), kind)


def whole(connection: Connection, request: Request, name: str, kind: str) -> RowMapping:
    """The caller's snapshot ``name``, which is whole; raises InvalidInputException and NotFoundException."""
    row = snapshot_rows.get(connection, request, name, kind)
    if row["state"] != WHOLE[kind]:
        raise invalid_input(f"The snapshot {row['name']} is {row['state']}; only one that is {WHOLE[kind]} can be used.")
    return row


def refuse_day(params: dict[str, Any], sourced: str) -> None:
    """Raises InvalidInputException for a request that names a snapshot and a day as well."""
    if params.get("restoreDate") or params.get("useLatestRestorableAutoSnapshot"):
        raise invalid_input(f"restoreDate and useLatestRestorableAutoSnapshot go with {sourced}.",
                            "A snapshot that is named has no other day.")


def automatic(connection: Connection, source: RowMapping, params: dict[str, Any]) -> RowMapping:
    """The whole automatic snapshot of ``source`` (a row of names) that the parameters choose; raises InvalidInputException
    and NotFoundException."""
    day, latest = params.get("restoreDate"), bool(params.get("useLatestRestorableAutoSnapshot"))
    if bool(day) == latest:
        raise invalid_input("Say either restoreDate or useLatestRestorableAutoSnapshot.")
    rows = snapshot_rows.automatic(connection, source["resource_id"])
    if latest:
        whole = [row for row in rows if row["state"] == WHOLE[row["kind"]]]
        if not whole:
            raise not_found(f"{source['name']} has no automatic snapshot that can be restored.")
        return whole[0]
    row = of_day(rows, source["name"], str(day))
    if row["state"] != WHOLE[row["kind"]]:
        raise invalid_input(f"The automatic snapshot of {source['name']} of {day} is {row['state']}; only one that is "
                            "whole can be used.")
    return row


def of_day(rows: Any, name: str, day: str) -> RowMapping:
    """The one of this day among the automatic snapshots of ``name``; raises InvalidInputException and NotFoundException."""
    if not _DAY.fullmatch(day):
        raise invalid_input(f"The date {day[:20]!r} is not valid.", "It has the form 2026-01-31.")
    found: RowMapping | None = next((row for row in rows if row["auto_day"] == day), None)
    if found is None:
        raise not_found(f"{name} has no automatic snapshot of {day}.", "GetAutoSnapshots lists the ones that it has.")
    return found
