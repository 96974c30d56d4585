"""Snapshots in a Ceph pool, of volumes that are images of it (see ``rbd.py``). Hardly a byte is copied.

An RBD snapshot of each volume, named after ours, is cloned into an image of its own, ``<snapshot>.<volume>``, which goes on
when the volume is deleted. So no snapshot stands on another here: what they share, Ceph keeps by itself.

Monitors agree on each RBD snapshot, which takes them up to a second (``paxos_propose_interval``), and the volumes of a guest
get theirs one by one. So what a running guest overwrites from the snapshot's own moment on is copied by QEMU into a file of
this host, the draft's; it is written over the clone, which then shows that moment.

What a snapshot is lies in the metadata of the image ``_snapshots``: a key each, written last, in one change. A key that
begins with a full stop is a draft.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import msgspec

from skysail.contract.document import Origin, Volume
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run, run_async
from skysail.storage import Copy, Manifest, ceph
from skysail.storage.ceph import Cluster
from skysail.storage.chains import bounded
from skysail.storage.rbd import WHOLE, clone, discard, keep, take, tidy
from skysail.storage.shelf import MANIFEST, inspect

log = logging.getLogger(__name__)
INDEX = "_snapshots"
# From so many clones over clones on, a copy holds everything: each one makes a read of what nobody wrote longer.
MAX_DEPTH = 6


class RbdShelf:
    """Snapshots in ``cluster``. What an import laid in ``folder`` on this host is taken from there by the user id ``uid``."""

    layered = False

    def __init__(self, cluster: Cluster, folder: Path, uid: int) -> None:
        self._cluster = cluster
        self._folder = folder
        self._uid = uid
        self._indexing = asyncio.Lock()

    async def draft(self, snapshot_id: str, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
        """See :class:`skysail.storage.Shelf`; raises ProcessFailed when this host's disk is full."""
        await self._drop(snapshot_id, copies)
        # Noted before the first effect: whoever removes the draft knows which volumes were marked.
        await self._note(f".{snapshot_id}", Manifest(id=snapshot_id, consistency="crash", copies=tuple(copies)))
        return await in_thread(_make, self._folder / f".{snapshot_id}", copies, uid)

    async def mark(self, manifest: Manifest) -> None:
        """See :class:`skysail.storage.Shelf`. A QEMU that has a volume open does it, on being asked by the cluster."""
        await asyncio.gather(*(self._mark(copy.volume, manifest.id) for copy in manifest.copies))

    async def finish(self, manifest: Manifest, uid: int) -> Manifest:
        """See :class:`skysail.storage.Shelf`; repeatable from wherever it was cut off. ``uid`` reads the draft's files."""
        copies = []
        there = set(await self._cluster.names())
        for copy in manifest.copies:
            name = f"{manifest.id}.{copy.volume}"
            if name not in there:
                await clone(self._cluster, self._cluster.image(copy.volume, manifest.id), name,
                            then=partial(self._complete, manifest, copy, uid))
                if await self._depth(copy.volume) >= MAX_DEPTH:
                    await self._cluster.rbd("flatten", "--no-progress", self._cluster.image(name).spec,
                                            seconds=ceph.MOVE_SECONDS)
            await self._unmark(copy.volume, manifest.id)
            copies.append(msgspec.structs.replace(copy, file=copy.volume, parents=(), sha256=""))
        whole = msgspec.structs.replace(manifest, copies=tuple(copies), parents=())
        await self._note(manifest.id, whole)
        await self._forget(f".{manifest.id}")
        await in_thread(shutil.rmtree, self._folder / f".{manifest.id}", ignore_errors=True)
        return whole

    async def _complete(self, manifest: Manifest, copy: Copy, uid: int, half: str) -> None:
        """Let the image show the snapshot's moment: what was overwritten since, until it was marked, is written over it."""
        file = self._folder / f".{manifest.id}" / f"{copy.volume}.qcow2"
        if manifest.consistency != "off":
            await in_thread(inspect, file, msgspec.structs.replace(copy, parents=()))
            with tempfile.TemporaryDirectory() as room:
                Path(room).chmod(0o711)
                key = Path(room) / "key"
                key.touch(0o600)
                os.chown(key, uid, -1)
                key.write_text(self._cluster.key())
                whole = {"driver": "qcow2", "file": {"driver": "file", "filename": str(file)},
                         "backing": self._cluster.image(half).node()}
                await run_async(bounded(uid, "qemu-img", "commit", "-q", "-d", "--object", ceph.secret(key),
                                        f"json:{msgspec.json.encode(whole).decode()}"), timeout=ceph.MOVE_SECONDS)
        await keep(self._cluster, half)

    async def find(self, snapshot_id: str) -> Manifest | None:
        return await self._read(snapshot_id)

    async def chain(self, origin: Origin) -> tuple[str, ...]:
        held = await self.find(origin.snapshot)
        for copy in held.copies if held else ():
            if copy.volume == origin.volume:
                return (str(self._cluster.file(f"{origin.snapshot}.{origin.volume}", WHOLE)),)
        raise SkysailError(f"the snapshot {origin.snapshot} of {origin.volume} is not in the pool {self._cluster.pool}",
                           "bring it back (rbd trash ls may have it), or use another one")

    async def verify(self, origin: Origin) -> None:
        """See :class:`skysail.storage.Shelf`. That the bytes are what they were is Ceph's own promise, which it keeps by
        checksums and scrubbing."""
        (file,) = await self.chain(origin)
        image = ceph.Image.find(file)
        if image is None or not await self._cluster.exists(image.name, WHOLE):
            raise SkysailError(f"the image of {origin.volume} in snapshot {origin.snapshot} is not in the pool any more",
                               "bring it back (rbd trash ls may have it), or use another snapshot")

    async def show(self, origin: Origin, room: Path, uid: int) -> tuple[str, ...]:
        """See :class:`skysail.storage.Shelf`; raises ProcessFailed when this host's disk is full."""
        raw, shown = room / "raw", room / f"{origin.volume}.qcow2"
        image = ceph.Image.find((await self.chain(origin))[0])
        assert image is not None
        await self._cluster.rbd("export", "--no-progress", image.spec, str(raw), seconds=ceph.MOVE_SECONDS)
        try:
            raw.chmod(0o600)
            os.chown(raw, uid, -1)
            await run_async(bounded(uid, "qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(shown)))
        finally:
            raw.unlink()
        return (str(shown),)

    async def duplicate(self, snapshot_id: str, source_id: str) -> None:
        held = await self.find(source_id)
        if held is None:
            raise SkysailError(f"the snapshot {source_id} is not in the pool {self._cluster.pool} any more",
                               "use another one")
        await self._drop(snapshot_id, ())
        for copy in held.copies:
            await clone(self._cluster, self._cluster.image(f"{source_id}.{copy.volume}", WHOLE),
                        f"{snapshot_id}.{copy.volume}", then=partial(keep, self._cluster))
        await self._note(snapshot_id, msgspec.structs.replace(held, id=snapshot_id))

    async def arrive(self, snapshot_id: str) -> None:
        """See :class:`skysail.storage.Shelf`. An import is laid in this host's folder, as for a shelf of files."""
        laid = self._folder / f".{snapshot_id}"
        try:
            held = msgspec.json.decode((laid / MANIFEST).read_bytes(), type=Manifest)
        except FileNotFoundError as lost:
            raise SkysailError(f"what was imported as {snapshot_id} is not on this host", "import it again") from lost
        copies = []
        with tempfile.TemporaryDirectory(dir=self._folder) as room:
            Path(room).chmod(0o711)
            for copy in held.copies:
                name = f"{snapshot_id}.{copy.volume}"
                await take(self._cluster, laid / copy.file, Path(room) / copy.volume, self._uid, name)
                (Path(room) / copy.volume).unlink()
                copies.append(msgspec.structs.replace(copy, file=copy.volume, sha256=""))
        await self._note(snapshot_id, msgspec.structs.replace(held, copies=tuple(copies)))
        await in_thread(shutil.rmtree, laid)

    async def parents(self, volume: Volume) -> tuple[str, ...]:
        return ()

    def standing(self, files: Sequence[str]) -> set[str]:
        return set()

    async def current(self, chain: Sequence[str]) -> tuple[str, ...]:
        return tuple(chain)

    async def lift(self, snapshot_id: str, leaving: Collection[str], uid: int) -> Manifest | None:
        """See :class:`skysail.storage.Shelf`: it stands on none."""
        return await self.find(snapshot_id)

    async def observe(self) -> list[str]:
        return sorted(key for key in await self._keys() if not key.startswith("."))

    async def remove(self, snapshot_id: str) -> None:
        held = await self._read(snapshot_id) or await self._read(f".{snapshot_id}")
        # Its key first: it is not half a snapshot at any moment. The draft's key last: until then all of it is known.
        if held is not None:
            await self._note(f".{snapshot_id}", held)
        await self._forget(snapshot_id)
        await self._drop(snapshot_id, held.copies if held is not None else ())
        await self._forget(f".{snapshot_id}")
        await tidy(self._cluster)

    # --- marks

    async def _mark(self, volume_id: str, snapshot_id: str) -> None:
        try:
            await self._cluster.rbd("snap", "create", "--no-progress", self._cluster.image(volume_id, snapshot_id).spec)
        except ProcessFailed as failed:
            if failed.code == ceph.ABSENT:
                raise SkysailError(f"the volume {volume_id} is not in the pool {self._cluster.pool}") from failed
            if failed.code != ceph.EXISTS:
                raise

    async def _unmark(self, volume_id: str, snapshot_id: str) -> None:
        """The volume is marked no more; Ceph keeps what its clone needs."""
        try:
            await self._cluster.rbd("snap", "rm", "--no-progress", self._cluster.image(volume_id, snapshot_id).spec)
        except ProcessFailed as failed:
            if failed.code != ceph.ABSENT:
                raise

    async def _drop(self, snapshot_id: str, copies: Sequence[Copy]) -> None:
        """Nothing of a snapshot is there but what the index says of it."""
        for copy in copies:
            await self._unmark(copy.volume, snapshot_id)
        made = [name for name in await self._cluster.names() if name.removeprefix("_new.").startswith(f"{snapshot_id}.")]
        if made:
            await discard(self._cluster, *made)
        await in_thread(shutil.rmtree, self._folder / f".{snapshot_id}", ignore_errors=True)

    async def _depth(self, name: str) -> int:
        """How many snapshots an image stands on, one on the other."""
        place = ["--pool", self._cluster.pool]
        place += ["--namespace", self._cluster.namespace] if self._cluster.namespace else []
        where, depth = ["--image", name], 0
        while parent := msgspec.json.decode(
                await self._cluster.rbd("info", "--format", "json", *place, *where)).get("parent"):
            # By its id: one that waits in the trash has no name.
            where, depth = ["--image-id", parent["id"]], depth + 1
        return depth

    # --- the index

    async def _keys(self) -> dict[str, str]:
        try:
            said = await self._cluster.rbd("image-meta", "list", "--format", "json", self._cluster.image(INDEX).spec)
        except ProcessFailed as failed:
            if failed.code == ceph.ABSENT:
                return {}
            raise
        # Without a key it prints nothing at all.
        found: dict[str, str] = msgspec.json.decode(said) if said.strip() else {}
        return found

    async def _read(self, key: str) -> Manifest | None:
        try:
            said = await self._cluster.rbd("image-meta", "get", self._cluster.image(INDEX).spec, key)
        except ProcessFailed as failed:
            if failed.code == ceph.ABSENT:
                return None
            raise
        try:
            return msgspec.json.decode(said, type=Manifest)
        except msgspec.MsgspecError as damaged:
            raise SkysailError(f"what the pool says of snapshot {key} cannot be read: {damaged}") from damaged

    async def _note(self, key: str, manifest: Manifest) -> None:
        index = self._cluster.image(INDEX).spec
        async with self._indexing:
            if not await self._cluster.exists(INDEX):
                with contextlib.suppress(ProcessFailed):  # another host made it meanwhile
                    await self._cluster.rbd("create", "--size", "1M", index)
        await self._cluster.rbd("image-meta", "set", index, key, msgspec.json.encode(manifest).decode())

    async def _forget(self, key: str) -> None:
        try:
            await self._cluster.rbd("image-meta", "remove", self._cluster.image(INDEX).spec, key)
        except ProcessFailed as failed:
            if failed.code != ceph.ABSENT:
                raise


def _make(folder: Path, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
    folder.mkdir(parents=True, mode=0o711)
    made = {}
    for copy in copies:
        path = folder / f"{copy.volume}.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(copy.virtual_bytes)])
        path.chmod(0o600)
        os.chown(path, uid, -1)
        made[copy.volume] = path
    return made
