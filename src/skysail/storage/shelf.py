"""Snapshots as folders of read-only qcow2 files with a manifest.

The files are written by the guest's own QEMU process, so nothing that they say is believed: their parents are those of the
manifest, which the agent wrote, and whoever opens them names every node. Source: QEMU docs/interop/qcow2.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from skysail.contract.document import Origin, Volume
from skysail.kit import durable
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run
from skysail.storage import Copy, Manifest
from skysail.storage.chains import bounded, named, rebase
from skysail.storage.checksums import Checksums

MANIFEST = "manifest.json"


class FileShelf:
    """Snapshots under ``folder``, each a folder named by its id; a draft's name begins with a dot."""

    layered = True

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

    async def mark(self, manifest: Manifest) -> None:
        """See :class:`skysail.storage.Shelf`: what is copied is all."""

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
                return (str(self._folder / origin.snapshot / copy.file), *await self.current(copy.parents))
        raise SkysailError(f"the snapshot {origin.snapshot} of {origin.volume} is not on this host any more",
                           "bring its folder back")

    async def verify(self, origin: Origin) -> None:
        """See :class:`skysail.storage.Shelf`; of images and templates below, the agent's library and verify know."""
        for file in map(Path, await self.chain(origin)):
            held = await self.find(file.parent.name) if file.parent.parent == self._folder else None
            for copy in held.copies if held else ():
                if copy.file == file.name:
                    await in_thread(self._checksums.check, file, copy.sha256)

    async def show(self, origin: Origin, room: Path, uid: int) -> tuple[str, ...]:
        return await self.chain(origin)

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

    async def parents(self, volume: Volume) -> tuple[str, ...]:
        return await self.chain(volume.origin) if volume.origin is not None else ()

    def standing(self, files: Sequence[str]) -> set[str]:
        return {Path(file).parent.name for file in files if Path(file).parent.parent == self._folder}

    async def current(self, chain: Sequence[str]) -> tuple[str, ...]:
        if not chain or not self.standing(chain[:1]):
            return tuple(chain)
        first = Path(chain[0])
        # A volume's id has no dot: see lift, which names files anew.
        return await self.chain(Origin(snapshot=first.parent.name, volume=first.name.partition(".")[0]))

    async def lift(self, snapshot_id: str, leaving: Collection[str], uid: int) -> Manifest | None:
        """See :class:`skysail.storage.Shelf`; raises ProcessFailed when the disk is full."""
        held = await self.find(snapshot_id)
        if held is None:
            return None
        folder = self._folder / snapshot_id
        for left in set(folder.iterdir()) - {folder / MANIFEST, *(folder / copy.file for copy in held.copies)}:
            left.unlink()  # of an earlier attempt that was cut off
        copies = []
        for copy in held.copies:
            current = await self.current(copy.parents)
            kept = tuple(file for file in current if not self.standing((file,)) & set(leaving))
            if not self.standing(current[:1]) & set(leaving):
                copies.append(msgspec.structs.replace(copy, parents=kept))
                continue
            path = folder / f"{copy.volume}.{secrets.token_hex(4)}.qcow2"
            await in_thread(_own_copy, folder / copy.file, path, uid)
            await rebase(path, current, kept, uid)
            moved = msgspec.structs.replace(copy, file=path.name, parents=kept)
            copies.append(msgspec.structs.replace(moved, sha256=await in_thread(_seal, path, moved, uid)))
        made = msgspec.structs.replace(held, copies=tuple(copies), parents=tuple(
            sorted(self.standing([file for copy in copies for file in copy.parents]))))
        # This is the moment: until here the former files and the former manifest hold.
        await in_thread(durable.replace, folder / MANIFEST, _text(made), 0o444)
        for copy in held.copies:
            if copy.file not in {one.file for one in copies}:
                (folder / copy.file).unlink()
        return made

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
        inspect(path, copy)
        _check(path, uid)
        if manifest.consistency != "off":
            # Copied once more: the guest's process may have kept the file open, and nobody shall be able to change this one.
            own = path.with_suffix(".own")
            run(["cp", "--reflink=auto", "--sparse=always", str(path), str(own)])
            own.replace(path)
        copies.append(msgspec.structs.replace(copy, sha256=_shut(path, copy)))
    whole = msgspec.structs.replace(manifest, copies=tuple(copies))
    seal(draft, whole)
    _appear(draft, folder)
    return whole


def seal(draft: Path, whole: Manifest) -> None:
    """The draft has all of its files: give it its manifest."""
    durable.replace(draft / MANIFEST, _text(whole), 0o444)
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


def _text(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest))


def _own_copy(source: Path, target: Path, uid: int) -> None:
    """A copy that ``uid`` may change, until it is sealed."""
    run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)])
    target.chmod(0o600)
    os.chown(target, uid, -1)


def _seal(path: Path, copy: Copy, uid: int) -> str:
    """Check a file that ``uid`` wrote, and shut it; its checksum. Nobody but our own program has had it open."""
    _check(path, uid)
    return _shut(path, copy)


def _shut(path: Path, copy: Copy) -> str:
    """The file is nobody's to change any more, on the disk, and what was asked for; its checksum."""
    os.chown(path, os.geteuid(), os.getegid())
    path.chmod(0o444)
    durable.sync(path)
    inspect(path, copy)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inspect(path: Path, copy: Copy) -> None:
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
    try:
        run(bounded(uid, "qemu-img", "check", "-q", "-r", "leaks", named([str(path)])))
    except ProcessFailed as damaged:
        raise SkysailError(f"the snapshot's file {path.name} is damaged: {damaged.what}") from damaged
