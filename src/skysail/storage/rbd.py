"""Volumes as images of a Ceph pool, which every host of the cloud sees: nothing of a guest's disk lies on its host.

An image ``<volume>`` is blank, or a copy-on-write clone (RBD layering) of a snapshot: of a *base*, into which a file of this
host is written once, or of a snapshot's copy (see ``rbd_shelf.py``). What a clone stands on is kept by Ceph for as long as it
is needed, also when we have deleted it: it waits in the pool's trash.

Names that begin with ``_`` are this module's own: ``_base.<what it holds>``, and ``_new.<name>`` for what is not whole yet.
An image is made under such a name and gets its own by a rename, which is one change of the pool's directory: whoever dies on
the way, there is a whole image or none. Source: rbd(8); Ceph docs, "Snapshots", "Layering", "RBD exclusive locks".
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from skysail.contract.document import Volume
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run, run_async
from skysail.storage import ceph
from skysail.storage.ceph import Cluster, Image
from skysail.storage.chains import bounded

log = logging.getLogger(__name__)
# The snapshot of a base, or of a copy, that others are cloned from.
WHOLE = "whole"
_NEW, _BASE = "_new.", "_base."


class RbdPool:
    """Volumes in ``cluster``. Files of this host are made raw in ``room`` on their way, by the user id ``uid``, which reads
    images and templates and nothing else."""

    def __init__(self, cluster: Cluster, room: Path, uid: int) -> None:
        self._cluster = cluster
        self._room = room
        self._uid = uid
        self._bases: dict[tuple[str, int, int, int], str] = {}
        self._importing = asyncio.Lock()

    async def ensure(self, volume: Volume, parent: Path | None, size_bytes: int, uid: int) -> Path:
        """See :class:`skysail.storage.Pool`; raises Away, and SkysailError when the parent is not there. ``uid`` owns nothing
        here: a guest's process has the key of this host's client."""
        if not await self._cluster.exists(volume.id):
            if parent is None:
                await create(self._cluster, volume.id, size_bytes)
            else:
                await clone(self._cluster, Image.find(str(parent)) or await self._base(parent), volume.id, size_bytes)
        return self._cluster.file(volume.id)

    async def give(self, volume_id: str, uid: int) -> Path:
        if not await self._cluster.exists(volume_id):
            raise SkysailError(f"the disk {volume_id} is not in the pool {self._cluster.pool} any more",
                               "bring its image back (rbd trash ls may have it), or delete the disk")
        return self._cluster.file(volume_id)

    async def reclaim(self, volume_id: str) -> None:
        """See :class:`skysail.storage.Pool`. A process that was killed, or whose host went, holds the exclusive lock of its
        image until the cluster has missed it for half a minute; taken from it, its client is on the cluster's blocklist."""
        spec = self._cluster.image(volume_id).spec
        try:
            for lock in msgspec.json.decode(await self._cluster.rbd("lock", "ls", "--format", "json", spec)):
                await self._cluster.rbd("lock", "rm", spec, lock["id"], lock["locker"])
                log.warning("the lock of %s was taken from %s at %s", spec, lock["locker"], lock["address"])
        except ProcessFailed as failed:
            if failed.code != ceph.ABSENT:
                raise

    async def observe(self) -> dict[str, Path]:
        return {name: self._cluster.file(name) for name in await self._cluster.names()
                if "." not in name and not name.startswith("_")}

    async def remove(self, volume_id: str) -> None:
        await self.reclaim(volume_id)
        await discard(self._cluster, f"{_NEW}{volume_id}", volume_id)
        await tidy(self._cluster)

    async def check(self) -> list[str]:
        """See :class:`skysail.storage.Pool`."""
        for program, package in (("rbd", "ceph-common"), ("qemu-img", "qemu-utils")):
            if shutil.which(program) is None:
                return [f"{program} is not installed: run sudo ./skysail up, or apt-get install {package}"]
        if "rbd" not in (await run_async(["qemu-img", "--help"])).decode().partition("formats:")[2].split():
            return ["QEMU has no driver for RBD: apt-get install qemu-block-extra, of the same release as qemu-system-x86"]
        if not self._cluster.conf.is_file():
            return [f"there is no {self._cluster.conf}: set ceph_conf in skysail.toml to the cluster's configuration"]
        if not self._cluster.conf.stat().st_mode & stat.S_IROTH:
            return [f"guests' processes cannot read {self._cluster.conf}: chmod a+r (it names the monitors, and no secret)"]
        try:
            self._cluster.key()
            if self._cluster.keyring.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                return [f"others than root can read the keyring {self._cluster.keyring}: chmod 600"]
            await self._cluster.names()
        except SkysailError as failed:
            return [f"{failed.what}: {failed.cure}" if failed.cure else failed.what]
        return []

    async def _base(self, parent: Path) -> Image:
        """The snapshot that holds what the file ``parent`` shows, with all that it stands on. It is known by its content, so
        that hosts with the same image share one."""
        if not parent.is_file():
            raise SkysailError(f"the file {parent} that a volume is to be made of is not on this host any more")
        seen = parent.stat()
        key = (str(parent), seen.st_ino, seen.st_size, seen.st_mtime_ns)
        async with self._importing:
            if key not in self._bases:
                name = f"{_BASE}{await in_thread(_digest, parent)}"
                if not await self._cluster.exists(name):
                    await self._import(parent, name)
                self._bases[key] = name
        return self._cluster.image(self._bases[key], WHOLE)

    async def _import(self, parent: Path, name: str) -> None:
        with tempfile.TemporaryDirectory(dir=self._room) as folder:
            Path(folder).chmod(0o711)
            raw = Path(folder) / "raw"
            await take(self._cluster, parent, raw, self._uid, name)
        log.info("%s is in the pool as %s", parent, name)


