"""Operation rows: record one, move its status, render it as the API's Operation shape.

Source: Lightsail API reference, data type Operation. ``NotStarted`` is never shown: Lightsail never answers it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from skysail.store.schema import operations

# Made once, for every request and every step comes by: to put a statement together takes longer than SQLite takes to run it.
_RECORD = insert(operations)
_FIND = select(operations).where(operations.c.id == bindparam("of_id"))
_SETTLE = update(operations).where(
    operations.c.id == bindparam("of_id"), operations.c.status.not_in(("Succeeded", "Failed", "Completed"))).values(
    status=bindparam("new_status"), status_changed_at=bindparam("at"), error_code=bindparam("code"),
    error_details=bindparam("why"))


class Asker(Protocol):
    """Who asks, and in which region."""

    @property
    def account_id(self) -> str: ...
    @property
    def region(self) -> str: ...


def record(connection: Connection, request: Asker, *, now: float, type: str, resource_name: str, resource_type: str,
           resource_id: str, zone: str = "", status: str = "Succeeded", details: str = "", workflow: str = "",
           arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write one operation and return its API shape. With a ``workflow`` the engine carries it on after the commit."""
    row = {"id": str(uuid.uuid4()), "account_id": request.account_id, "region": request.region, "zone": zone, "type": type,
           "resource_name": resource_name, "resource_type": resource_type, "resource_id": resource_id, "status": status,
           "details": details, "created_at": now, "status_changed_at": now, "workflow": workflow, "done": not workflow,
           "arguments": arguments or {}, "error_code": None, "error_details": None}
    connection.execute(_RECORD, row)
    return shape(row)


def find(connection: Connection, identifier: str) -> RowMapping:
    """The row of operation ``identifier``; raises NoResultFound."""
    return connection.execute(_FIND, {"of_id": identifier}).mappings().one()


def settle(connection: Connection, identifier: str, status: str, now: float, *, error_code: str | None = None,
           error_details: str | None = None) -> None:
    """Give the operation its last status, once: a terminal status is never changed."""
    connection.execute(_SETTLE, {"of_id": identifier, "new_status": status, "at": now, "code": error_code,
                                 "why": error_details})


def shape(row: RowMapping | Mapping[str, Any]) -> dict[str, Any]:
    """The API's Operation."""
    return {
        "id": row["id"], "resourceName": row["resource_name"], "resourceType": row["resource_type"],
        "createdAt": row["created_at"],
        "location": {"availabilityZone": row["region"] + row["zone"] if row["zone"] else "all",
                     # A domain belongs to no region, though it is asked for in one.
                     "regionName": "global" if row["resource_type"] == "Domain" else row["region"]},
        "isTerminal": row["status"] in ("Succeeded", "Failed", "Completed"),
        "operationDetails": row["details"] or None, "operationType": row["type"], "status": row["status"],
        "statusChangedAt": row["status_changed_at"], "errorCode": row["error_code"],
        "errorDetails": row["error_details"],
    }
