"""The door to those who share a machine's single address among its guests. Engines: HAProxy (ports 80 and 443, by name), an
SSH jump, and a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from skysail.contract.document import Entrance, Guest


class Ingress(Protocol):
    """One listener in the data plane's namespace. It outlives the agent, which finds it again."""

    async def apply(self, entrance: Entrance, guests: Mapping[str, Guest]) -> None:
        """Lead to ``guests``, by their ids, exactly as ``entrance`` says. Started when it does not run; what is open through
        it stays open. Idempotent. Raises SkysailError when it cannot be."""
        ...

    def alive(self) -> bool:
        """Does it run? A cheap look without effects."""
        ...

    async def observe(self) -> dict[str, str]:
        """The names by which it leads to guests, and the private address behind each; no effects. Raises SkysailError."""
        ...

    async def end(self) -> None:
        """It runs no more; absent is fine."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure."""
        ...
