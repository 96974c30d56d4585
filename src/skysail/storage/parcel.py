"""Parcels: a snapshot as one file that another Skysail can take in.

A parcel is a tar file without compression. Its first member, ``manifest.json``, says what it holds and the sha256 of each
part; the parts ``disk-0.qcow2``, ``disk-1.qcow2`` and so on are whole disks, which stand on nothing, in the manifest's order.

What comes from elsewhere is trusted in nothing. Names in the tar are compared and never opened, a member is a plain file of
the size that the manifest says, the checksums are those of the bytes that were written here, and a disk's header refers to
no other file. ``qemu-img`` looks at it as a user without rights (see ``images/foreign.py``). A checksum protects against
damage, not against its author: what a parcel says is only what its disks' guest gets to be.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, BinaryIO, Literal

import msgspec

from skysail.images import foreign
from skysail.kit import durable
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run
from skysail.storage import Consistency
from skysail.storage.chains import named

VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
_CHUNK = 1 << 20
# An instance has at most 21 paths for disks.
MAX_PARTS = 22

Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_.-]{1,255}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One disk: ``bytes`` and ``sha256`` are its file's."""

    size_gib: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    bytes: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Digest


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """Where a disk of an instance was, and what it was called."""

    path: Annotated[str, msgspec.Meta(pattern=r"\A/dev/xvd[f-z]\Z")]
    name: Name


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance's system disk needs to be started: its image, by digest, and whom it lets in. ``recipe`` is that of
    the image (see ``images/library.py``), empty for a foreign one. ``renews`` is what ``images/renewal.py`` says of it.
    ``disks`` are those of the parts behind the first."""

    image: Digest
    recipe: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
    blueprint: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9_]{0,62}\Z")]
    # Nothing that a terminal would obey.
    blueprint_name: Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]{1,128}\Z")]
    bundle: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]{1,40}\Z")]
    user: Annotated[str, msgspec.Meta(pattern=r"\A[a-z_][a-z0-9_-]{0,31}\Z")]
    renews: bool = True
    disks: tuple[Attached, ...] = ()


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """What a parcel holds. ``origin`` is the name of the instance or disk that the snapshot was made of, ``origin_arn`` its
    Amazon-style name, ``server`` what belongs to an instance's snapshot. ``created_at`` is Unix time."""

    format: Literal["skysail snapshot"] = "skysail snapshot"
    version: int = VERSION
    kind: Literal["InstanceSnapshot", "DiskSnapshot"]
    name: Name
    created_at: float
    consistency: Consistency
    origin_type: Literal["Instance", "Disk"]
    origin: Name
    origin_arn: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9:/._-]{0,400}\Z")]
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    server: Server | None = None

    def __post_init__(self) -> None:
        attached = len(self.server.disks) if self.server is not None else 0
        if (self.kind == "InstanceSnapshot") != (self.server is not None) or len(self.parts) != 1 + attached:
            raise ValueError("its parts are not those of its kind")
        if self.server is not None and len({disk.path for disk in self.server.disks}) != attached:
            raise ValueError("two disks have one path")


