"""Recipes: what each image is made of, declared.

An application's recipe is a folder of its own in ``apps``: ``recipe.toml`` (the fields of :class:`Recipe`), ``tree`` (files
that are laid over the packages'), and two shell scripts. ``prepare`` runs inside the tree while the image is built,
``first-boot`` once in each instance, and in the template as a rehearsal; ``apps/application`` says what it finds there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

APPS = Path(__file__).parent / "apps"


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image: its blueprint, the Debian suite, and the packages and units put on top of the base.

    ``versioned_by`` is the package whose upstream version the blueprint shows; empty: Debian's own point release. ``units``
    are what the first boot starts. ``secrets`` are the files that each instance makes for itself: the image has none of them.
    ``pages`` says what a page of an instance must hold, by its path; ``login`` is a command of the owner's in an instance,
    which succeeds only by its password.
    """

    blueprint: str
    name: str
    group: str
    suite: str = "bookworm"
    kernel: str = "linux-image-cloud-amd64/bookworm-backports"
    versioned_by: str = ""
    packages: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    user: str = "admin"
    size_mib: int = 3072
    secrets: tuple[str, ...] = ()
    pages: dict[str, str] = {}
    login: str = ""

    @property
    def folder(self) -> Path | None:
        """Where the files of the application lie; None for a plain system."""
        return APPS / self.blueprint if (APPS / self.blueprint).is_dir() else None

    def digest(self) -> str:
        """The sha256 of the recipe's own content, and of every file that comes with it."""
        whole = hashlib.sha256(msgspec.json.encode(self))
        if self.folder is not None:
            shared = (path for path in APPS.iterdir() if path.is_file())
            for path in sorted((*shared, *(path for path in self.folder.rglob("*") if path.is_file()))):
                whole.update(f"\0{path.relative_to(APPS)}\0".encode() + path.read_bytes())
        return whole.hexdigest()


BASE = ("systemd", "systemd-sysv", "udev", "dbus", "openssh-server", "qemu-guest-agent", "cloud-init", "python3",
        "grub-common", "iproute2", "iputils-ping", "sudo", "nano", "ca-certificates", "netbase", "e2fsprogs", "less",
        "cloud-guest-utils", "fdisk")


def _app(path: Path) -> Recipe:
    return msgspec.toml.decode(path.read_bytes(), type=Recipe)


RECIPES = {recipe.blueprint: recipe for recipe in (
    Recipe(blueprint="debian_12", name="Debian", group="debian_12"),
    Recipe(blueprint="debian_13", name="Debian", group="debian_13", suite="trixie", kernel="linux-image-cloud-amd64"),
    *(_app(path) for path in sorted(APPS.glob("*/recipe.toml"))),
)}
