"""Snapshots as folders of read-only qcow2 files with a manifest.

The files are written by the guest's own QEMU process, so nothing that they say is believed: their parents are those of the
manifest, which the agent wrote, and whoever opens them names every node. Source: QEMU docs/interop/qcow2.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from skysail.contract.document import Origin
from skysail.kit import durable
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run
from skysail.storage import Copy, Manifest
from skysail.storage.checksums import Checksums

MANIFEST = "manifest.json"


class FileShelf:
    """Snapshots under ``folder``, each a folder named by its id; a draft's name begins with a dot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checksums = Checksums()

    def _draft(self, snapshot_id: str) -> Path:
        return self._folder / f".{snapshot_id}"

    async def draft(self, snapshot_id: str, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
        """See :class:`skysail.storage.Shelf`; raises ProcessFailed when the disk is full."""
        return await in_thread(self._make, self._draft(snapshot_id), copies, uid)

    def _make(self, folder: Path, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, mode=0o711)
        made = {}
        for copy in copies:
            path = folder / copy.file
            # The parent is only named here (-u): it is checked where it was made.
            over = ["-u", "-F", "qcow2", "-b", copy.parents[0]] if copy.parents else []
            run(["qemu-img", "create", "-q", "-f", "qcow2", *over, str(path), str(copy.virtual_bytes)])
            path.chmod(0o600)
            os.chown(path, uid, -1)
            made[copy.volume] = path
        return made

    async def finish(self, manifest: Manifest, uid: int) -> Manifest:
        """See :class:`skysail.storage.Shelf`."""
        return await in_thread(_finish, self._draft(manifest.id), self._folder / manifest.id, manifest, uid)

    async def find(self, snapshot_id: str) -> Manifest | None:
        try:
            return msgspec.json.decode((self._folder / snapshot_id / MANIFEST).read_bytes(), type=Manifest)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as damaged:
            raise SkysailError(f"the manifest of snapshot {snapshot_id} cannot be read: {damaged}") from damaged

    async def chain(self, origin: Origin) -> tuple[str, ...]:
        held = await self.find(origin.snapshot)
        for copy in held.copies if held else ():
            if copy.volume == origin.volume:
                return (str(self._folder / origin.snapshot / copy.file), *copy.parents)
        raise SkysailError(f"the snapshot {origin.snapshot} of {origin.volume} is not on this host any more",
                           "bring its folder back")

    async def verify(self, origin: Origin) -> None:
        """See :class:`skysail.storage.Shelf`; of images and templates below, the agent's library and verify know."""
        for file in map(Path, await self.chain(origin)):
            held = await self.find(file.parent.name) if file.parent.parent == self._folder else None
            for copy in held.copies if held else ():
                if copy.file == file.name:
                    await in_thread(self._checksums.check, file, copy.sha256)

    async def duplicate(self, snapshot_id: str, source_id: str) -> None:
        """See :class:`skysail.storage.Shelf`. Files never change, so two folders may hold the same ones (link(2))."""
        held = await self.find(source_id)
        if held is None:
            raise SkysailError(f"the snapshot {source_id} is not on this host any more", "bring its folder back")
        for copy in held.copies:
            await self.verify(Origin(snapshot=source_id, volume=copy.volume))
        await in_thread(_duplicate, self._folder / source_id, self._draft(snapshot_id), self._folder / snapshot_id,
                        msgspec.structs.replace(held, id=snapshot_id))

    async def arrive(self, snapshot_id: str) -> None:
        """See :class:`skysail.storage.Shelf`. What an import laid here is a draft that has its manifest already."""
        if not (self._draft(snapshot_id) / MANIFEST).exists():
            raise SkysailError(f"what was imported as {snapshot_id} is not on this host", "import it again")
        await in_thread(_appear, self._draft(snapshot_id), self._folder / snapshot_id)

    async def observe(self) -> list[str]:
        if not self._folder.exists():
            return []
        return sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))

    async def remove(self, snapshot_id: str) -> None:
        for other in await self.observe():
            held = await self.find(other) if other != snapshot_id else None
            if held is not None and snapshot_id in held.parents:
                raise SkysailError(f"the snapshot {other} stands on {snapshot_id}")
        await in_thread(_remove, (self._draft(snapshot_id), self._folder / snapshot_id))


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.exists():
            # Renamed first: a crash in the middle leaves a draft, not half a snapshot.
            gone = folder if folder.name.startswith(".") else folder.rename(folder.with_name(f".{folder.name}"))
            shutil.rmtree(gone)
            durable.sync(folder.parent)


def _finish(draft: Path, folder: Path, manifest: Manifest, uid: int) -> Manifest:
    copies = []
    for copy in manifest.copies:
        path = draft / copy.file
        _inspect(path, copy)
        _check(path, uid)
        if manifest.consistency != "off":
            # Copied once more: the guest's process may have kept the file open, and nobody shall be able to change this one.
            own = path.with_suffix(".own")
            run(["cp", "--reflink=auto", "--sparse=always", str(path), str(own)])
            own.replace(path)
        os.chown(path, os.geteuid(), os.getegid())
        path.chmod(0o444)
        durable.sync(path)
        _inspect(path, copy)
        copies.append(msgspec.structs.replace(copy, sha256=_digest(path)))
    whole = msgspec.structs.replace(manifest, copies=tuple(copies))
    seal(draft, whole)
    _appear(draft, folder)
    return whole


def seal(draft: Path, whole: Manifest) -> None:
    """The draft has all of its files: give it its manifest."""
    durable.replace(draft / MANIFEST, msgspec.json.format(msgspec.json.encode(whole)), 0o444)
    draft.chmod(0o755)


def _appear(draft: Path, folder: Path) -> None:
    draft.rename(folder)
    durable.sync(folder.parent)


def _duplicate(source: Path, draft: Path, folder: Path, manifest: Manifest) -> None:
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir()
    for copy in manifest.copies:
        (draft / copy.file).hardlink_to(source / copy.file)
    seal(draft, manifest)
    _appear(draft, folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inspect(path: Path, copy: Copy) -> None:
    """The header of a file that a guest's process wrote names the parent that we gave it, and no file of data elsewhere."""
    with path.open("rb") as file:
        head = file.read(104).ljust(104, b"\0")
        magic, _version, at, length = struct.unpack_from(">4sIQI", head)
        (features,) = struct.unpack_from(">Q", head, 72)
        file.seek(at)
        parent = file.read(min(length, 1023)).decode(errors="replace") if at else ""
    if magic != b"QFI\xfb" or features & 0b100 or parent != (copy.parents[0] if copy.parents else ""):
        raise SkysailError(f"the copy of {copy.volume} is not the file that was asked for")


def _check(path: Path, uid: int) -> None:
    """qemu-img's own check, with no more rights than the process that wrote the file; raises SkysailError on damage. Clusters
    that a killed process left unused are no damage: they are given back."""
    held = [] if uid == os.geteuid() else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs",
                                           "--bounding-set=-all", "--inh-caps=-all", "--"]
    opened = msgspec.json.encode({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None})
    try:
        run([*held, "qemu-img", "check", "-q", "-r", "leaks", f"json:{opened.decode()}"])
    except ProcessFailed as damaged:
        raise SkysailError(f"the snapshot's file {path.name} is damaged: {damaged.what}") from damaged
