"""The disks of a guest that goes to another host: QEMU writes them there, and keeps them the same here and there.

Each has a job, a node for the target's disk, and a descriptor of the connection to it, all of one name. By that name an agent
which comes after one that died finds them, and begins only those that are missing.

Source: QEMU QMP Reference Manual, blockdev-add (nbd), blockdev-mirror, block-job-change, block-job-cancel, query-jobs, yank.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from skysail.contract.migration import MovingDisk
from skysail.hypervisor.connections import Connections, Failed
from skysail.hypervisor.jobs import jobs
from skysail.hypervisor.qmp import Monitor, Refused

JOB = "move."
LOOK_SECONDS = 0.1
# What is copied again when one byte of it is written.
GRAIN_BYTES = 4096


class Mirrors:
    """Those of ``disks``. Of the disks in ``over`` the target has what is below the topmost file. Each goes with
    ``bytes_per_second`` at most; 0 sets no bound."""

    def __init__(self, disks: tuple[MovingDisk, ...], over: tuple[str, ...], bytes_per_second: int,
                 connections: Connections) -> None:
        self._disks = disks
        self._over = over
        self._bytes_per_second = bytes_per_second
        self._connections = connections

    async def copy(self, monitor: Monitor, count: Callable[[int, int], None]) -> None:
        """Every disk is the same here and there, and stays so; undone by :func:`cut`. Meanwhile ``count`` is told what
        :meth:`look` says. Raises Failed when one of them does not come to that, and whatever ``count`` raises."""
        begun = {one["id"] for one in await jobs(monitor, JOB)}
        left = {one["node-name"] for one in await monitor.execute("query-named-block-nodes", {"flat": True})}
        for disk in self._disks:
            if f"{JOB}{disk.name}" not in begun:
                if f"{JOB}{disk.name}" in left:  # an agent died between the two
                    await monitor.execute("blockdev-del", {"node-name": f"{JOB}{disk.name}"})
                await self._reach(monitor, disk)
                await monitor.execute("blockdev-mirror", {
                    "job-id": f"{JOB}{disk.name}", "device": disk.name, "target": f"{JOB}{disk.name}",
                    "speed": self._bytes_per_second, "sync": "top" if disk.name in self._over else "full",
                    "auto-dismiss": False, "granularity": GRAIN_BYTES, "on-target-error": "report"})
        await self._until_ready(monitor, count)

    async def _reach(self, monitor: Monitor, disk: MovingDisk) -> None:
        """A node that writes to the target's disk. The connection is ours, its process has no network."""
        await self._connections.to_disks(monitor, f"{JOB}{disk.name}")
        # A target that may unmap is zeroed as a whole, and only what there is goes over; without it, QEMU writes zeros over
        # all of its length, at the speed of the terms.
        await self._connections.ask(monitor, "blockdev-add", {
            "driver": "nbd", "discard": "unmap", "node-name": f"{JOB}{disk.name}", "export": disk.name,
            **self._connections.tls, "server": {"type": "fd", "str": f"{JOB}{disk.name}"}})

    async def _until_ready(self, monitor: Monitor, count: Callable[[int, int], None]) -> None:
        while True:
            seen = await self._jobs(monitor)
            count(*_bytes(seen))
            if all(one["status"] == "ready" for one in seen):
                break
            await asyncio.sleep(LOOK_SECONDS)
        for one in seen:
            # From here on the guest waits for both ends of a write, so that nothing is left to copy when it stands still.
            # QEMU before 8.2 does not know that: there the last writes are copied then.
            with contextlib.suppress(Refused):
                await monitor.execute("block-job-change", {"type": "mirror", "id": one["id"], "copy-mode": "write-blocking"})

    async def look(self, monitor: Monitor) -> tuple[int, int]:
        """Bytes that are the same at both ends, and that there are; raises Failed when a mirror ended, or is missing."""
        return _bytes(await self._jobs(monitor))

    async def _jobs(self, monitor: Monitor) -> list[dict[str, Any]]:
        seen = [one for one in await self._connections.ask(monitor, "query-jobs") if one["id"].startswith(JOB)]
        for one in seen:
            if one.get("error") or one["status"] in ("aborting", "concluded", "null"):
                raise Failed(f"the copy of the disk {one['id'].removeprefix(JOB)} ended: {one.get('error', one['status'])}")
        if len(seen) != len(self._disks):
            raise Failed("QEMU forgot the copies of the disks")
        return seen

    async def end(self, monitor: Monitor) -> None:
        """The guest stands still: what it wrote last is on the target's disk when this returns, and the copies are cut off.
        Repeatable; raises Failed when one of them failed."""
        for disk in self._disks:
            with contextlib.suppress(Refused):  # an agent that died asked before us
                await monitor.execute("block-job-cancel", {"device": f"{JOB}{disk.name}"})
        while seen := await jobs(monitor, JOB):
            for one in seen:
                if one["status"] == "concluded":
                    if one.get("error"):
                        raise Failed(f"the copy of the disk {one['id'].removeprefix(JOB)} failed: {one['error']}")
                    await monitor.execute("job-dismiss", {"id": one["id"]})
            await asyncio.sleep(0.001)


async def forget_ended(monitor: Monitor) -> None:
    """No mirror is left that an agent ended, and died before it had dismissed it: that disk is copied once more."""
    for one in await jobs(monitor, JOB):
        if one["status"] == "concluded":
            await monitor.execute("job-dismiss", {"id": one["id"]})


async def cut(monitor: Monitor) -> None:
    """QEMU writes no disk anywhere else any more. Connections are cut first: on one that hangs, a copy would wait to be
    ended."""
    instances = [one for one in await monitor.execute("query-yank")
                 if one["type"] == "block-node" and one["node-name"].startswith(JOB)]
    if instances:
        with contextlib.suppress(Refused):
            await monitor.execute("yank", {"instances": instances})
    while seen := await jobs(monitor, JOB):
        for one in seen:
            with contextlib.suppress(Refused):  # it ended, or is ending, by itself
                if one["status"] == "concluded":
                    await monitor.execute("job-dismiss", {"id": one["id"]})
                else:
                    await monitor.execute("block-job-cancel", {"device": one["id"], "force": True})
        await asyncio.sleep(0.01)
    for one in await monitor.execute("query-named-block-nodes", {"flat": True}):
        if one["node-name"].startswith(JOB):
            await monitor.execute("blockdev-del", {"node-name": one["node-name"]})


def _bytes(seen: list[dict[str, Any]]) -> tuple[int, int]:
    return sum(one["current-progress"] for one in seen), sum(one["total-progress"] for one in seen)
