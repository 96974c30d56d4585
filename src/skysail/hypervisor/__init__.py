"""The hypervisor door: guests of one host. Engines: QEMU, and a simulation that keeps the same promises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Protocol

import msgspec

from skysail.contract.document import Guest, Snapshot, Volume
from skysail.contract.report import GuestReport, SnapshotReport


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest's process, of this identity and age, has used. ``answers``: whether its agent does; None when it was not
    asked, or there is none. ``busy``: the guest is being changed just now, perhaps it has no process yet. ``waiting``: its
    process waits for it to come from another host."""

    process: str
    age_seconds: float
    cpu_seconds: float
    answers: bool | None = None
    busy: bool = False
    waiting: bool = False


class Hypervisor(Protocol):
    """Holds guests. Every call is idempotent and may be repeated after a crash at any moment."""

    async def ensure(self, guest: Guest) -> GuestReport:
        """Bring ``guest`` to its role and say how it stands. Volume and port exist already. What takes long, a guest's way to
        another host, goes on behind the answer, and is told of by :meth:`changes`."""
        ...

    async def snapshot(self, snapshot: Snapshot, progress: Callable[[SnapshotReport], Awaitable[None]]) -> SnapshotReport:
        """Bring ``snapshot`` to its role and say how it stands, and by ``progress`` how it comes along. Its volumes exist
        already. A guest that runs goes on meanwhile."""
        ...

    async def snapshots(self) -> list[SnapshotReport]:
        """Every snapshot that is here whole; no effects."""
        ...

    async def flatten(self, volume: Volume, guest_id: str) -> bool:
        """Let a volume, which the guest of this id has ('' for none), stand on no snapshot any more, and read the same. Its
        guest goes on meanwhile. False when it cannot be now, because something else is done with it: ask again."""
        ...

    async def lift(self, snapshot_id: str, leaving: Collection[str]) -> SnapshotReport | None:
        """Let a snapshot stand on none of those ``leaving``; how it stands, None when it is not here whole."""
        ...

    async def observe(self) -> list[GuestReport]:
        """Every guest that this host holds, adopted ones included; no effects."""
        ...

    async def strays(self) -> list[str]:
        """What is here of guests that this engine does not hold (processes, folders), each in words; no effects."""
        ...

    def changes(self) -> AsyncIterator[GuestReport]:
        """Guests that changed by themselves (died, halted, came, went on their way), as they stand now."""
        ...

    async def usage(self) -> dict[str, Usage]:
        """What each guest that has a process, or is about to have one, has used; no effects."""
        ...

    async def bound(self, guest_id: str, processors: float) -> None:
        """Let the guest use at most so many processors from now on, until its process ends."""
        ...

    async def prepare(self, image: str, vcpus: int) -> None:
        """Make ready what a launch of ``image`` (its digest) needs, so that the launch itself is quick."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure; empty when all is well."""
        ...
