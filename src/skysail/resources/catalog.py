"""The catalogue: bundles (plans) and blueprints (what an instance starts as).

Source: Lightsail's published Linux plans; the ``*_1_0`` generation is listed as inactive, as Lightsail does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select

from skysail.kit.errors import invalid_input
from skysail.resources import paging
from skysail.resources.request import Request
from skysail.store.schema import images

# size: name, monthly price in USD (1_0, 3_0), memory GB, vCPUs (1_0, 3_0), disk GB (1_0, 3_0), transfer GB, power
_SIZES = (
    ("nano", (3.5, 5.0), 0.5, (1, 2), (20, 20), 1024, 300),
    ("micro", (5.0, 7.0), 1.0, (1, 2), (30, 40), 2048, 500),
    ("small", (10.0, 12.0), 2.0, (1, 2), (40, 60), 3072, 1000),
    ("medium", (20.0, 24.0), 4.0, (1, 2), (60, 80), 4096, 2000),
    ("large", (40.0, 44.0), 8.0, (2, 2), (80, 160), 5120, 3000),
    ("xlarge", (80.0, 84.0), 16.0, (4, 4), (160, 320), 6144, 4000),
    ("2xlarge", (160.0, 164.0), 32.0, (8, 8), (320, 640), 7168, 5000),
)


def _bundle(size: tuple[Any, ...], generation: int) -> dict[str, Any]:
    name, prices, memory, cpus, disks, transfer, power = size
    return {
        "bundleId": f"{name}_{generation}_0", "name": name.capitalize(), "instanceType": name,
        "price": prices[generation // 2],
        "ramSizeInGb": memory, "cpuCount": cpus[generation // 2], "diskSizeInGb": disks[generation // 2],
        "transferPerMonthInGb": transfer, "power": power, "isActive": generation == 3,
        "supportedPlatforms": ["LINUX_UNIX"], "publicIpv4AddressCount": 1, "supportedAppCategories": [],
    }


BUNDLES = {bundle["bundleId"]: bundle for generation in (3, 1) for size in _SIZES
           for bundle in (_bundle(size, generation),)}

# Blueprints with a recipe of ours: name, group (both as Lightsail shows them), whether it carries an application.
RECIPES = {"debian_12": ("Debian", "debian_12", False), "debian_13": ("Debian", "debian_13", False),
           "nginx": ("Nginx", "nginx", True)}


def get_bundle(bundle_id: str) -> dict[str, Any]:
    """The bundle ``bundle_id``; raises InvalidInputException."""
    if bundle_id not in BUNDLES:
        raise invalid_input(f"The bundle {bundle_id[:60]!r} does not exist.", "GetBundles lists the ones that do.")
    return BUNDLES[bundle_id]


def is_app(blueprint_id: str) -> bool:
    """Whether the blueprint carries an application (its instances open port 443 too)."""
    return blueprint_id in RECIPES and RECIPES[blueprint_id][2]


def _blueprint(blueprint_id: str, name: str, version: str, active: bool) -> dict[str, Any]:
    _, group, app = RECIPES.get(blueprint_id, (name, blueprint_id, False))
    return {
        "blueprintId": blueprint_id, "name": name, "group": group, "type": "app" if app else "os",
        "description": f"{name} for this cloud", "isActive": active, "minPower": 0, "version": version,
        "versionCode": "1", "platform": "LINUX_UNIX",
    }


class Catalog:
    """GetBundles and GetBlueprints."""

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetBundles": self.bundles, "GetBlueprints": self.blueprints}

    def bundles(self, connection: Connection, request: Request) -> dict[str, Any]:
        inactive = bool(request.params.get("includeInactive"))
        offered = sorted((bundle for bundle in BUNDLES.values() if bundle["isActive"] or inactive),
                         key=lambda bundle: str(bundle["bundleId"]))
        found, token = paging.page(offered, request.params.get("pageToken"), key=lambda bundle: str(bundle["bundleId"]))
        return {"bundles": found, "nextPageToken": token}

    def blueprints(self, connection: Connection, request: Request) -> dict[str, Any]:
        known: dict[str, dict[str, Any]] = {}
        if request.params.get("includeInactive"):
            known = {key: _blueprint(key, value[0], "", False) for key, value in RECIPES.items()}
        for row in connection.execute(select(images).order_by(images.c.blueprint, images.c.version)):
            known[row.blueprint] = _blueprint(row.blueprint, row.name, row.version, True)
        found, token = paging.page([known[key] for key in sorted(known)], request.params.get("pageToken"),
                                   key=lambda blueprint: str(blueprint["blueprintId"]))
        return {"blueprints": found, "nextPageToken": token}
