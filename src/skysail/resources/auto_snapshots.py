"""Automatic snapshots: taken each day of what has the add-on, the last seven kept; GetAutoSnapshots, DeleteAutoSnapshot.

They are snapshots without a name of their own: what lists, restores or copies them goes by their source and their day. They
go with their source. Source: Lightsail API reference, data type AutoSnapshotDetails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, select, update

from skysail.kit.clock import Clock
from skysail.kit.errors import ApiError
from skysail.operations import history
from skysail.operations.workflow import Step, Workflow
from skysail.resources import add_on_schedule as schedule
from skysail.resources import disk_snapshots, instance_snapshots, snapshot_choice, snapshot_rows
from skysail.resources.add_ons import get_source
from skysail.resources.request import Request
from skysail.store.schema import add_ons, disks, instances

KEPT = 7
STATUS = {"pending": "InProgress", "available": "Success", "completed": "Success", "error": "Failed"}


class AutoSnapshots:
    """The actions on automatic snapshots."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetAutoSnapshots": self.list_, "DeleteAutoSnapshot": self.delete}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Newest first."""
        source = get_source(connection, request, request.params["resourceName"])
        rows = snapshot_rows.automatic(connection, source["resource_id"])
        return {"resourceName": source["name"], "resourceType": source["resource_type"], "autoSnapshots": [{
            "date": row["auto_day"], "createdAt": row["created_at"], "status": STATUS[row["state"]],
            "fromAttachedDisks": [{"path": one["path"], "sizeInGb": one["sizeInGb"]}
                                  for one in row["source"].get("disks", [])]} for row in rows]}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Gone, also while it is being made; its day gets no other."""
        source = get_source(connection, request, request.params["resourceName"])
        rows = snapshot_rows.automatic(connection, source["resource_id"])
        row = snapshot_choice.of_day(rows, source["name"], request.params["date"])
        snapshot_rows.discard(connection, row)
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type=request.action, resource_name=source["name"],
            resource_type=source["resource_type"], resource_id=source["resource_id"], details=row["auto_day"])]}


def follow(connection: Connection, now: float) -> int:
    """Begin each snapshot that is due; how many. That it was begun, and that its day needs none any more, is one commit: no
    crash takes two for one day, or forgets one. A source that is just being changed is asked again."""
    begun = 0
    for row in connection.execute(select(add_ons).where(
            add_ons.c.enabled.is_(True), add_ons.c.last_day < schedule.day_of(now))).mappings().all():
        day = schedule.due(row, now)
        if day is not None and _begin(connection, row, day, now):
            connection.execute(update(add_ons).where(add_ons.c.resource_id == row["resource_id"]).values(last_day=day))
            begun += 1
    return begun


def _begin(connection: Connection, row: RowMapping, day: str, now: float) -> bool:
    table, kind = (instances, "InstanceSnapshot") if row["resource_type"] == "Instance" else (disks, "DiskSnapshot")
    source = connection.execute(select(table).where(table.c.id == row["resource_id"])).mappings().one()
    try:
        held = instance_snapshots.content(connection, source, now) if table is instances \
            else disk_snapshots.content(connection, source)
    except ApiError:
        return False
    request = Request(account_id=source["account_id"], region=source["region"], action=f"Create{kind}", params={})
    identifier = snapshot_rows.new_id()
    snapshot_rows.write(connection, request, identifier, f"auto-{day}", kind, now=now, auto_day=day, **held)
    history.record(connection, request, now=now, type=request.action, resource_name=source["name"],
                   resource_type=row["resource_type"], resource_id=identifier, zone=source["zone"], status="Started",
                   workflow="automatic snapshot", arguments={"snapshot": identifier, "source": source["id"]})
    return True


def _keep_seven(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The oldest go, once the new one is whole; failed ones with the day that they were of."""
    rows = snapshot_rows.automatic(connection, operation["arguments"]["source"])
    whole = [row["auto_day"] for row in rows if STATUS[row["state"]] == "Success"]
    for row in rows:
        if len(whole) >= KEPT and row["auto_day"] < whole[KEPT - 1]:
            snapshot_rows.discard(connection, row)
    return True


WORKFLOWS = {"automatic snapshot": Workflow("automatic snapshot", (
    snapshot_rows.AWAIT_WHOLE, Step("keep seven", _keep_seven)))}
