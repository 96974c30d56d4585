"""Volumes as qcow2 files, each blank or a copy-on-write child of a read-only parent."""

from __future__ import annotations

import os
from pathlib import Path

from skysail.contract.document import Volume
from skysail.kit import durable
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import in_thread, run_async


class FilePool:
    """Volumes under ``folder``. Formats are always named: a guest writes its disk's first bytes, so none is probed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, volume_id: str) -> Path:
        return self._folder / f"{volume_id}.qcow2"

    async def ensure(self, volume: Volume, parent: Path | None, size_bytes: int, uid: int) -> Path:
        """See :class:`skysail.storage.Pool`; raises ProcessFailed when the disk is full or the parent is damaged."""
        path = self._path(volume.id)
        if path.exists():
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".new")
        over = [] if parent is None else ["-F", "qcow2", "-b", str(parent)]
        if volume.origin is not None and parent is not None:
            # A guest's own process wrote that file: what it says of its parents is not followed, least of all by root.
            over.append("-u")
            if not parent.is_file():
                raise SkysailError(f"the snapshot of volume {volume.id} is not on this host any more")
        await run_async(["qemu-img", "create", "-q", "-f", "qcow2", *over, str(half), str(size_bytes)])
        await in_thread(_finish, half, path, uid)
        return path

    async def give(self, volume_id: str, uid: int) -> Path:
        path = self._path(volume_id)
        try:
            os.chown(path, uid, -1)
        except FileNotFoundError as lost:
            raise SkysailError(f"the disk {volume_id} is not on this host any more",
                               "bring its file back, or delete the disk") from lost
        return path

    async def reclaim(self, volume_id: str) -> None:
        """See :class:`skysail.storage.Pool`: its process is gone."""

    async def observe(self) -> dict[str, Path]:
        return {path.stem: path for path in self._folder.glob("*.qcow2")}

    async def remove(self, volume_id: str) -> None:
        path = self._path(volume_id)
        path.with_suffix(".new").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    async def check(self) -> list[str]:
        try:
            await run_async(["qemu-img", "--version"])
        except ProcessFailed as missing:
            return [f"{missing.what}: {missing.cure}"]
        return []


def _finish(half: Path, path: Path, uid: int) -> None:
    half.chmod(0o600)
    os.chown(half, uid, -1)
    durable.sync(half)
    half.replace(path)
    durable.sync(path.parent)
