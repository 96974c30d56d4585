"""Volumes in memory."""

from __future__ import annotations

from pathlib import Path

from skysail.contract.document import Volume


class SimPool:
    """Remembers which volumes exist."""

    def __init__(self) -> None:
        self._volumes: dict[str, Path] = {}

    async def ensure(self, volume: Volume, parent: Path, size_bytes: int, uid: int) -> Path:
        return self._volumes.setdefault(volume.id, Path("/nonexistent") / volume.id)

    async def observe(self) -> dict[str, Path]:
        return dict(self._volumes)

    async def remove(self, volume_id: str) -> None:
        self._volumes.pop(volume_id, None)

    async def check(self) -> list[str]:
        return []
