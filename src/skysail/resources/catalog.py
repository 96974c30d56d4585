"""The catalogue: bundles (plans) and blueprints (what an instance starts as).

Source: Lightsail's published Linux plans; the generations before ``*_3_0`` are listed as inactive, as Lightsail does, and can
still be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from skysail.kit.errors import invalid_input
from skysail.resources import paging, regions
from skysail.resources.request import Request
from skysail.store.schema import images

# generation, offered to new instances, and its plans: size, monthly price in USD, memory GB, vCPUs, disk GB, transfer GB
_PLANS: tuple[tuple[str, bool, tuple[tuple[str, float, float, int, int, int], ...]], ...] = (
    ("3_0", True, (
        ("nano", 5.0, 0.5, 2, 20, 1024), ("micro", 7.0, 1.0, 2, 40, 2048), ("small", 12.0, 2.0, 2, 60, 3072),
        ("medium", 24.0, 4.0, 2, 80, 4096), ("large", 44.0, 8.0, 2, 160, 5120), ("xlarge", 84.0, 16.0, 4, 320, 6144),
        ("2xlarge", 164.0, 32.0, 8, 640, 7168), ("4xlarge", 384.0, 64.0, 16, 1280, 8192))),
    # Without a public IPv4 address.
    ("ipv6_3_0", True, (
        ("nano", 3.5, 0.5, 2, 20, 1024), ("micro", 5.0, 1.0, 2, 40, 2048), ("small", 10.0, 2.0, 2, 60, 3072),
        ("medium", 20.0, 4.0, 2, 80, 4096), ("large", 40.0, 8.0, 2, 160, 5120), ("xlarge", 80.0, 16.0, 4, 320, 6144),
        ("2xlarge", 160.0, 32.0, 8, 640, 7168), ("4xlarge", 380.0, 64.0, 16, 1280, 8192))),
    ("2_0", False, (
        ("nano", 3.5, 0.5, 1, 20, 1024), ("micro", 5.0, 1.0, 1, 40, 2048), ("small", 10.0, 2.0, 1, 60, 3072),
        ("medium", 20.0, 4.0, 2, 80, 4096), ("large", 40.0, 8.0, 2, 160, 5120), ("xlarge", 80.0, 16.0, 4, 320, 6144),
        ("2xlarge", 160.0, 32.0, 8, 640, 7168))),
    ("1_0", False, (
        ("nano", 5.0, 0.5, 1, 20, 1024), ("micro", 10.0, 1.0, 1, 30, 2048), ("small", 20.0, 2.0, 1, 40, 3072),
        ("medium", 40.0, 4.0, 2, 60, 4096), ("large", 80.0, 8.0, 2, 80, 5120))),
)
_POWER = {"nano": 300, "micro": 500, "small": 1000, "medium": 2000, "large": 3000, "xlarge": 4000, "2xlarge": 5000,
          "4xlarge": 6000}


def _bundle(generation: str, active: bool, plan: tuple[str, float, float, int, int, int]) -> dict[str, Any]:
    size, price, memory, cpus, disk, transfer = plan
    return {
        "bundleId": f"{size}_{generation}", "name": size.capitalize(), "instanceType": size, "price": price,
        "ramSizeInGb": memory, "cpuCount": cpus, "diskSizeInGb": disk, "transferPerMonthInGb": transfer,
        "power": _POWER[size], "isActive": active, "supportedPlatforms": ["LINUX_UNIX"],
        "publicIpv4AddressCount": 0 if generation.startswith("ipv6_") else 1,
        "supportedAppCategories": [],
    }


BUNDLES = {bundle["bundleId"]: bundle for generation, active, plans in _PLANS for plan in plans
           for bundle in (_bundle(generation, active, plan),)}



class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """How a blueprint with a recipe of ours is shown. ``min_power`` is the power of the smallest bundle that it runs on."""

    name: str
    group: str
    description: str
    app: bool = True
    min_power: int = 0
    product_url: str = ""
    license_url: str = ""


# By blueprint; names and groups as Lightsail shows them, where it has the same.
RECIPES = {
    "debian_12": Offer(
        name="Debian", group="debian_12", app=False, product_url="https://www.debian.org/",
        license_url="https://www.debian.org/legal/licenses/",
        description="Debian 12, a free operating system with more than 60,000 packages, supported for five years."),
    "debian_13": Offer(
        name="Debian", group="debian_13", app=False, product_url="https://www.debian.org/",
        license_url="https://www.debian.org/legal/licenses/",
        description="Debian 13, a free operating system with more than 60,000 packages, supported for five years."),
    "django": Offer(
        name="Django", group="django", product_url="https://www.djangoproject.com/",
        license_url="https://github.com/django/django/blob/main/LICENSE",
        description="A Django project with its admin site, on Gunicorn, nginx and SQLite."),
    "lamp": Offer(
        name="LAMP (PHP 8)", group="lamp_8", product_url="https://httpd.apache.org/",
        license_url="https://www.apache.org/licenses/LICENSE-2.0",
        description="Apache, MariaDB and PHP 8, ready for a site in /var/www/html."),
    "nginx": Offer(
        name="Nginx", group="nginx", product_url="https://nginx.org/", license_url="https://nginx.org/LICENSE",
        description="nginx, PHP-FPM and MariaDB (LEMP), ready for a site in /var/www/html."),
    "nodejs": Offer(
        name="Node.js", group="node", product_url="https://nodejs.org/",
        license_url="https://github.com/nodejs/node/blob/main/LICENSE",
        description="Node.js with npm and Express, behind nginx; the application lies in /srv/nodejs."),
    "postgresql": Offer(
        name="PostgreSQL", group="postgresql", product_url="https://www.postgresql.org/",
        license_url="https://www.postgresql.org/about/licence/",
        description="A PostgreSQL database, reached by SSH; a page says how."),
    "redmine": Offer(
        name="Redmine", group="redmine", min_power=500, product_url="https://www.redmine.org/",
        license_url="https://www.redmine.org/projects/redmine/wiki/Redmine#License",
        description="Redmine, issues and wikis of projects, on Apache, Passenger and SQLite."),
    "wordpress": Offer(
        name="WordPress", group="wordpress", product_url="https://wordpress.org/",
        license_url="https://wordpress.org/about/license/",
        description="WordPress, a site that is written in the browser, on Apache, PHP and MariaDB."),
}


def get_bundle(bundle_id: str) -> dict[str, Any]:
    """The bundle ``bundle_id``; raises InvalidInputException."""
    if bundle_id not in BUNDLES:
        raise invalid_input(f"The bundle {bundle_id[:60]!r} does not exist.", "GetBundles lists the ones that do.")
    return BUNDLES[bundle_id]


def counterpart(bundle: dict[str, Any]) -> dict[str, Any]:
    """The plan of the same size that differs in whether it has a public IPv4 address; raises InvalidInputException."""
    size, _, generation = str(bundle["bundleId"]).partition("_")
    other = f"{size}_{generation.removeprefix('ipv6_') if generation.startswith('ipv6_') else 'ipv6_' + generation}"
    if other not in BUNDLES:
        raise invalid_input(f"The bundle {bundle['bundleId']} has no counterpart without a public IPv4 address.",
                            "Bundles of the newest generation have one: make a snapshot, and an instance from it.")
    return BUNDLES[other]


def iops(bundle: dict[str, Any]) -> int:
    """How many operations a second the disks of an instance of this bundle take together, over longer than a burst."""
    return 2000 + 5 * int(bundle["diskSizeInGb"])


def is_app(blueprint_id: str) -> bool:
    """Whether the blueprint carries an application (its instances open port 443 too)."""
    return blueprint_id in RECIPES and RECIPES[blueprint_id].app


def check_power(blueprint_id: str, bundle: dict[str, Any]) -> None:
    """Raises InvalidInputException when the bundle is too small for what the blueprint carries."""
    needed = RECIPES[blueprint_id].min_power if blueprint_id in RECIPES else 0
    if bundle["power"] < needed:
        fits = min((one for one in BUNDLES.values() if one["power"] >= needed and one["isActive"]
                    and one["publicIpv4AddressCount"] == bundle["publicIpv4AddressCount"]),
                   key=lambda one: int(one["power"]))
        raise invalid_input(f"The blueprint {blueprint_id} needs a bundle with a power of {needed} or more, the bundle "
                            f"{bundle['bundleId']} has {bundle['power']}.", f"Choose {fits['bundleId']} or a larger one.")


def _blueprint(blueprint_id: str, name: str, version: str, active: bool) -> dict[str, Any]:
    offer = RECIPES.get(blueprint_id) or Offer(name=name, group=blueprint_id, app=False,
                                               description=f"{name}, imported by this cloud's operator.")
    shown = {
        "blueprintId": blueprint_id, "name": name, "group": offer.group, "type": "app" if offer.app else "os",
        "description": offer.description, "isActive": active, "minPower": offer.min_power, "version": version,
        "versionCode": "1", "platform": "LINUX_UNIX", "productUrl": offer.product_url, "licenseUrl": offer.license_url,
    }
    return {key: value for key, value in shown.items() if value != "" or key == "version"}


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
            known = {key: _blueprint(key, value.name, "", False) for key, value in RECIPES.items()}
        # Thousands of hosts have the same ones.
        offered = select(images.c.blueprint, images.c.name, images.c.version).distinct().where(
            regions.serves(images.c.host_id, request.region))
        for row in connection.execute(offered.order_by(images.c.blueprint, images.c.version)):
            known[row.blueprint] = _blueprint(row.blueprint, row.name, row.version, True)
        found, token = paging.page([known[key] for key in sorted(known)], request.params.get("pageToken"),
                                   key=lambda blueprint: str(blueprint["blueprintId"]))
        return {"blueprints": found, "nextPageToken": token}
