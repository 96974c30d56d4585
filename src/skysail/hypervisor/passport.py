"""Who a guest is that moves, and no document knows: what its process was started as, and what was plugged into it since.

Source: QEMU QMP Reference Manual, query-memory-devices, query-named-block-nodes.
"""

from __future__ import annotations

from skysail.contract.document import Guest
from skysail.contract.migration import SYSTEM_DISK, MovingDisk, Passport
from skysail.hypervisor import disks
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.qmp import Monitor
from skysail.hypervisor.workshop import Workshop


async def issue(shop: Workshop, guest: QemuGuest, wanted: Guest, monitor: Monitor | None, *, authority: str,
                pool: str) -> Passport:
    """The guest's, as its process is now; without a process, as it would be started. Raises SkysailError when that cannot be
    told."""
    record = guest.record
    shape = record.shape if monitor is not None and record.shape is not None else guest.resting(wanted).shape()
    plugged = await monitor.execute("query-memory-devices") if monitor is not None else []
    chain = await guest.parents(wanted.volume)
    image = shop.find_image(wanted.volume.image)
    return Passport(
        shape=shape, plugged_mib=sum(one["data"]["size"] for one in plugged) >> 20,
        disks=tuple(await _disks(wanted, monitor)),
        generation_id=record.identity.generation_id, host_key=record.identity.host_public, ours=guest.ours(wanted),
        authority=authority, base=wanted.volume.image if image is not None and chain == (str(image.path),) else "",
        seed_bytes=guest.seed.stat().st_size if shape.seed_serial else 0, ipv6=record.ipv6,
        mounted=tuple(name for name, state in record.mounts.items() if state == "Mounted"), starts=record.starts,
        reboots=record.reboots, pool=pool)


async def _disks(wanted: Guest, monitor: Monitor | None) -> list[MovingDisk]:
    """Those that its process has; without one, those that it shall have."""
    block = wanted.disks
    if monitor is None:
        return [MovingDisk(name=name, volume=volume.id, size_bytes=volume.size_gib << 30) for name, volume in (
            (SYSTEM_DISK, wanted.volume), *((one.name, one.volume) for one in block))]
    there = await disks.plugged(monitor)
    volumes = [(SYSTEM_DISK, wanted.volume, 0)]
    volumes += [(one.name, one.volume, await disks.address(monitor, one.name)) for one in block if one.name in there]
    found = []
    for name, volume, address in volumes:
        node, _ = await disks.find(monitor, volume.id)
        found.append(MovingDisk(name=name, volume=volume.id, address=address, size_bytes=await _size(monitor, node)))
    return found


async def _size(monitor: Monitor, node: str) -> int:
    seen = await monitor.execute("query-named-block-nodes", {"flat": True})
    return next(int(one["image"]["virtual-size"]) for one in seen if one["node-name"] == node)