def flatten(chain: tuple[str, ...], out: Path, size_gib: int, uid: int, detail: Callable[[str], None]) -> Part:
    """Write all that the chain of files (nearest first) shows into ``out``, a whole qcow2, as user id ``uid``, which owns the
    folder of ``out``. Raises SkysailError."""
    try:
        run([*foreign.held(uid, (size_gib << 30) + (1 << 30)), "qemu-img", "convert", "-O", "qcow2", "-c", "-o",
             "compression_type=zstd", named(chain), str(out)])
    except ProcessFailed as failed:
        raise SkysailError(f"the disk could not be written: {failed.stderr.strip() or failed.what}",
                           "is there room on the disk? is the snapshot still there?") from failed
    detail(f"{out.stat().st_size >> 20} MiB")
    with out.open("rb") as file:
        return Part(size_gib=size_gib, bytes=out.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def write(target: Path, parcel: Parcel, disks: list[Path], detail: Callable[[str], None]) -> None:
    """Write the parcel with its ``disks``, the parts in order. ``target`` appears whole, or not at all; it holds all that the
    disks do, so nobody but its owner reads it."""
    half = target.with_name(f".{target.name}.half")
    text = msgspec.json.format(msgspec.json.encode(parcel))
    try:
        half.unlink(missing_ok=True)  # of one that was killed
        with half.open("xb") as out:
            os.fchmod(out.fileno(), 0o600)
            with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
                _add(tar, MANIFEST, len(text), io.BytesIO(text))
                for number, (path, part) in enumerate(zip(disks, parcel.parts, strict=True)):
                    with path.open("rb") as file:
                        _add(tar, _member(number), part.bytes, _Told(file, detail))
            out.flush()
            os.fsync(out.fileno())
        half.rename(target)
        durable.sync(target.parent)
    except OSError as failed:
        raise SkysailError(f"{target} cannot be written: {failed.strerror}") from failed
    finally:
        half.unlink(missing_ok=True)


def read(source: Path, folder: Path, detail: Callable[[str], None]) -> tuple[Parcel, list[Path]]:
    """Copy the parts of the parcel ``source`` into ``folder``, and check that they are what its manifest says. Raises
    SkysailError for anything that is not a parcel as :func:`write` makes it."""
    try:
        with source.open("rb") as file:
            parcel = _manifest(file, source)
            room = shutil.disk_usage(folder).free - (1 << 30)
            if sum(part.bytes for part in parcel.parts) > room:
                raise SkysailError(f"{source} needs {sum(part.bytes for part in parcel.parts) >> 20} MiB, there is room for "
                                   f"{max(room, 0) >> 20} MiB")
            paths = []
            for number, part in enumerate(parcel.parts):
                paths.append(folder / _member(number))
                _take(file, number, part, paths[-1], detail)
            _end(file)
            return parcel, paths
    except tarfile.TarError as damaged:
        raise SkysailError(f"{source} is damaged, or no exported snapshot: {damaged}",
                           "export the snapshot again") from damaged
    except OSError as failed:
        raise SkysailError(f"{source} cannot be taken in: {failed.strerror}") from failed


def check(path: Path, part: Part, uid: int) -> None:
    """The file is a whole qcow2 of the size that its part says, sound by qemu-img's own check as user id ``uid``, which can
    read it. Raises SkysailError."""
    if foreign.virtual_size(path, "qcow2", part.size_gib << 30) != part.size_gib << 30:
        raise SkysailError(f"the disk {path.name} is not as large as its manifest says")
    try:
        run([*foreign.held(uid, 1 << 20), "qemu-img", "check", "-q", "-f", "qcow2", str(path)],
            timeout=foreign.CONVERT_SECONDS)
    except ProcessFailed as damaged:
        raise SkysailError(f"the disk {path.name} is damaged: {damaged.stderr.strip() or damaged.what}",
                           "export the snapshot again") from damaged


class _Told:
    """A file that says how far it was read."""

    def __init__(self, file: BinaryIO, detail: Callable[[str], None]) -> None:
        self._file = file
        self._detail = detail

    def read(self, size: int) -> bytes:
        before = self._file.tell() >> 20
        piece = self._file.read(size)
        if (now := self._file.tell() >> 20) != before:
            self._detail(f"{now} MiB")
        return piece


def _member(number: int) -> str:
    return f"disk-{number}.qcow2"


def _add(tar: tarfile.TarFile, name: str, size: int, file: IO[bytes] | _Told) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    tar.addfile(member, file)  # type: ignore[arg-type]  # it only reads


def _enter(file: BinaryIO, name: str) -> int:
    """The size of the next member, a plain file of this name. Only its own header is read: tarfile's reader follows others
    that may ask for any amount of memory."""
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or not any(block):
        raise tarfile.ReadError(f"{name} is missing")
    found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if found.type != tarfile.REGTYPE or found.name != name:
        raise tarfile.ReadError(f"{name} is expected, not {found.name[:40]!r}")
    return found.size


def _leave(file: BinaryIO, size: int) -> None:
    """Behind a member of this size."""
    file.read(-size % tarfile.BLOCKSIZE)


def _end(file: BinaryIO) -> None:
    rest = file.read(2 * tarfile.RECORDSIZE)
    if any(rest) or not tarfile.BLOCKSIZE <= len(rest) < 2 * tarfile.RECORDSIZE:
        raise tarfile.ReadError("it holds more or less than its manifest says")


def _manifest(file: BinaryIO, source: Path) -> Parcel:
    size = _enter(file, MANIFEST)
    if not 0 < size <= MAX_MANIFEST_BYTES:
        raise tarfile.ReadError("its manifest is too large")
    text = file.read(size)
    _leave(file, size)
    try:
        told = msgspec.json.decode(text)
        if isinstance(told, dict) and isinstance(told.get("version"), int) and told["version"] > VERSION:
            raise SkysailError(f"{source} was exported by a newer Skysail: its version is {told['version']}, known here is "
                               f"{VERSION}", "upgrade this one")
        return msgspec.convert(told, Parcel)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as wrong:
        raise SkysailError(f"the manifest of {source} cannot be used: {wrong}", "export the snapshot again") from wrong


def _take(file: BinaryIO, number: int, part: Part, target: Path, detail: Callable[[str], None]) -> None:
    name = _member(number)
    size = _enter(file, name)
    if size != part.bytes:
        raise SkysailError(f"{name} is {size} bytes large, its manifest says {part.bytes}")
    whole = hashlib.sha256()
    with target.open("xb") as out:
        while (left := size - out.tell()) and (piece := file.read(min(_CHUNK, left))):
            whole.update(piece)
            out.write(piece)
            detail(f"{out.tell() >> 20} MiB of {size >> 20}")
    if left:
        raise tarfile.ReadError(f"{name} is cut off")
    _leave(file, size)
    if whole.hexdigest() != part.sha256:
        raise SkysailError(f"{name} does not have the checksum that its manifest says", "copy the file here again")
