"""The storage door: volumes and snapshots of one host. Engines: qcow2 files, images in a Ceph cluster, and a simulation.

Where a thing lies is said as QEMU's programs take it: the path of a file, or the name of an image (``rbd:…``) in a cluster.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from skysail.contract.document import Origin, Volume

Consistency = Literal["frozen", "crash", "off"]


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """One volume in a snapshot: its file and that file's parents, nearest first; ``sha256`` of the file, '' where the store
    sees to its content itself; sizes in bytes."""

    volume: str
    file: str
    parents: tuple[str, ...]
    virtual_bytes: int
    sha256: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is. It lies beside its files and appears with them, in one rename. ``parents`` are the snapshots whose
    files it stands on, ``frozen_ms`` is how long the guest could not write."""

    id: str
    consistency: Consistency
    copies: tuple[Copy, ...]
    frozen_ms: float = 0.0
    parents: tuple[str, ...] = ()


class Pool(Protocol):
    """Holds volumes; each is blank, or a copy-on-write child of a read-only parent."""

    async def ensure(self, volume: Volume, parent: Path | None, size_bytes: int, uid: int) -> Path:
        """Where ``volume`` is, made if absent over ``parent`` (a qcow2 file, named format, never probed, or what a shelf of
        the same store told), for ``uid``. An existing one is left as it is. Atomic: a crash leaves a whole volume or none."""
        ...

    async def give(self, volume_id: str, uid: int) -> Path:
        """The file of an existing volume belongs to ``uid`` from now on; raises SkysailError when it is not here."""
        ...

    async def reclaim(self, volume_id: str) -> None:
        """Whoever had the volume open does not write it any more, wherever it is: a process that was cut off, or a host that
        is not heard of. Nothing where only processes of this host can have it, and those are known to be gone."""
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


class Shelf(Protocol):
    """Holds snapshots: read-only files that never change, and volumes grow from.

    One that is ``layered`` holds files that are copied, and stand on others, which whoever opens them has to open, too, and
    which stay as long as something stands on them. One that is not keeps by itself what volumes hold, and what that stands
    on: nothing here stands on anything.
    """

    @property
    def layered(self) -> bool: ...

    async def draft(self, snapshot_id: str, copies: Sequence[Copy], uid: int) -> dict[str, Path]:
        """Empty files for ``uid`` to copy into, by volume; what an earlier draft of this snapshot left is gone."""
        ...

    async def finish(self, manifest: Manifest, uid: int) -> Manifest:
        """Check the draft's files, note their checksums, and let the snapshot appear, whole, and nobody's to change. Raises
        SkysailError when a file is damaged, or nothing was marked that had to be."""
        ...

    async def mark(self, manifest: Manifest) -> None:
        """Have the store keep what the draft's volumes hold now; nothing for one that is ``layered``. Volumes that are
        written meanwhile are to have what is overwritten copied into the draft's files, from the snapshot's moment on.
        Raises SkysailError when a volume is not there."""
        ...

    async def find(self, snapshot_id: str) -> Manifest | None:
        """The snapshot, if it is here whole."""
        ...

    async def chain(self, origin: Origin) -> tuple[str, ...]:
        """The files that a volume of this origin stands on, nearest first; raises SkysailError when they are not here."""
        ...

    async def verify(self, origin: Origin) -> None:
        """Raises SkysailError when a file that a volume of this origin stands on is not what it was when it was made."""
        ...

    async def show(self, origin: Origin, room: Path, uid: int) -> tuple[str, ...]:
        """:meth:`chain` as files of this host, for ``uid`` to read: what is none yet is laid in the folder ``room``, which is
        that user's, and belongs to the caller."""
        ...

    async def duplicate(self, snapshot_id: str, source_id: str) -> None:
        """Let a snapshot appear that shares the files of another, and does not need it. Raises SkysailError when that one is
        not here, or has changed."""
        ...

    async def arrive(self, snapshot_id: str) -> None:
        """Let a snapshot appear that an import laid here; raises SkysailError when none did."""
        ...

    async def parents(self, volume: Volume) -> tuple[str, ...]:
        """What a volume stands on: its origin's :meth:`chain`, or nothing."""
        ...

    def standing(self, files: Sequence[str]) -> set[str]:
        """The snapshots that these files belong to."""
        ...

    async def current(self, chain: Sequence[str]) -> tuple[str, ...]:
        """A chain that was noted earlier, as it is now: a :meth:`lift` may have changed it below its first file."""
        ...

    async def lift(self, snapshot_id: str, leaving: Collection[str], uid: int) -> Manifest | None:
        """Let the snapshot stand on none of the snapshots ``leaving``: what they show moves into its own files, which get new
        names and checksums. None when it is not here whole. Atomic: a crash leaves the former or the latter, whole. Only for
        one that stands on one of them; ``uid`` does the work."""
        ...

    async def observe(self) -> list[str]:
        """The ids of the snapshots that are here whole."""
        ...

    async def remove(self, snapshot_id: str) -> None:
        """Delete the snapshot, or what there is of its draft; absent is fine. Raises SkysailError while another stands on
        it."""
        ...
