"""Volumes that stop standing on snapshots: what those show moves into the volume's own file.

The base stays (template and image, which all share); a disk has none. While a guest runs, QEMU copies in the background
(``block-stream``); where nobody has the file open, ``qemu-img rebase`` does. Both write only what the volume does not hold
yet and would read all the same, so that a volume that is half done, by a crash or because somebody wanted it, is whole on
its former chain; it is done again from where it is. Only when everything is on the disk is the shorter chain noted.

Source: QEMU QMP Reference Manual, block-stream; qemu-img(1), rebase.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence

from skysail.contract.document import Volume
from skysail.hypervisor import disks
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.jobs import dismiss, jobs
from skysail.hypervisor.qmp import Monitor, Refused
from skysail.hypervisor.workshop import Workshop
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread
from skysail.storage.chains import rebase

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
# Nobody waits for it, and guests share the host's disks.
BYTES_PER_SECOND = 100 << 20


def job_of(volume_id: str) -> str:
    """The name of QEMU's job that flattens the volume."""
    return f"flat.{volume_id}"


def base(shop: Workshop, chain: Sequence[str]) -> tuple[str, ...]:
    """What of a chain is no snapshot: its end."""
    return tuple(file for file in chain if not shop.shelf.standing((file,)))


async def stream(shop: Workshop, guest: QemuGuest, volume: Volume, lock: asyncio.Lock) -> bool:
    """Flatten one of the volumes of a guest that runs. False when something else has to be done first: the guest is being
    changed, or copied. Raises SkysailError when the copy failed, Gone when its process ended."""
    name = job_of(volume.id)
    async with lock:
        if not guest.alive() or not guest.record.made or guest.record.copying or guest.record.freezing:
            return False
        monitor = await guest.monitor()
        chain = await guest.parents(volume)
        under = base(shop, chain)
        node, found = await disks.find(monitor, volume.id)
        if not await jobs(monitor, name) and await _stands_on(monitor, node) != under[:1]:
            target = {"base-node": found[under[0]], "backing-file": under[0]} if under else {}
            # It goes by itself when it is through: QEMU 10.0 crashes when asked for its nodes while it keeps such a job.
            await monitor.execute("block-stream", {"job-id": name, "device": node, "speed": BYTES_PER_SECOND, **target})
    while await jobs(await guest.monitor(), name):
        await asyncio.sleep(LOOK_SECONDS)
    monitor = await guest.monitor()
    if await _stands_on(monitor, node) != under[:1]:
        # Called off for what cannot wait, or failed.
        raise SkysailError(f"QEMU left the copy for the volume {volume.id} before its end")
    # Everything goes to the disk before anything counts on it: first the most of it, while the guest goes on; then what QEMU
    # itself still holds in memory, the tables, for which the guest waits.
    await in_thread(durable.sync, (await shop.volumes())[volume.id])
    said = await monitor.execute("human-monitor-command", {"command-line": f"qemu-io {node} flush"})
    if said.strip():
        raise SkysailError(f"the volume {volume.id} could not be written out: {said.strip()[:200]}")
    async with lock:
        monitor = await guest.monitor()
        if volume.id == guest.record.id:
            guest.save(parents=under)
        for file in chain[:len(chain) - len(under)]:
            for gone in (found.get(file, ""), f"{found.get(file, '')}-file"):
                with contextlib.suppress(Refused):  # another copy of it may still stand on it
                    await monitor.execute("blockdev-del", {"node-name": gone})
    log.info("the volume %s of guest %s stands on no snapshot any more", volume.id, guest.record.id)
    return True


async def _stands_on(monitor: Monitor, node: str) -> tuple[str, ...]:
    """The file that QEMU itself has right below the node, if any."""
    seen = {one["node-name"]: one for one in await monitor.execute("query-named-block-nodes", {"flat": True})}
    return (seen[node]["backing_file"],) if seen[node].get("backing_file") else ()


async def call_off(monitor: Monitor) -> None:
    """Nothing is flattened in the guest when this returns."""
    await dismiss(monitor, "flat.")


async def offline(shop: Workshop, guest: QemuGuest | None, volume: Volume, uid: int) -> bool:
    """Flatten a volume that no process has open; may be called off at any moment. ``uid`` handles disks of no guest."""
    owner = guest.record.uid if guest is not None else uid
    chain = await guest.parents(volume) if guest is not None else await shop.shelf.parents(volume)
    under = base(shop, chain)
    path = await shop.give_volume(volume.id, owner)
    try:
        await rebase(path, chain, under, owner)
        await in_thread(durable.sync, path)
    finally:
        if guest is None:
            with contextlib.suppress(SkysailError):  # it was deleted meanwhile
                await shop.give_volume(volume.id, os.geteuid())
    if guest is not None and volume.id == guest.record.id:
        guest.save(parents=under)
    log.info("the volume %s stands on no snapshot any more", volume.id)
    return True
