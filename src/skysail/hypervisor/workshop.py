"""What the guests of a host are made with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from skysail.contract.document import Port, Volume
from skysail.hypervisor.personality import Surroundings
from skysail.hypervisor.template import Image, Templates
from skysail.storage import Shelf

MakeVolume = Callable[[Volume, Path | None, int, int], Awaitable[Path]]
OpenPort = Callable[[Port], Awaitable[int]]


class Workshop(msgspec.Struct, frozen=True, kw_only=True):
    """The doors and folders that every guest of this host is made with."""

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
