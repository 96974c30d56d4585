"""Images of this machine, as the operator handles them: listed, built, brought in."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from skysail.agent.stock import Piece, Stock, free
from skysail.hypervisor import template
from skysail.images import foreign
from skysail.images.build import build as build_image
from skysail.images.build import fingerprint
from skysail.images.library import Library
from skysail.images.published import PUBLISHED
from skysail.images.recipe import RECIPES
from skysail.kit import process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import image_use
from skysail.resources.catalog import BUNDLES, is_app
from skysail.serve import programs

# What the first instance is: it is built and templated by `up`, so that there is something to launch.
FIRST_BLUEPRINT, FIRST_BUNDLE = "debian_12", "nano_3_0"


def held(config: Config) -> list[dict[str, Any]]:
    """Images in the library, oldest first. ``offered``: new instances are made of it, the newest of its blueprint;
    ``templates``: the numbers of processors for which there is a template to clone; ``needed``: who needs it, '' when nobody
    does, None when whoever asks may not know."""
    library = Library(config.images_dir)
    needed = {one.digest: one.needed for one in stock(config).look() if one.kind == "image"} if os.geteuid() == 0 else {}
    newest = {one.blueprint: one.digest for one in library.list()}
    ready = template.held(config.templates_dir)
    return [{
        "blueprint": one.blueprint, "name": one.name, "version": one.version, "digest": one.digest,
        "offered": newest[one.blueprint] == one.digest, "disk_bytes": one.size_bytes,
        "file_bytes": library.path(one.digest).stat().st_size, "packages": len(one.packages),
        "built": datetime.datetime.fromtimestamp(one.built, datetime.UTC).isoformat(timespec="seconds"),
        "templated": bool(one.recipe), "templates": ready.get(one.digest, []), "needed": needed.get(one.digest),
    } for one in library.list()]


def summary(image: dict[str, Any]) -> dict[str, str]:
    """An image of :func:`held` in the few words that a list shows."""
    sizes = ", ".join(map(str, image["templates"]))
    ready = f"{sizes} vCPU" if sizes else "none yet"
    return {
        "blueprint": image["blueprint"], "version": image["version"] or "unknown",
        "size": f"{image['file_bytes'] >> 20} MiB", "packages": str(image["packages"] or "unknown"),
        "built (UTC)": image["built"][:16].replace("T", " "), "template": ready if image["templated"] else "boots cold",
        "offered": "yes" if image["offered"] else "replaced",
    }


def stock(config: Config) -> Stock:
    """The images and templates of this machine, and who needs them."""
    return Stock(config, lambda: image_use.known(config))


def unused(config: Config) -> list[dict[str, Any]]:
    """The images that newer ones replaced and the templates that nothing is cloned from any more, which nobody needs."""
    process.require_root()
    return [_piece(piece) for piece in free(stock(config).look())]


def remove(config: Config, names: Sequence[str], unused: bool) -> list[dict[str, Any]]:
    """Remove the images with these digests, or their beginnings, or of these blueprints, with their templates; with
    ``unused`` what :func:`unused` lists. What went. Raises :class:`SkysailError`, and nothing went, when one is needed."""
    process.require_root()
    if bool(names) == unused:
        raise SkysailError("it is not clear what shall go", "name images by digest or blueprint, or say --unused")
    there = Library(config.images_dir).list()
    digests = set()
    for name in names:
        found = {one.digest for one in there if name == one.blueprint or (len(name) >= 8 and one.digest.startswith(name))}
        if not found:
            raise SkysailError(f"there is no image {name}", "see: sudo ./skysail images list")
        digests |= found
    gone = stock(config).remove(lambda piece: piece.old and not piece.needed if unused else piece.digest in digests)
    if programs.healthy(config, "agent"):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.agent_socket)), timeout=30) as client:
            client.post("http://agent/images")
    return [_piece(piece) for piece in gone]


def _piece(piece: Piece) -> dict[str, Any]:
    return {"kind": piece.kind, "blueprint": piece.blueprint, "name": piece.path.stem, "image": piece.digest,
            "bytes": piece.bytes}


def piece_summary(piece: dict[str, Any]) -> dict[str, str]:
    """A piece of :func:`unused` in the few words that a list shows."""
    return {"kind": piece["kind"], "blueprint": piece["blueprint"] or "unknown", "name": piece["name"][:16],
            "size": f"{piece['bytes'] >> 20} MiB"}


def offers(config: Config) -> list[dict[str, Any]]:
    """Every blueprint that this machine has or could have, by its id. ``state``: ``ready``, ``can be built``, ``needs a
    download``, or ``not published``; ``how`` is the command that makes it ready, or what keeps it from it."""
    library = Library(config.images_dir)
    there = {one.blueprint: one for one in library.list()}
    found = {}
    for name, recipe in RECIPES.items():
        found[name] = {"name": recipe.name, "version": "", "state": "can be built", "how": f"skysail blueprints build {name}"}
    for name, image in PUBLISHED.items():
        found[name] = {"name": image.name, "version": image.version, "state": "not published" if image.why_not else
                       "needs a download", "how": image.why_not or f"skysail images import {name}"}
    for name, held_image in there.items():
        how = ""
        if name in RECIPES and held_image.recipe != fingerprint(RECIPES[name]):
            how = f"its recipe has changed since: skysail blueprints build {name}"
        found[name] = {"name": held_image.name, "version": held_image.version, "state": "ready", "how": how}
    return [{"blueprint": name, "type": "app" if is_app(name) else "os", **found[name]} for name in sorted(found)]


def named(names: Sequence[str], everything: bool) -> list[str]:
    """The recipes that an operator means; raises :class:`SkysailError` when there is none, or one that does not exist."""
    for name in names:
        if name not in RECIPES:
            raise SkysailError(f"there is no recipe for {name}", cure=f"one of: {', '.join(sorted(RECIPES))}")
    if not names and not everything:
        raise SkysailError("no blueprint is named", cure=f"name some of these, or say --all: {', '.join(sorted(RECIPES))}")
    return sorted(RECIPES) if everything else list(names)


def build(config: Config, blueprint: str, progress: Callable[[str], None]) -> None:
    """Build ``blueprint``'s image from Debian packages. Raises :class:`SkysailError` when there is no recipe for it."""
    named((blueprint,), everything=False)
    process.require_root()
    made = build_image(RECIPES[blueprint], Library(config.images_dir), progress)
    _announce(config, made.digest, blueprint, progress)


