"""How long a snapshot stops the guest's writers, whatever the size of its disk; and a restore against a cold boot.

For each size an instance gets a block-storage disk of so many GiB (8, the smallest that there is, for less), of which the
guest writes a part. Then a writer on each of its two file systems appends a line and waits until it is on the disk, over and
over, noting how long each took, while snapshots of the instance with both disks are taken:

freeze        how long its file systems were frozen at most, as the snapshot says (``frozen_ms``)
guest stall   the longest that a writer in the guest waited for one line, from the request until the snapshot was there: the
              freeze, the copying in the background, and whatever else the machine did
quiet stall   the same for as long a time before, without a snapshot

Restore: CreateInstancesFromSnapshot of the last one until an SSH login, against the boots of plain QEMU that ``bench launch``
makes, in the same run.
"""

from __future__ import annotations

import json as jsons
import statistics
import sys
import time
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from bench.launch import BLUEPRINT, BUNDLE, cold, follow, medians
from clouds import RealCloud, ensure_image, eventually, running_real_cloud
from skysail.cli import show
from skysail.hypervisor.accelerator import probe
from skysail.images.library import Library
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.serve import blueprints

NAME, DISK, PATH = "server", "data", "/dev/xvdf"
SMALLEST_GIB = 8
BLOCK_MIB = 64
# Started in the guest for each file system: one line of STALLS for each line that is safe on the disk.
WRITER = """
import os, sys, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
stalls = open(sys.argv[2], "w", buffering=1)
last = time.monotonic()
while True:
    os.write(log, b"%f\\n" % last)
    os.fsync(log)
    now = time.monotonic()
    stalls.write(f"{(now - last) * 1000:.1f}\\n")
    last = now
"""
STALLS = "/dev/shm/stalls"
FILES = ("system", "data")


def waited(cloud: RealCloud, api: Any, operations: list[dict[str, Any]], seconds: float = 1800) -> None:
    for operation in operations:
        found = eventually(lambda one=operation["id"]: found if (found := api.get_operation(operationId=one)["operation"])[
            "isTerminal"] else None, seconds, f"{operation['operationType']} ends")
        if found["status"] != "Succeeded":
            raise SkysailError(f"{found['operationType']} of {found['resourceName']} failed: {found.get('errorDetails')}")


def prepare(cloud: RealCloud, api: Any, gib: int, written_gib: float) -> None:
    """The instance, with a disk on which the guest has written ``written_gib``, and its writers."""
    cloud.launch(NAME, bundle=BUNDLE)
    waited(cloud, api, api.create_disk(diskName=DISK, availabilityZone="us-east-1a",
                                       sizeInGb=max(gib, SMALLEST_GIB))["operations"])
    waited(cloud, api, api.attach_disk(diskName=DISK, instanceName=NAME, diskPath=PATH)["operations"])
    cloud.ssh(NAME, f"sudo udevadm settle && sudo mkfs.ext4 -q -m 0 {PATH} && sudo mkdir /data && sudo mount {PATH} /data "
                    "&& sudo chown admin /data", 600)
    # The same random block over and over: zeros would take no room in a copy.
    blocks = max(1, round(written_gib * 1024 / BLOCK_MIB))
    cloud.ssh(NAME, f"dd if=/dev/urandom of=/dev/shm/block bs=1M count={BLOCK_MIB} status=none && "
                    f"for number in $(seq {blocks}); do cat /dev/shm/block; done > /data/fill && "
                    "sync && rm /dev/shm/block", 3600)
    cloud.ssh(NAME, f"cat > writer.py <<'END'\n{WRITER}\nEND\n" + "".join(
        f"nohup python3 writer.py {path} {STALLS}.{name} >/dev/null 2>&1 &\n"
        for name, path in zip(FILES, ("log", "/data/log"), strict=True)) + "sleep 5")


def stalls(cloud: RealCloud, seen: dict[str, int] | None = None) -> dict[str, list[float]]:
    """How long each line took, by file system; those after ``seen``."""
    return {name: [float(line) for line in cloud.ssh(
        NAME, f"tail -n +{seen[name] + 1 if seen else 1} {STALLS}.{name}").split()] for name in FILES}


def counted(cloud: RealCloud) -> dict[str, int]:
    return dict(zip(FILES, (int(cloud.ssh(NAME, f"wc -l < {STALLS}.{name}")) for name in FILES), strict=True))


def snapshot(cloud: RealCloud, api: Any, name: str) -> dict[str, float]:
    """Take one while the writers run; its figures."""
    before = counted(cloud)
    began = time.monotonic()
    operations = api.create_instance_snapshot(instanceName=NAME, instanceSnapshotName=name)["operations"]
    waited(cloud, api, operations)
    seconds = time.monotonic() - began
    during = stalls(cloud, before)
    arn = api.get_instance_snapshot(instanceSnapshotName=name)["instanceSnapshot"]["arn"]
    told = jsons.loads((cloud.config.snapshots_dir / arn.rpartition("/")[2] / "manifest.json").read_text())
    if told["consistency"] != "frozen":
        raise SkysailError(f"the snapshot {name} is {told['consistency']}-consistent: its guest was not frozen")
    before = counted(cloud)
    time.sleep(min(seconds, 60))
    quiet = stalls(cloud, before)
    return {"freeze_ms": told["frozen_ms"], "snapshot_seconds": seconds,
            "guest_stall_ms": max(max(each) for each in during.values()),
            "quiet_stall_ms": max(max(each) for each in quiet.values()),
            "line_ms": statistics.median(line for each in during.values() for line in each)}


