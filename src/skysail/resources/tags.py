"""Tags: TagResource, UntagResource, and what other nouns need to show and write them.

Limits after the Lightsail API reference: 50 tags a resource, keys up to 128, values up to 256 characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select

from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import names
from skysail.resources.request import Request
from skysail.store.schema import tags

MAX_TAGS = 50
Tagged = dict[str, list[dict[str, Any]]]
# Made once: whatever is shown has tags.
_OF = select(tags).where(tags.c.resource_id.in_(bindparam("of_resources", expanding=True))).order_by(tags.c.key)


def put(connection: Connection, resource_id: str, wanted: Sequence[dict[str, Any]]) -> None:
    """Add or replace tags; raises InvalidInputException past the limits."""
    for tag in wanted:
        key, value = tag.get("key") or "", tag.get("value")
        if not 1 <= len(key) <= 128 or len(value or "") > 256:
            raise invalid_input("A tag has a key of 1 to 128 characters and a value of up to 256.")
        connection.execute(delete(tags).where(tags.c.resource_id == resource_id, tags.c.key == key))
        connection.execute(insert(tags).values(resource_id=resource_id, key=key, value=value))
    if len(connection.execute(select(tags.c.key).where(tags.c.resource_id == resource_id)).all()) > MAX_TAGS:
        raise invalid_input(f"A resource takes at most {MAX_TAGS} tags.")


def forget(connection: Connection, resource_id: str) -> None:
    """Remove every tag of a resource that goes away."""
    connection.execute(delete(tags).where(tags.c.resource_id == resource_id))


def of(connection: Connection, resource_ids: Sequence[str]) -> Tagged:
    """The tags of each resource in API shape, sorted by key; a key-only tag has no value."""
    found: Tagged = {}
    for row in connection.execute(_OF, {"of_resources": resource_ids}):
        shape = {"key": row.key} if row.value is None else {"key": row.key, "value": row.value}
        found.setdefault(row.resource_id, []).append(shape)
    return found


class Tags:
    """The actions on tags."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"TagResource": self.tag, "UntagResource": self.untag}

    def tag(self, connection: Connection, request: Request) -> dict[str, Any]:
        resource = self._resource(connection, request)
        put(connection, resource["resource_id"], request.params["tags"])
        return self._done(connection, request, resource)

    def untag(self, connection: Connection, request: Request) -> dict[str, Any]:
        resource = self._resource(connection, request)
        connection.execute(delete(tags).where(tags.c.resource_id == resource["resource_id"],
                                              tags.c.key.in_(request.params["tagKeys"])))
        return self._done(connection, request, resource)

    def _resource(self, connection: Connection, request: Request) -> RowMapping:
        name = request.params["resourceName"]
        found = names.find(connection, request, name)
        if found is None and request.region == self._config.default_region:  # where domains are managed
            found = names.find(connection, names.everywhere(request), name)
        if found is None:
            raise not_found(f"The resource does not exist: {name}")
        return found

    def _done(self, connection: Connection, request: Request, resource: RowMapping) -> dict[str, Any]:
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=resource["name"],
            resource_type=resource["resource_type"], resource_id=resource["resource_id"])]}
