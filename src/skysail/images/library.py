"""The library: a directory of images, each with its manifest beside it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import msgspec

from skysail.kit.errors import SkysailError
from skysail.kit.process import run


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is: identity, origin, the package list as (name, version, architecture); ``built`` is Unix time."""

    digest: str
    blueprint: str
    name: str
    group: str
    version: str
    user: str
    size_bytes: int
    built: float
    recipe: str = ""
    packages: tuple[tuple[str, str, str], ...] = ()


class Library:
    """Images under one directory, named by their sha256."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: str) -> Path:
        """Where the image with this digest lies."""
        return self.directory / f"{digest}.qcow2"

    def list(self) -> list[Manifest]:
        """Every complete image, oldest first."""
        held = [msgspec.json.decode(path.read_bytes(), type=Manifest) for path in self.directory.glob("*.json")]
        return sorted((one for one in held if self.path(one.digest).is_file()), key=lambda one: one.built)

    def find(self, digest: str) -> Manifest | None:
        """The image with this digest, if held."""
        return next((one for one in self.list() if one.digest == digest), None)

    def latest(self, blueprint: str) -> Manifest | None:
        """The newest image of a blueprint, if any."""
        return next((one for one in reversed(self.list()) if one.blueprint == blueprint), None)

    def add(self, qcow2: Path, manifest: Manifest) -> Path:
        """Move a finished image in, the image first, its manifest last; both by rename."""
        target = self.path(manifest.digest)
        qcow2.replace(target)
        draft = target.with_suffix(".draft")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        draft.replace(target.with_suffix(".json"))
        return target

    def import_file(self, path: Path, sha256: str, blueprint: str, name: str, user: str, format: str) -> Manifest:
        """Take in a foreign image of an explicit format ("raw" or "qcow2"); its checksum must be ``sha256``."""
        if format not in ("raw", "qcow2"):
            raise SkysailError("an image is raw or qcow2")
        if file_digest(path) != sha256.lower():
            raise SkysailError(f"{path.name} does not have the given checksum")
        told = msgspec.json.decode(run(["qemu-img", "info", "-f", format, "--output=json", str(path)]))
        if told.get("backing-filename") or told.get("format-specific", {}).get("data", {}).get("data-file"):
            raise SkysailError("an image must not refer to other files")
        draft = self.directory / f".import-{os.getpid()}"
        run(["qemu-img", "convert", "-f", format, "-O", "qcow2", "-o", "compression_type=zstd", "-c", str(path),
             str(draft)])
        made = Manifest(digest=file_digest(draft), blueprint=blueprint, name=name, group=blueprint, version="",
                        user=user, size_bytes=int(told["virtual-size"]), built=time.time())
        self.add(draft, made)
        return made


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
