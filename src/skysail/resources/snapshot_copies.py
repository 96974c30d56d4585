"""CopySnapshot: a snapshot as another one, in the same region or in another; an automatic one is kept this way.

The request goes to the region that gets the copy. On one host both share the same files, each can be deleted without the
other. Source: Lightsail API reference, CopySnapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, RowMapping

from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import invalid_input, not_found
from skysail.resources import names, regions, snapshot_choice, snapshot_rows
from skysail.resources.add_ons import get_source
from skysail.resources.request import Request


class SnapshotCopies:
    """The action that copies snapshots."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"CopySnapshot": self.copy}

    def copy(self, connection: Connection, request: Request) -> dict[str, Any]:
        """One operation, which ends when the copy is whole."""
        asked = request.params
        if asked["sourceRegion"] not in self._config.regions:
            raise invalid_input(f"The region {asked['sourceRegion'][:60]} does not exist here.",
                                "GetRegions lists the ones that do.")
        row = _chosen(connection, replace(request, region=asked["sourceRegion"]))
        if request.region not in {region for region, _ in regions.places(connection, row["host_id"])}:
            raise invalid_input(f"The host that has the snapshot serves no zone of {request.region}.")
        return {"operations": [snapshot_rows.put(
            connection, request, asked["targetSnapshotName"], row["kind"], now=self._clock.now(), host=row["host_id"],
            guest="", volumes=row["volumes"], source=row["source"], source_id=row["source_id"], size_gib=row["size_gib"],
            duplicates=row["id"], from_auto=row["from_auto"] or bool(row["auto_day"]))]}


def _chosen(connection: Connection, there: Request) -> RowMapping:
    """The snapshot that is to be copied; raises InvalidInputException and NotFoundException."""
    name, source = there.params.get("sourceSnapshotName"), there.params.get("sourceResourceName")
    if bool(name) == bool(source):
        raise invalid_input("Name either sourceSnapshotName or sourceResourceName.")
    if source:
        return snapshot_choice.automatic(connection, get_source(connection, there, source), there.params)
    snapshot_choice.refuse_day(there.params, "sourceResourceName")
    found = names.find(connection, there, str(name))
    if found is None:
        raise not_found(f"The snapshot does not exist: {name}")
    if found["resource_type"] not in snapshot_choice.SOURCES:
        raise invalid_input(f"{name} is of type {found['resource_type']}; only snapshots of instances and disks are copied.")
    return snapshot_choice.whole(connection, there, str(name), found["resource_type"])
