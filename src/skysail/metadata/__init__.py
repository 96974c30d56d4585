"""The metadata door: what an instance learns of itself at 169.254.169.254. Engines: a process that answers guests, and a
simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from skysail.contract.document import Id, MetadataOptions


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What one guest is told. It is known by the ``addresses`` that it asks from, each its own alone. ``leaves`` maps paths
    below a version of the tree to texts; a path that ends in a slash is a listing that is not simply the names below it."""

    id: Id
    addresses: tuple[str, ...]
    options: MetadataOptions
    leaves: dict[str, str]


class Tokenless(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests without a token were answered, by guest, since ``life`` began."""

    life: str
    counts: dict[str, int] = {}


class Responder(Protocol):
    """Answers guests that ask for their metadata."""

    async def apply(self, records: Sequence[Record]) -> None:
        """From the return on, exactly these guests are answered, and in this way. Raises SkysailError when that could not be
        reached; it is tried again."""
        ...

    async def observe(self) -> dict[str, str] | None:
        """A digest of what each guest is told (:func:`skysail.metadata.tree.digest`), by id; None when nobody answers. No
        effects."""
        ...

    async def tokenless(self) -> Tokenless:
        """The requests without a token so far."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure."""
        ...

    async def close(self) -> None:
        """Answer nobody any more."""
        ...