def one_size(cloud: RealCloud, api: Any, gib: int, written_gib: float, snapshots: int) -> dict[str, Any]:
    """The figures of ``snapshots`` snapshots; the last one stays, named after the size."""
    show.step(f"{gib} GiB: the guest writes {written_gib:g} GiB to its disk")
    prepare(cloud, api, gib, written_gib)
    taken = []
    for number in range(snapshots):
        name = f"snap-{gib}-{number}"
        show.step(f"{gib} GiB: snapshot {number + 1} of {snapshots}")
        taken.append(snapshot(cloud, api, name))
        if number + 1 < snapshots:
            api.delete_instance_snapshot(instanceSnapshotName=name)
    cloud.delete(NAME)
    eventually(lambda: api.get_disk(diskName=DISK)["disk"]["state"] == "available", 120, "the disk is free")
    api.delete_disk(diskName=DISK)
    return {"disk_gib": max(gib, SMALLEST_GIB), "written_gib": written_gib, "snapshots": snapshots} | {
        name: max(one[name] for one in taken) for name in ("freeze_ms", "guest_stall_ms", "quiet_stall_ms")} | {
        name: statistics.median(one[name] for one in taken) for name in ("snapshot_seconds", "line_ms")} | {
        "freezes_ms": [one["freeze_ms"] for one in taken], "guest_stalls_ms": [one["guest_stall_ms"] for one in taken]}


def restore(cloud: RealCloud, api: Any, snapshot_name: str, name: str) -> dict[str, float]:
    began = time.monotonic()
    made = api.create_instances_from_snapshot(instanceNames=[name], availabilityZone="us-east-1a", bundleId=BUNDLE,
                                              instanceSnapshotName=snapshot_name)["operations"]
    (own,) = [one["id"] for one in made if one["resourceType"] == "Instance"]
    stages = follow(api, name, own, began)
    cloud.delete(name)
    return stages


def bench(*, gib: tuple[int, ...] = (1, 10, 40), written: float = 4.0, snapshots: int = 3, restores: int = 3,
          boots: int = 1, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Take SNAPSHOTS of an instance with a disk of each size in GIB, of which the guest wrote at most WRITTEN GiB; RESTORES
    of the last one against BOOTS of plain QEMU."""
    require_root()
    show.step(f"image {BLUEPRINT}: looking for the one that this tree builds")
    digest = ensure_image(BLUEPRINT, show.step)
    with running_real_cloud(show.step) as cloud:
        blueprints.prepare(cloud.config, digest, "template: made, unless it is there", show.step)
        accelerator = probe(cloud.config.accelerator_file).accelerator
        seeded, without = cold(Library(cloud.config.images_dir).path(digest), accelerator, boots)
        api = cloud.client()
        by_gib = {}
        for size in gib:
            by_gib[str(size)] = one_size(cloud, api, size, min(written, size), snapshots)
        restored = []
        for number in range(restores):
            show.step(f"restore {number + 1} of {restores}")
            restored.append(restore(cloud, api, f"snap-{gib[-1]}-{snapshots - 1}", f"restored-{number}"))
    show.finish()
    plain, off, login = medians(seeded)["login"], medians(without)["login"], medians(restored)["login"]
    freeze, stall = (max(one[name] for one in by_gib.values()) for name in ("freeze_ms", "guest_stall_ms"))
    show.table([{"GiB": size, "of them written": f"{one['written_gib']:g}", "freeze, ms": f"{one['freeze_ms']:.0f}",
                 "guest stall, ms": f"{one['guest_stall_ms']:.0f}", "quiet stall, ms": f"{one['quiet_stall_ms']:.0f}",
                 "snapshot, s": f"{one['snapshot_seconds']:.1f}"} for size, one in by_gib.items()],
               ["GiB", "of them written", "freeze, ms", "guest stall, ms", "quiet stall, ms", "snapshot, s"])
    show.line(f"longest freeze {freeze:.0f} ms, longest stall that a writer in the guest saw {stall:.0f} ms")
    show.line(f"restore to a login {login:.1f} s; plain QEMU {plain:.1f} s with cloud-init and a seed, {off:.1f} s without "
              f"({accelerator}): ratio {plain / login:.1f}, without cloud-init {off / login:.1f}")
    if json:
        show.as_json({
            "bench": "snapshot", "ratio": plain / login, "ratio_without_cloud_init": off / login, "accelerator": accelerator,
            "freeze_ms_max": freeze, "guest_stall_ms_max": stall, "by_gib": by_gib, "restore_seconds": login,
            "restores_seconds": [one["login"] for one in restored], "plain_seconds": plain,
            "plain_without_cloud_init_seconds": off})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