def bring_in(config: Config, origin: foreign.Origin, blueprint: foreign.Blueprint, progress: Callable[[str], None],
             detail: Callable[[str], None]) -> None:
    """Make a blueprint of the foreign image at ``origin``. Raises :class:`SkysailError` when it is not to be trusted."""
    process.require_root()
    made = foreign.take_in(origin, blueprint, Library(config.images_dir), config.importer_uid, progress, detail)
    _announce(config, made.digest, blueprint.id, progress)


def _announce(config: Config, digest: str, blueprint: str, progress: Callable[[str], None]) -> None:
    """A running cloud offers the image at once; another one will when it comes up."""
    if programs.healthy(config, "agent"):
        prepare(config, digest, f"making {blueprint} ready to launch", progress)


def ensure_first(config: Config, progress: Callable[[str], None]) -> None:
    """Build the default blueprint's image when the library holds none that this program would build."""
    there = Library(config.images_dir).latest(FIRST_BLUEPRINT) if config.engines == "real" else None
    if config.engines != "real" or (there is not None and there.recipe == fingerprint(RECIPES[FIRST_BLUEPRINT])):
        return
    progress(f"images: building {FIRST_BLUEPRINT} from Debian packages (one to three minutes, once)")
    build(config, FIRST_BLUEPRINT, progress)


def ensure_first_template(config: Config, progress: Callable[[str], None]) -> None:
    """Let the agent make the template that a first launch clones. Raises :class:`SkysailError` with the agent's words."""
    image = Library(config.images_dir).latest(FIRST_BLUEPRINT) if config.engines == "real" else None
    if image is None or not image.recipe:
        return
    prepare(config, image.digest, f"template: {FIRST_BLUEPRINT} is booted once, every launch is a clone of it", progress)


def prepare(config: Config, image: str, text: str, progress: Callable[[str], None]) -> None:
    """Let the agent look at its images and make the template of ``image`` for the first bundle's size.

    Raises :class:`SkysailError` with the agent's words.
    """
    progress(text)
    vcpus = BUNDLES[FIRST_BUNDLE]["cpuCount"]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.agent_socket)), timeout=1800) as client:
        answer = client.post("http://agent/prepare", params={"image": image, "vcpus": vcpus})
    if answer.status_code != 204:
        what, _, cure = answer.text.partition("\n")
        raise SkysailError(f"the template could not be made: {what}", cure=cure)
