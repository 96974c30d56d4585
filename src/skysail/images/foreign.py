"""Foreign images: taken in from a file or an address, and trusted in nothing.

What is brought is copied first, into a folder of our own: checksum, look and conversion all see that one copy, which
nobody else can write. Its format is what the operator says and is never probed, for the first bytes of a raw disk are its
guest's to choose and could name any file of this machine as their backing file. The qcow2 header is read here, and
``qemu-img`` sees the copy only as a user without rights, without a network, with a bound on time, memory and output.

Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from skysail.contract.report import USER
from skysail.images import fetch
from skysail.images.fetch import MAX_BYTES
from skysail.images.library import Library, Manifest
from skysail.images.recipe import RECIPES
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run

Format = Literal["raw", "qcow2"]
MAX_VIRTUAL_BYTES = 64 << 30
CONVERT_SECONDS = 1800.0
CONVERT_MEMORY_BYTES = 2 << 30
_CHUNK = 1 << 20
_ENDINGS: dict[str, Format] = {".qcow2": "qcow2", ".raw": "raw"}
# Incompatible features of qcow2: dirty (0), corrupt (1), external data file (2), compression type (3), extended L2 (4).
_DIRTY_OR_CORRUPT, _DATA_FILE, _KNOWN = 0b11, 0b100, 0b11111


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What to take in: a path or an http(s) address, its sha256 in hex, its format (None: by the ending of its name)."""

    source: str
    sha256: str
    format: Format | None = None

    def named_format(self) -> Format:
        """The format given, or said by the ending; raises :class:`SkysailError`, for it is never guessed."""
        name = Path(urlsplit(self.source).path if is_address(self.source) else self.source)
        ending = (name.with_suffix("") if name.suffix == ".xz" else name).suffix
        found = self.format or _ENDINGS.get(ending)
        if found is None:
            raise SkysailError(f"the format of {self.source} is not known by its ending",
                               "say --format qcow2 or --format raw (a .img may be either)")
        return found


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """What the image becomes: the blueprint's id and name, and the user whom its instances are logged in to as."""

    id: str
    name: str
    user: str
    version: str = ""


def take_in(origin: Origin, blueprint: Blueprint, library: Library, uid: int,
            progress: Callable[[str], None] = lambda step: None,
            detail: Callable[[str], None] = lambda text: None) -> Manifest:
    """Make a blueprint of a foreign image; ``qemu-img`` runs as user id ``uid``, which must be nobody else's.

    ``progress`` is told the steps, ``detail`` how far one is. Raises :class:`SkysailError`; the library is then as it was.
    Needs root.
    """
    image_format = origin.named_format()
    _check(origin, blueprint)
    with library.workplace() as work:
        copy = work / "original"
        progress(f"{blueprint.id}: {'downloading' if is_address(origin.source) else 'copying'} {origin.source}")
        if is_address(origin.source):
            digest = fetch.download(origin.source, origin.sha256.lower(), copy, library.directory, detail)
        else:
            digest = _copy(Path(origin.source), copy, detail)
        if digest != origin.sha256.lower():
            raise SkysailError(f"{origin.source} does not have the given checksum",
                               "compare it with the one that the image's publisher shows")
        if origin.source.endswith(".xz"):
            progress(f"{blueprint.id}: unpacking")
            copy = _unpack(copy, work, uid)
        size = virtual_size(copy, image_format)
        progress(f"{blueprint.id}: converting from {image_format}")
        converted = _convert(copy, image_format, work, size, uid)
        out = work / "disk.qcow2"
        # Copied once more, for its writer was exposed to foreign bytes: from here on nobody can change it.
        digest = _copy(converted, out)
        if virtual_size(out, "qcow2") != size:
            raise SkysailError(f"the conversion of {origin.source} went wrong", "is the image damaged?")
        made = Manifest(digest=digest, blueprint=blueprint.id, name=blueprint.name, group=blueprint.id,
                        version=blueprint.version, user=blueprint.user, size_bytes=size, built=time.time(),
                        origin=(origin.source, origin.sha256.lower()))
        library.add(out, made)
    return made


def is_address(source: str) -> bool:
    """Whether ``source`` is to be fetched by HTTP rather than read from a disk."""
    return source.startswith(("http://", "https://"))


def _check(origin: Origin, blueprint: Blueprint) -> None:
    if not re.fullmatch("[0-9a-fA-F]{64}", origin.sha256):
        raise SkysailError("a sha256 is 64 hexadecimal digits", "take it from where the image's publisher shows it")
    if not re.fullmatch("[a-z0-9][a-z0-9_]{0,62}", blueprint.id):
        raise SkysailError(f"{blueprint.id!r} is no blueprint id", "use small letters, digits and _, such as my_debian")
    if blueprint.id in RECIPES:
        raise SkysailError(f"{blueprint.id} is built from Debian packages here", "choose another blueprint id")
    if not blueprint.user or not re.search(USER, blueprint.user):
        raise SkysailError(f"{blueprint.user!r} is no user name")


