"""Verbs of images: listed, removed, built, brought in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.images import foreign, published
from skysail.kit import config as configuration
from skysail.serve import blueprints

app = cyclopts.App(name="images", version=__version__, help="The images that instances are made of.")


@app.command(name="list")
def list_images(*, unused: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> None:
    """Images that this machine holds; with --unused the images and templates that nobody needs."""
    if unused:
        _show_pieces(blueprints.unused(configuration.load()), json)
        return
    found = blueprints.held(configuration.load())
    show.as_json(found) if json else show.table(
        [blueprints.summary(image) for image in found],
        ["blueprint", "version", "size", "packages", "built (UTC)", "template", "offered"])


@app.command(name="remove")
def remove_image(*names: str, unused: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> None:
    """Remove images, by digest or blueprint, with their templates; --unused all images and templates that nobody needs."""
    gone = blueprints.remove(configuration.load(), names, unused)
    _show_pieces(gone, json)
    if not json:
        show.line(f"{sum(piece['bytes'] for piece in gone) >> 20} MiB freed")


def _show_pieces(pieces: list[dict[str, Any]], json: bool) -> None:
    show.as_json(pieces) if json else show.table(
        [blueprints.piece_summary(piece) for piece in pieces], ["kind", "blueprint", "name", "size"])


@app.command(name="build")
def build_image(blueprint: str = "debian_12") -> None:
    """Build a blueprint's image from Debian packages."""
    blueprints.build(configuration.load(), blueprint, show.step)


@app.command(name="import")
def import_image(source: str, *, sha256: str = "", blueprint: str = "", name: str = "", user: str = "debian",
                 format: Literal["raw", "qcow2"] | None = None, mirror: str = "") -> None:
    """Make a blueprint of a qcow2 or raw cloud image: one that is known by name (ubuntu_24_04), or a file or an http(s)
    address with --sha256 and --blueprint. --mirror asks another address than the publisher's for a known one."""
    if sha256 or blueprint:
        origin, made = foreign.Origin(source=source, sha256=sha256, format=format), foreign.Blueprint(
            id=blueprint, name=name or blueprint, user=user)
    else:
        show.step(f"{source}: asking its publisher for the checksum")
        origin, made = published.resolve(published.find(source), mirror)
    blueprints.bring_in(configuration.load(), origin, made, show.step, show.detail)
