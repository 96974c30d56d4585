"""An entrance through which nobody comes."""

from __future__ import annotations

from collections.abc import Mapping

from skysail.contract.document import Entrance, Guest


class SimIngress:
    """Remembers which names lead where."""

    def __init__(self) -> None:
        self._names: dict[str, str] | None = None

    async def apply(self, entrance: Entrance, guests: Mapping[str, Guest]) -> None:
        self._names = {one.name: guests[one.guest].port.private_ipv4 for one in entrance.names if one.guest in guests}

    def alive(self) -> bool:
        return self._names is not None

    async def observe(self) -> dict[str, str]:
        return dict(self._names or {})

    async def end(self) -> None:
        self._names = None

    async def check(self) -> list[str]:
        return []
