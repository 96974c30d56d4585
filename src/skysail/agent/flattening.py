"""Snapshots that their owner deleted, and others still stand on: what they show moves up to those, one after the other.

Nobody waits for it: one thing at a time, and what has to be done first is waited for. Everything is looked up anew before
each, so that what a document changed meanwhile is not done any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from skysail.contract.document import HostDocument, Volume
from skysail.contract.report import SnapshotReport
from skysail.hypervisor import Hypervisor
from skysail.kit.errors import SkysailError
from skysail.storage import Shelf

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
# What has to wait for something else is tried again after the first, what failed after the second.
BUSY_SECONDS, REST_SECONDS = 3.0, 30.0


class Flattening:
    """``flat`` is called with a disk that stands on no snapshot any more, ``say`` with a snapshot that stands on others."""

    def __init__(self, hypervisor: Hypervisor, shelf: Shelf, flat: Callable[[str], Awaitable[None]],
                 say: Callable[[SnapshotReport], Awaitable[None]], changed: Callable[[str], Awaitable[None]]) -> None:
        self._hypervisor = hypervisor
        self._shelf = shelf
        self._flat = flat
        self._say = say
        self._changed = changed
        self._document: HostDocument | None = None
        self._wake = asyncio.Event()
        self._done: set[str] = set()
        self._resting: dict[str, float] = {}

    def take(self, document: HostDocument) -> None:
        """What is wanted now."""
        self._document = document
        self._wake.set()

    async def run(self) -> None:
        """Move what is to be moved; runs until cancelled."""
        while True:
            self._wake.clear()
            leaving = {one.id for one in (self._document.snapshots if self._document else ())
                       if one.leaving and one.role == "keep"}
            if not leaving:
                await self._wake.wait()
                continue
            try:
                await self._round(leaving)
            except Exception:
                log.exception("looking for what to flatten goes on after a failure")
            await asyncio.sleep(LOOK_SECONDS)

    async def _round(self, leaving: set[str]) -> None:
        """One thing, if there is any that stands on one of these snapshots."""
        if self._document is None:
            return
        now = asyncio.get_running_loop().time()
        for volume, guest in self._volumes(self._document):
            if volume.id in self._done or self._resting.get(volume.id, 0.0) > now or not await self._stands(volume, leaving):
                continue
            self._resting[volume.id] = now + BUSY_SECONDS
            try:
                if await self._hypervisor.flatten(volume, guest):
                    self._done.add(volume.id)
                    await (self._changed(guest) if volume.id == guest else self._flat(volume.id))
            except SkysailError as failure:
                self._resting[volume.id] = asyncio.get_running_loop().time() + REST_SECONDS
                log.warning("the volume %s still stands on snapshots: %s", volume.id, failure)
            return
        for identifier in await self._shelf.observe():
            held = await self._shelf.find(identifier)
            if held is None or identifier in leaving or not leaving & set(held.parents) or self._resting.get(
                    identifier, 0.0) > now:
                continue
            self._resting[identifier] = now + REST_SECONDS
            try:
                report = await self._hypervisor.lift(identifier, leaving)
                if report is not None:
                    await self._say(report)
            except SkysailError as failure:
                log.warning("the snapshot %s still stands on %s: %s", identifier, sorted(leaving), failure)
            return

    @staticmethod
    def _volumes(document: HostDocument) -> list[tuple[Volume, str]]:
        """The volumes that were made of snapshots, each with the guest that has it."""
        attached = {one.volume.id: guest.id for guest in document.guests for one in guest.disks}
        found = [(guest.volume, guest.id) for guest in document.guests if guest.role != "gone"]
        found += [(disk.volume, attached.get(disk.id, "")) for disk in document.disks if disk.role == "keep" and disk.made]
        return [(volume, guest) for volume, guest in found if volume.origin is not None]

    async def _stands(self, volume: Volume, leaving: set[str]) -> bool:
        try:
            return bool(self._shelf.standing(await self._shelf.parents(volume)) & leaving)
        except SkysailError:
            return False  # its snapshot is lost: nothing of it can be moved
