"""Volumes as qcow2 files, each a copy-on-write child of a read-only parent."""

from __future__ import annotations

import os
from pathlib import Path

from skysail.contract.document import Volume
from skysail.kit import durable
from skysail.kit.errors import ProcessFailed
from skysail.kit.process import in_thread, run_async


class FilePool:
    """Volumes under ``folder``. Formats are always named: a guest writes its disk's first bytes, so none is probed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, volume_id: str) -> Path:
        return self._folder / f"{volume_id}.qcow2"

    async def ensure(self, volume: Volume, parent: Path, size_bytes: int, uid: int) -> Path:
        """See :class:`skysail.storage.Pool`; raises ProcessFailed when the disk is full or the parent is damaged."""
        path = self._path(volume.id)
        if path.exists():
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".new")
        await run_async(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(parent), str(half),
                         str(size_bytes)])
        await in_thread(_finish, half, path, uid)
        return path

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
