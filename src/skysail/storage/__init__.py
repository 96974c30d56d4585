"""The storage door: volumes of one host. Engines: qcow2 files, and a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from skysail.contract.document import Volume


class Pool(Protocol):
    """Holds volumes; each is a copy-on-write child of a read-only parent."""

    async def ensure(self, volume: Volume, parent: Path, size_bytes: int, uid: int) -> Path:
        """The qcow2 file of ``volume``, made if absent over ``parent`` (qcow2, named format, never probed), owned by
        ``uid``. An existing file is left as it is. Atomic: a crash leaves a whole volume or none."""
        ...

    async def observe(self) -> dict[str, Path]:
        """Existing volumes by id."""
        ...

    async def remove(self, volume_id: str) -> None:
        """Delete the volume; absent is fine."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure."""
        ...
