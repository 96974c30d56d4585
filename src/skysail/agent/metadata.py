"""What guests are told of themselves: holds the responder to it, in one task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable

from skysail.contract.document import Guest, MetadataOptions
from skysail.kit.errors import SkysailError
from skysail.metadata import Record, Responder, Tokenless, tree

log = logging.getLogger(__name__)
# How often the responder is looked at without a reason, and how soon it is told again what it could not be told.
LOOK_SECONDS = 2.0
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class MetadataKeeper:
    """Converges the responder. ``changed`` is awaited when the options of some guest are applied now."""

    def __init__(self, responder: Responder, changed: Callable[[], Awaitable[None]]) -> None:
        self._responder = responder
        self._changed = changed
        self._wanted: dict[str, Record] = {}
        self._applied: dict[str, MetadataOptions] = {}
        self._wake = asyncio.Event()

    def take(self, guests: Iterable[Guest]) -> None:
        """The guests that there are, as they are wanted now."""
        wanted = {one.id: one for one in map(tree.record, guests) if one is not None}
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    def options(self, identifier: str) -> MetadataOptions | None:
        """By which the guest is answered now; None before it is."""
        return self._applied.get(identifier)

    async def tokenless(self) -> Tokenless:
        """The requests without a token so far."""
        return await self._responder.tokenless()

    async def inventory(self) -> dict[str, str] | None:
        """A digest of what each guest is really told; None when nobody answers."""
        return await self._responder.observe()

    async def run(self) -> None:
        """Converge until cancelled."""
        failures, said = 0, ""
        while True:
            self._wake.clear()
            wanted = self._wanted
            try:
                await self._responder.apply(list(wanted.values()))
                failures, said = 0, ""
            except SkysailError as failed:
                failures += 1
                # A first guest is here before the network is: nothing to tell of.
                if failures > 2 and str(failed) != said:
                    said = str(failed)
                    log.warning("instances cannot be told of themselves: %s", failed)
            except Exception:
                failures += 1
                log.exception("instances cannot be told of themselves")
            else:
                applied = {identifier: one.options for identifier, one in wanted.items()}
                if applied != self._applied:
                    self._applied = applied
                    await self._changed()
            pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1] if failures else LOOK_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def close(self) -> None:
        """Nobody is told anything any more."""
        await self._responder.close()
