"""Volumes and snapshots in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from skysail.contract.document import Origin, Volume
from skysail.kit.errors import SkysailError
from skysail.storage import Copy, Manifest


class SimPool:
    """Remembers which volumes exist."""

    def __init__(self) -> None:
        self._volumes: dict[str, Path] = {}

    async def ensure(self, volume: Volume, parent: Path | None, size_bytes: int, uid: int) -> Path:
        return self._volumes.setdefault(volume.id, Path("/nonexistent") / volume.id)

    async def give(self, volume_id: str, uid: int) -> Path:
        if volume_id not in self._volumes:
            raise SkysailError(f"the disk {volume_id} is not on this host")
        return self._volumes[volume_id]

    async def reclaim(self, volume_id: str) -> None:
        """See :class:`skysail.storage.Pool`: its process is gone."""

    async def observe(self) -> dict[str, Path]:
        return dict(self._volumes)

    async def remove(self, volume_id: str) -> None:
        self._volumes.pop(volume_id, None)

    async def check(self) -> list[str]:
        return []


class SimShelf:
    """Remembers which snapshots exist."""

    layered = True

    def __init__(self) -> None:
        self._drafts: dict[str, tuple[Copy, ...]] = {}
        self._held: dict[str, Manifest] = {}

    async def draft(self, snapshot_id: str, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
        self._drafts[snapshot_id] = tuple(copies)
        return {copy.volume: Path("/nonexistent") / snapshot_id / copy.file for copy in copies}

    async def finish(self, manifest: Manifest, uid: int) -> Manifest:
        copies = tuple(msgspec.structs.replace(copy, sha256="0" * 64) for copy in self._drafts.pop(manifest.id))
        self._held[manifest.id] = msgspec.structs.replace(manifest, copies=copies)
        return self._held[manifest.id]

    async def mark(self, manifest: Manifest) -> None:
        """See :class:`skysail.storage.Shelf`: what is copied is all."""

    async def find(self, snapshot_id: str) -> Manifest | None:
        return self._held.get(snapshot_id)

    async def chain(self, origin: Origin) -> tuple[str, ...]:
        held = self._held.get(origin.snapshot)
        found = [copy for copy in held.copies if copy.volume == origin.volume] if held else []
        if not found:
            raise SkysailError(f"the snapshot {origin.snapshot} of {origin.volume} is not on this host")
        return (f"/nonexistent/{origin.snapshot}/{found[0].file}", *found[0].parents)

    async def verify(self, origin: Origin) -> None:
        await self.chain(origin)

    async def show(self, origin: Origin, room: Path, uid: int) -> tuple[str, ...]:
        return await self.chain(origin)

    async def duplicate(self, snapshot_id: str, source_id: str) -> None:
        if source_id not in self._held:
            raise SkysailError(f"the snapshot {source_id} is not on this host any more")
        self._held[snapshot_id] = msgspec.structs.replace(self._held[source_id], id=snapshot_id)

    async def arrive(self, snapshot_id: str) -> None:
        raise SkysailError("nothing can be imported to a simulated host")

    async def parents(self, volume: Volume) -> tuple[str, ...]:
        return await self.chain(volume.origin) if volume.origin is not None else ()

    def standing(self, files: Sequence[str]) -> set[str]:
        return {Path(file).parent.name for file in files}

    async def current(self, chain: Sequence[str]) -> tuple[str, ...]:
        if not chain:
            return ()
        first = Path(chain[0])
        return await self.chain(Origin(snapshot=first.parent.name, volume=first.stem))

    async def lift(self, snapshot_id: str, leaving: Collection[str], uid: int) -> Manifest | None:
        held = self._held.get(snapshot_id)
        if held is None:
            return None
        copies = tuple(msgspec.structs.replace(copy, parents=tuple(
            file for file in copy.parents if not self.standing((file,)) & set(leaving))) for copy in held.copies)
        self._held[snapshot_id] = msgspec.structs.replace(
            held, copies=copies, parents=tuple(one for one in held.parents if one not in leaving))
        return self._held[snapshot_id]

    async def observe(self) -> list[str]:
        return sorted(self._held)

    async def remove(self, snapshot_id: str) -> None:
        standing = [held.id for held in self._held.values() if snapshot_id in held.parents and held.id != snapshot_id]
        if standing:
            raise SkysailError(f"the snapshots {standing} stand on {snapshot_id}")
        self._drafts.pop(snapshot_id, None)
        self._held.pop(snapshot_id, None)
