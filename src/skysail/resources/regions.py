"""GetRegions: the region this cloud serves, with its zones when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from skysail.kit.config import Config
from skysail.resources.request import Request


class Regions:
    """The catalogue of regions."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetRegions": self.list}

    def list(self, connection: Connection, request: Request) -> dict[str, Any]:
        name = self._config.default_region
        zones = [{"zoneName": name + letter, "state": "available"} for letter in self._config.zones]
        return {"regions": [{
            "name": name, "displayName": "Skysail", "description": "This region runs on your own machines.",
            "continentCode": "NA",
            "availabilityZones": zones if request.params.get("includeAvailabilityZones") else [],
            "relationalDatabaseAvailabilityZones": [],
        }]}
