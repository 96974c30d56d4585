"""GetOperation, GetOperations, GetOperationsForResource: the customer's view of the operation rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select

from skysail.kit.errors import not_found
from skysail.operations import history
from skysail.resources import paging
from skysail.resources.request import Request
from skysail.store.schema import operations


class OperationLog:
    """Reads operations; newest first."""

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetOperation": self.get, "GetOperations": self.list,
                "GetOperationsForResource": self.list_for_resource}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = connection.execute(select(operations).where(
            operations.c.id == request.params["operationId"], operations.c.account_id == request.account_id,
            operations.c.region == request.region)).mappings().first()
        if row is None:
            raise not_found(f"The Operation does not exist: {request.params['operationId']}")
        return {"operation": history.shape(row)}

    def list(self, connection: Connection, request: Request) -> dict[str, Any]:
        return self._page(connection, request, None)

    def list_for_resource(self, connection: Connection, request: Request) -> dict[str, Any]:
        found = self._page(connection, request, request.params["resourceName"])
        if not found["operations"] and not request.params.get("pageToken"):
            raise not_found(f"No operation is recorded for {request.params['resourceName']}.")
        return found

    def _page(self, connection: Connection, request: Request, resource: str | None) -> dict[str, Any]:
        query = select(operations).where(
            operations.c.account_id == request.account_id, operations.c.region == request.region)
        if resource is not None:
            query = query.where(operations.c.resource_name == resource)
        found, token = paging.read(connection, query, request.params.get("pageToken"), operations.c.created_at,
                                   operations.c.id, newest_first=True)
        return {"operations": [history.shape(row) for row in found], "nextPageToken": token}
