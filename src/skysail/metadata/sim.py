"""A responder without requests: records in memory."""

from __future__ import annotations

from collections.abc import Sequence

from skysail.metadata import Record, Tokenless
from skysail.metadata.tree import digest


class SimResponder:
    """Remembers what each guest would be told."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    async def apply(self, records: Sequence[Record]) -> None:
        self._records = {one.id: one for one in records}

    async def observe(self) -> dict[str, str] | None:
        return {identifier: digest(one) for identifier, one in self._records.items()}

    async def tokenless(self) -> Tokenless:
        return Tokenless(life="sim")

    async def check(self) -> list[str]:
        return []

    async def close(self) -> None:
        self._records = {}