def _copy(source: Path, target: Path, detail: Callable[[str], None] = lambda text: None) -> str:
    """Write ``source`` to ``target`` and return the sha256 of the bytes written; raises :class:`SkysailError`."""
    whole = hashlib.sha256()
    written = 0
    try:
        with source.open("rb") as file, target.open("xb") as out:
            length = os.fstat(file.fileno()).st_size
            room = min(MAX_BYTES, shutil.disk_usage(target.parent).free - (1 << 30))
            if length > room:
                raise SkysailError(f"{source} is {length >> 20} MiB large, there is room for {max(room, 0) >> 20} MiB")
            while chunk := file.read(_CHUNK):
                written += len(chunk)
                if written > room:
                    raise SkysailError(f"{source} is larger than the {max(room, 0) >> 20} MiB that there is room for")
                whole.update(chunk)
                if chunk.count(0) == len(chunk):
                    out.seek(len(chunk), os.SEEK_CUR)  # a hole stays a hole
                else:
                    out.write(chunk)
                detail(f"{written >> 20} MiB of {length >> 20}")
            out.truncate(written)
    except OSError as failed:
        raise SkysailError(f"{source} could not be read: {failed.strerror}") from failed
    return whole.hexdigest()


def virtual_size(path: Path, image_format: Format, most: int = MAX_VIRTUAL_BYTES) -> int:
    """How large the disk in ``path`` is, in bytes, a whole number of sectors.

    Raises :class:`SkysailError` for a qcow2 that refers to another file, is encrypted, is not clean, or has a feature that
    is not known here; and for any disk of no size, or of more than ``most`` bytes.
    """
    size = path.stat().st_size
    if image_format == "qcow2":
        with path.open("rb") as file:
            head = file.read(104).ljust(104, b"\0")
        magic, version, backing, _, _, size, crypt = struct.unpack_from(">4sIQIIQI", head)
        incompatible = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
        if magic != b"QFI\xfb" or version not in (2, 3):
            raise SkysailError("this is not a qcow2 image", "say --format raw if it is a plain disk")
        if backing or incompatible & _DATA_FILE:
            raise SkysailError("the image refers to another file", "make a whole one of it: qemu-img convert")
        if crypt:
            raise SkysailError("the image is encrypted", "decrypt it first: qemu-img convert")
        if incompatible & _DIRTY_OR_CORRUPT or incompatible & ~_KNOWN:
            raise SkysailError("the image is not clean, or newer than is known here", "see: qemu-img check")
    if not 0 < size <= most:
        raise SkysailError(f"a disk of {size >> 20} MiB is not taken; 1 byte to {most >> 30} GiB are")
    return -(-size // 512) * 512


def _unpack(copy: Path, work: Path, uid: int) -> Path:
    """What the xz file ``copy`` holds, written by a process that may do nothing else; raises :class:`SkysailError`."""
    room = _room(work, "unpacked", uid)
    packed, out = room / "original.xz", room / "original"
    copy.rename(packed)
    packed.chmod(0o444)
    try:
        run([*held(uid, min(MAX_BYTES, shutil.disk_usage(work).free - (1 << 30))),
             "xz", "--decompress", "--keep", "--quiet", "--no-warn", str(packed)], timeout=CONVERT_SECONDS)
    except ProcessFailed as failed:
        raise SkysailError(f"xz does not take the image: {_why(failed)}", "is the image damaged?") from failed
    return _closed(room, out)


def _convert(copy: Path, image_format: Format, work: Path, size: int, uid: int) -> Path:
    """Our own qcow2 of ``copy``, written by a process that may do nothing else; raises :class:`SkysailError`."""
    room = _room(work, "converted", uid)
    copy.parent.chmod(0o711)
    copy.chmod(0o444)
    out = room / "disk.qcow2"
    alone = [*held(uid, size + (1 << 30)), "qemu-img"]
    try:
        if image_format == "qcow2":
            run([*alone, "check", "-q", "-f", "qcow2", str(copy)], timeout=CONVERT_SECONDS)
        run([*alone, "convert", "-f", image_format, "-O", "qcow2", "-c", "-o", "compression_type=zstd", str(copy), str(out)],
            timeout=CONVERT_SECONDS)
    except ProcessFailed as failed:
        raise SkysailError(f"qemu-img does not take the image: {_why(failed)}", "is the image damaged?") from failed
    return _closed(room, out)


def held(uid: int, largest_bytes: int) -> list[str]:
    """What holds a program that sees foreign bytes: no network, no rights, bounds on files, memory and descriptors."""
    return ["unshare", "--net", "--", "prlimit", f"--fsize={largest_bytes}", f"--as={CONVERT_MEMORY_BYTES}", "--core=0",
            "--nofile=64", "--", "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all", "--"]


def _room(work: Path, name: str, uid: int) -> Path:
    """A folder in which ``uid`` may write, and which only it reads."""
    room = work / name
    room.mkdir(mode=0o700)
    os.chown(room, uid, uid)
    work.chmod(0o711)
    return room


def _closed(room: Path, out: Path) -> Path:
    """``out``, once its writer is shut out, so that what we look at is what we take; raises :class:`SkysailError`."""
    os.chown(room, 0, 0)
    if out.is_symlink() or not out.is_file():
        raise SkysailError("the conversion left no image")
    os.chown(out, 0, 0)
    return out


def _why(failed: ProcessFailed) -> str:
    said = failed.stderr.strip().splitlines()
    return said[-1] if said else f"it was not done within {CONVERT_SECONDS / 60:.0f} minutes, or was ended"
