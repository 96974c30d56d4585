"""Images of this machine, as the operator handles them: listed, built, brought in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError


def held(config: Config) -> list[dict[str, Any]]:
    """Images in the library."""
    raise SkysailError("images are not offered yet")


def build(config: Config, blueprint: str, progress: Any) -> None:
    """Build ``blueprint``'s image from Debian packages."""
    raise SkysailError("images are not offered yet")


def bring_in(config: Config, file: Path, sha256: str, blueprint: str, progress: Any) -> None:
    """Make a blueprint of the cloud image ``file``, whose SHA-256 must be ``sha256``."""
    raise SkysailError("importing images is not offered yet")
