"""Recipes: what each image is made of, declared."""

from __future__ import annotations

import hashlib

import msgspec


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its blueprint, the Debian suite, and the packages and units put on top of the base.

    ``versioned_by`` is the package whose upstream version the blueprint shows; empty: Debian's own point release.
    """

    blueprint: str
    name: str
    group: str
    suite: str
    kernel: str
    versioned_by: str = ""
    packages: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    user: str = "admin"
    size_mib: int = 3072

    def digest(self) -> str:
        """The sha256 of the recipe's own content."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


BASE = ("systemd", "systemd-sysv", "udev", "dbus", "openssh-server", "qemu-guest-agent", "cloud-init", "python3",
        "grub-common", "iproute2", "iputils-ping", "sudo", "nano", "ca-certificates", "netbase", "e2fsprogs", "less",
        "cloud-guest-utils", "fdisk")

_12 = Recipe(blueprint="debian_12", name="Debian", group="debian_12", suite="bookworm",
             kernel="linux-image-cloud-amd64/bookworm-backports")
RECIPES = {recipe.blueprint: recipe for recipe in (
    _12,
    Recipe(blueprint="debian_13", name="Debian", group="debian_13", suite="trixie",
           kernel="linux-image-cloud-amd64"),
    msgspec.structs.replace(_12, blueprint="nginx", name="Nginx", group="nginx", versioned_by="nginx",
                            packages=("nginx",), units=("nginx.service",)),
)}
