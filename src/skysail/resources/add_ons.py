"""Add-ons: EnableAddOn, DisableAddOn, and what instances and disks show of them. Automatic snapshots are the only one.

Source: Lightsail API reference, data types AddOnRequest and AddOn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select, update

from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import add_on_schedule as schedule
from skysail.resources import names
from skysail.resources.request import Request
from skysail.store.schema import add_ons

NAME = "AutoSnapshot"
DEFAULT_HOUR = 6
# Made once: whatever is shown of an instance comes by.
_OF = select(add_ons).where(add_ons.c.resource_id.in_(bindparam("of_resources", expanding=True)))
_HOUR = re.compile(r"([01][0-9]|2[0-3]):00")


class AddOns:
    """The actions on add-ons."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"EnableAddOn": self.enable, "DisableAddOn": self.disable}

    def enable(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Take a snapshot each day from now on; or at another hour, if it is so already."""
        found = get_source(connection, request, request.params["resourceName"])
        put(connection, found["resource_id"], found["resource_type"], [request.params["addOnRequest"]], self._clock.now())
        return {"operations": [self._record(connection, request, found)]}

    def disable(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Take none any more; those that there are stay until their owner or their source goes."""
        found = get_source(connection, request, request.params["resourceName"])
        _refuse_others(request.params["addOnType"])
        done = connection.execute(update(add_ons).where(
            add_ons.c.resource_id == found["resource_id"], add_ons.c.enabled.is_(True)).values(
            enabled=False, held_day="", held_hour=0))
        if not done.rowcount:
            raise invalid_input(f"The add-on {NAME} is not enabled for {found['name']}.")
        return {"operations": [self._record(connection, request, found)]}

    def _record(self, connection: Connection, request: Request, found: RowMapping) -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=found["name"],
                              resource_type=found["resource_type"], resource_id=found["resource_id"])


def get_source(connection: Connection, request: Request, name: str) -> RowMapping:
    """The row of names of the caller's instance or disk ``name``; raises NotFoundException, or InvalidInputException when it
    is something else."""
    found = names.find(connection, request, name)
    if found is None:
        raise not_found(f"The resource does not exist: {name}")
    if found["resource_type"] not in ("Instance", "Disk"):
        raise invalid_input(f"{name} is of type {found['resource_type']}; automatic snapshots are of instances and disks.")
    return found


def put(connection: Connection, resource_id: str, resource_type: str, wanted: Sequence[dict[str, Any]], now: float) -> None:
    """Enable the add-ons that a request asks for; raises InvalidInputException."""
    for one in wanted:
        _refuse_others(one["addOnType"])
        hour = _hour(one.get("autoSnapshotAddOnRequest") or {})
        row = connection.execute(select(add_ons).where(add_ons.c.resource_id == resource_id)).mappings().first()
        values = schedule.enabled(hour, row, now)
        if row is None:
            connection.execute(insert(add_ons).values(resource_id=resource_id, resource_type=resource_type, **values))
        else:
            connection.execute(update(add_ons).where(add_ons.c.resource_id == resource_id).values(**values))


def _refuse_others(kind: str) -> None:
    if kind != NAME:
        raise invalid_input(f"The add-on {kind[:40]} is not offered by this cloud: it is for virtual computers alone.",
                            f"The add-on that instances and disks take is {NAME}.")


def _hour(asked: dict[str, Any]) -> int:
    text = asked.get("snapshotTimeOfDay")
    if text is None:
        return DEFAULT_HOUR
    if not _HOUR.fullmatch(text):
        raise invalid_input(f"The snapshotTimeOfDay {text[:20]!r} is not valid.",
                            "It is a full hour in Coordinated Universal Time, such as 06:00.")
    return int(text[:2])


def shapes(connection: Connection, resource_ids: Sequence[str], now: float) -> dict[str, list[dict[str, Any]]]:
    """The add-ons of each resource that has any, in API shape. ``nextSnapshotTimeOfDay`` differs from the hour that was
    chosen on the day of a change that begins tomorrow."""
    return {row["resource_id"]: [{
        "name": NAME, "status": "Enabled" if row["enabled"] else "Disabled", "snapshotTimeOfDay": f"{row['hour']:02}:00",
        "nextSnapshotTimeOfDay": f"{schedule.next_hour(row, now):02}:00" if row["enabled"] else None,
    }] for row in connection.execute(_OF, {"of_resources": resource_ids}).mappings()}


def forget(connection: Connection, resource_id: str) -> None:
    """The resource goes, and with it its add-ons."""
    connection.execute(delete(add_ons).where(add_ons.c.resource_id == resource_id))
