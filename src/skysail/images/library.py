"""The library: a directory of images, each with its manifest beside it."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.workplace import locked, workplace

log = logging.getLogger(__name__)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is: identity, origin, the package list as (name, version, architecture); ``built`` is Unix time.

    ``recipe`` is the fingerprint of what it was built from, empty for a foreign image; that one has an ``origin`` (the
    address or name, and the sha256 of what was taken in). ``archives`` are the package indexes that a build saw. ``renews``
    says whether its guests take on another identity in a copy; None while nobody has looked (see ``images/renewal.py``).
    """

    digest: str
    blueprint: str
    name: str
    group: str
    version: str
    user: str
    size_bytes: int
    built: float
    recipe: str = ""
    origin: tuple[str, str] = ("", "")
    packages: tuple[tuple[str, str, str], ...] = ()
    archives: tuple[tuple[str, str], ...] = ()
    renews: bool | None = None


class Library:
    """Images under one directory, named by their sha256."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._manifests: dict[Path, tuple[int, Manifest]] = {}

    def path(self, digest: str) -> Path:
        """Where the image with this digest lies."""
        return self.directory / f"{digest}.qcow2"

    def list(self) -> list[Manifest]:
        """Every complete image, oldest first. One whose manifest cannot be read is left out, and logged: its damage is not
        the others'."""
        found = [self._read(path) for path in self.directory.glob("*.json")]
        return sorted((one for one in found if one is not None and self.path(one.digest).is_file()),
                      key=lambda one: one.built)

    def _read(self, path: Path) -> Manifest | None:
        """The manifest, from memory while its file is the one that was read."""
        try:
            seen = path.stat().st_mtime_ns
            if path not in self._manifests or self._manifests[path][0] != seen:
                self._manifests[path] = (seen, msgspec.json.decode(path.read_bytes(), type=Manifest))
            return self._manifests[path][1]
        except (OSError, msgspec.MsgspecError) as damaged:
            log.warning("the manifest %s cannot be read: %s", path, damaged)
            return None

    def find(self, digest: str) -> Manifest | None:
        """The image with this digest, if held."""
        return next((one for one in self.list() if one.digest == digest), None)

    def latest(self, blueprint: str) -> Manifest | None:
        """The newest image of a blueprint, if any."""
        return next((one for one in reversed(self.list()) if one.blueprint == blueprint), None)

    def workplace(self) -> AbstractContextManager[Path]:
        """A folder in which an image comes to be (see ``kit/workplace.py``)."""
        return workplace(self.directory)

    def learn(self, manifest: Manifest, renews: bool) -> None:
        """Let the manifest of an image that is here say whether its guests renew their identity."""
        told = msgspec.structs.replace(manifest, renews=renews)
        with locked(self.directory):
            durable.replace(self.path(manifest.digest).with_suffix(".json"), msgspec.json.format(msgspec.json.encode(told)),
                            0o644)

    def note(self, manifest: Manifest) -> None:
        """Remember an image that is elsewhere, of which a disk came here. What is known already stays as it is."""
        path = self.path(manifest.digest).with_suffix(".note")
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            durable.replace(path, msgspec.json.encode(manifest), 0o444)

    def noted(self, digest: str) -> Manifest | None:
        """What was remembered of an image that is not here."""
        try:
            return msgspec.json.decode(self.path(digest).with_suffix(".note").read_bytes(), type=Manifest)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def add(self, qcow2: Path, manifest: Manifest) -> Path:
        """Move a finished image in; it is there, whole, with the last rename.

        Raises :class:`SkysailError` when the same bytes are held as another blueprint: a digest names one image only.
        """
        target = self.path(manifest.digest)
        with locked(self.directory):
            held = self.find(manifest.digest)
            if held is not None and held.blueprint != manifest.blueprint:
                raise SkysailError(f"this very image is here already, as the blueprint {held.blueprint}",
                                   f"launch instances with the blueprint {held.blueprint}")
            draft = target.with_suffix(".draft")
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
            qcow2.chmod(0o444)
            for path in (draft, qcow2):
                durable.sync(path)
            draft.replace(target.with_suffix(".json"))
            qcow2.replace(target)
            durable.sync(self.directory)
        return target


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