async def take(cluster: Cluster, file: Path, raw: Path, uid: int, name: str) -> None:
    """Make the image ``name``, with its snapshot WHOLE, of what a qcow2 file shows; ``raw`` is written by ``uid`` on the way.
    Nobody with rights interprets what a guest may have written; rbd copies the bytes."""
    raw.touch(0o600)
    os.chown(raw, uid, -1)
    await run_async(bounded(uid, "qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", str(file), str(raw)))
    half = f"{_NEW}{name}"
    await discard(cluster, half)
    await cluster.rbd("import", "--no-progress", str(raw), cluster.image(half).spec, seconds=ceph.MOVE_SECONDS)
    await keep(cluster, half)
    await rename(cluster, half, name)


async def create(cluster: Cluster, name: str, size_bytes: int) -> None:
    """Make a blank image."""
    half = f"{_NEW}{name}"
    await discard(cluster, half)
    await cluster.rbd("create", "--size", f"{size_bytes}B", cluster.image(half).spec)
    await rename(cluster, half, name)


async def clone(cluster: Cluster, source: Image, name: str, size_bytes: int = 0,
                then: Callable[[str], Awaitable[None]] | None = None) -> None:
    """Make an image over a snapshot, at least ``size_bytes`` large; what else makes it whole is done by ``then``."""
    half = f"{_NEW}{name}"
    await discard(cluster, half)
    try:
        await cluster.rbd("clone", source.spec, cluster.image(half).spec)
    except ProcessFailed as failed:
        if failed.code == ceph.ABSENT:
            raise SkysailError(f"{source.spec}, which {name} is to be made of, is not there any more") from failed
        raise
    if size_bytes:
        with contextlib.suppress(_Smaller):
            await _grow(cluster, half, size_bytes)
    if then is not None:
        await then(half)
    await rename(cluster, half, name)


class _Smaller(Exception):
    """An image is larger than it was asked to be: a disk never shrinks."""


async def _grow(cluster: Cluster, name: str, size_bytes: int) -> None:
    held = msgspec.json.decode(await cluster.rbd("info", "--format", "json", cluster.image(name).spec))["size"]
    if held > size_bytes:
        raise _Smaller
    if held < size_bytes:
        await cluster.rbd("resize", "--no-progress", "--size", f"{size_bytes}B", cluster.image(name).spec)


async def keep(cluster: Cluster, name: str) -> None:
    """Give an image its snapshot WHOLE, which nobody removes by mistake."""
    for word in (("snap", "create", "--no-progress"), ("snap", "protect")):
        await cluster.rbd(*word, cluster.image(name, WHOLE).spec)


async def rename(cluster: Cluster, half: str, name: str) -> None:
    """What is whole gets its name."""
    try:
        await cluster.rbd("rename", cluster.image(half).spec, cluster.image(name).spec)
    except ProcessFailed as failed:
        if failed.code != ceph.EXISTS:
            raise
        # Another host made the same one meanwhile.
        await discard(cluster, half)


async def discard(cluster: Cluster, *names: str) -> None:
    """None of these images is there any more; what others still stand on waits in the trash, without a name. Raises
    SkysailError while somebody has one open."""
    there = set(await cluster.names()) if len(names) > 1 else None
    for name in names:
        if there is not None and name not in there:
            continue
        for attempt in ("rm", "purge", "rm", "trash"):
            spec = cluster.image(name).spec
            try:
                if attempt == "purge":
                    await _drop_snapshots(cluster, name)
                    continue
                if attempt == "trash":
                    await cluster.rbd("trash", "mv", spec)
                else:
                    await cluster.rbd("rm", "--no-progress", spec, seconds=ceph.MOVE_SECONDS)
                break
            except ProcessFailed as failed:
                if failed.code == ceph.ABSENT:
                    break
                if failed.code == ceph.BUSY:
                    raise SkysailError(f"the image {spec} is still open somewhere",
                                       "a process that was killed holds it for 30 s more: it is tried again") from failed
                if failed.code != ceph.NOT_EMPTY or attempt == "trash":
                    raise


async def _drop_snapshots(cluster: Cluster, name: str) -> None:
    """Its snapshots go; Ceph keeps those with clones, as nobody's."""
    for one in msgspec.json.decode(await cluster.rbd("snap", "ls", "--format", "json", cluster.image(name).spec)):
        spec = cluster.image(name, one["name"]).spec
        if one["protected"] == "true":
            await cluster.rbd("snap", "unprotect", spec)
        await cluster.rbd("snap", "rm", "--no-progress", spec)


async def tidy(cluster: Cluster) -> None:
    """What waits in the trash and nobody stands on any more goes for good. What cannot go yet is looked at again."""
    place = f"{cluster.pool}/{cluster.namespace}" if cluster.namespace else cluster.pool
    with contextlib.suppress(SkysailError):
        await cluster.rbd("trash", "purge", "--no-progress", place, seconds=ceph.MOVE_SECONDS)


def _digest(file: Path) -> str:
    """Of the file's own bytes and of the names of what it stands on, which are digests themselves."""
    told = msgspec.json.decode(run(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(file)]))
    below = str(told.get("backing-filename", ""))
    with file.open("rb") as content:
        whole = hashlib.file_digest(content, "sha256")
    whole.update(Path(below).name.encode())
    return whole.hexdigest()[:40]
