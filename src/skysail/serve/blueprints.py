"""Images of this machine, as the operator handles them: listed, built, brought in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from skysail.images.build import build as build_image
from skysail.images.library import Library
from skysail.images.recipe import RECIPES
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import up as machine


def held(config: Config) -> list[dict[str, Any]]:
    """Images in the library."""
    return [msgspec.to_builtins(manifest) for manifest in Library(config.images_dir).list()]


def build(config: Config, blueprint: str, progress: Callable[[str], None]) -> None:
    """Build ``blueprint``'s image from Debian packages. Raises :class:`SkysailError` when there is no recipe for it."""
    recipe = RECIPES.get(blueprint)
    if recipe is None:
        raise SkysailError(f"there is no recipe for {blueprint}", cure=f"one of: {', '.join(sorted(RECIPES))}")
    made = build_image(recipe, Library(config.images_dir), progress)
    _announce(config, made.digest, blueprint, progress)


def bring_in(config: Config, file: Path, sha256: str, blueprint: str, user: str,
             progress: Callable[[str], None]) -> None:
    """Make a blueprint of the cloud image ``file`` (SHA-256 ``sha256``); the ending of its name says its format."""
    image_format = "raw" if file.suffix in (".raw", ".img") else "qcow2"
    progress(f"importing {file} as {image_format}")
    made = Library(config.images_dir).import_file(file, sha256, blueprint, blueprint, user, image_format)
    _announce(config, made.digest, blueprint, progress)


def _announce(config: Config, digest: str, blueprint: str, progress: Callable[[str], None]) -> None:
    """A running cloud offers the image at once; another one will when it comes up."""
    if machine.healthy(config, "agent"):
        machine.prepare(config, digest, f"making {blueprint} ready to launch", progress)
