"""What the guests of a host are made with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from skysail.contract.document import Port, Volume
from skysail.hypervisor.personality import Surroundings
from skysail.hypervisor.process import PROGRAM
from skysail.hypervisor.template import Image, Templates
from skysail.kit.process import in_thread
from skysail.storage import Shelf
from skysail.storage.ceph import Cluster

MakeVolume = Callable[[Volume, Path | None, int, int], Awaitable[Path]]
OpenPort = Callable[[Port], Awaitable[int]]


async def _held_by_nobody(volume_id: str) -> None:
    """A file's only processes are this host's."""


class Workshop(msgspec.Struct, frozen=True, kw_only=True):
    """The doors and folders that every guest of this host is made with. Volumes are in ``cluster``, or files of this host.
    Guests come and go by the address ``underlay``. Their processes are those of the QEMU ``program``. ``announce`` lets
    everybody know that the guest of a port, by its id, is here from now on, which came from another host."""

    guests: Path
    accelerator: Literal["kvm", "tcg"]
    templates: Templates
    find_image: Callable[[str], Image | None]
    make_volume: MakeVolume
    drop_volume: Callable[[str], Awaitable[None]]
    volumes: Callable[[], Awaitable[dict[str, Path]]]
    give_volume: Callable[[str, int], Awaitable[Path]]
    shelf: Shelf
    open_port: OpenPort
    around: Callable[[], Surroundings]  # asked at each launch: a machine's resolvers may change
    underlay: str = "127.0.0.1"
    announce: Callable[[str], Awaitable[None]] | None = None
    program: str = PROGRAM
    cluster: Cluster | None = None
    reclaim_volume: Callable[[str], Awaitable[None]] = _held_by_nobody

    async def pool(self) -> str:
        """Where volumes are, in the same words on every host that sees them; '' for files of this host. Raises SkysailError
        when the cluster has not said yet who it is."""
        return await in_thread(self.cluster.home) if self.cluster is not None else ""
