"""Block-storage disks of a running guest: plugged in by QMP, behind one SCSI controller.

The guest sees each as a SCSI disk whose serial is its name (``xvdf``), the same at every boot; images of ours link
/dev/<serial> to it. They are plugged out only with the process. Source: QEMU QMP Reference Manual, blockdev-add, device_add.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from skysail.hypervisor import qemu
from skysail.hypervisor.qmp import Monitor, Refused
from skysail.kit.errors import SkysailError

# The device that QEMU knows the system disk's backend by.
SYSTEM = "/machine/peripheral/vda/virtio-backend"
# Long enough to boot at full speed.
BURST_SECONDS = 120
_DEVICE = re.compile("disk|xvd[f-z]")


async def plugged(monitor: Monitor) -> set[str]:
    """The names of the disks that the guest has."""
    return {str(one.get("qdev", "")) for one in await monitor.execute("query-block")}


async def find(monitor: Monitor, volume_id: str) -> tuple[str, dict[str, str]]:
    """QEMU's node of the volume, and the nodes of its parents by their files; raises SkysailError when it does not have it.

    Drafts of snapshots have files of the same name: the volume's node is the one that a device has.
    """
    seen = {one["node-name"].removesuffix("-file"): one["file"]
            for one in await monitor.execute("query-named-block-nodes", {"flat": True}) if one["drv"] in ("file", "rbd")}
    for name, file in seen.items():
        if _DEVICE.fullmatch(name) and _volume(file) == volume_id:
            prefix = "parent" if name == "disk" else f"{name}-"
            return name, {under: other for other, under in seen.items() if other.startswith(prefix)}
    raise SkysailError(f"the guest does not have the volume {volume_id}")


def _volume(file: str) -> str:
    """Which volume QEMU has there: it names a file by its path, an image of a cluster by how it was opened."""
    return str(json.loads(file.removeprefix("json:"))["image"]) if file.startswith("json:") else Path(file).stem


async def throttle(monitor: Monitor, name: str, iops: int) -> None:
    """Let the disk of device ``name`` share ``iops`` operations a second with the guest's others; for BURST_SECONDS it takes
    four times as many."""
    if iops:
        await monitor.execute("block_set_io_throttle", {
            "id": name, "group": "guest", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0,
            "iops_max": 4 * iops, "iops_max_length": BURST_SECONDS})


async def address(monitor: Monitor, name: str) -> int:
    """Where on its bus the disk of this name was plugged in: a state that is loaded elsewhere knows it by that."""
    return int(await monitor.execute("qom-get", {"path": f"/machine/peripheral/{name}", "property": "scsi-id"}))


async def plug(monitor: Monitor, name: str, chain: Sequence[str], address: int | None = None) -> None:
    """Plug in the disk whose file is the first of ``chain``, its parents behind it, at ``address``, else at the first free
    place; raises Refused, and nothing of it is left in the guest then."""
    place = {} if address is None else {"channel": 0, "scsi-id": address, "lun": 0}
    present = {one["node-name"] for one in await monitor.execute("query-named-block-nodes", {"flat": True})}
    try:
        for node in qemu.nodes(name, chain):
            if node["node-name"] not in present:  # it may be there from an attempt that was cut off
                await monitor.execute("blockdev-add", node)
        await monitor.execute("device_add", {"driver": "scsi-hd", "id": name, "bus": f"{qemu.DISKS}.0", "drive": name,
                                             "serial": name, "device_id": name, **place})
    except Refused:
        for node in reversed(qemu.nodes(name, chain)):
            with contextlib.suppress(Refused):
                await monitor.execute("blockdev-del", {"node-name": node["node-name"]})
        raise
