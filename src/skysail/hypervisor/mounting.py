"""Block storage that mounts by itself: made a file system where it is blank, and an entry of the guest's fstab (fstab(5)).

The guest's agent runs a script for that, once in each life of the guest's process; it changes nothing where it has been
before. It formats only what neither has a signature that blkid(8) knows nor anything else at its two ends: the owner may have
written to the disk without a file system.
"""

from __future__ import annotations

import logging
from pathlib import Path

from skysail.contract.report import Mount
from skysail.hypervisor import guest_agent
from skysail.hypervisor.qmp import Gone, Refused

log = logging.getLogger(__name__)
# A large disk is formatted slowly under emulation.
MOUNT_SECONDS = 300.0

SCRIPT = rb"""set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
export PATH LC_ALL
place=/mnt/$1
device=
turn=0
while [ -z "$device" ]; do
    for link in "/dev/$1" /dev/disk/by-id/scsi-*_"$1"; do
        if [ -b "$link" ]; then device=$link; break; fi
    done
    turn=$((turn + 1))
    if [ "$turn" -gt 150 ]; then echo "the disk does not appear"; exit 1; fi
    [ -n "$device" ] || sleep 0.2
done
if lsblk -rno MOUNTPOINT "$device" | grep -q .; then exit 0; fi
known=0
kind=$(blkid -p -o value -s TYPE "$device") || known=$?
if [ "$known" = 2 ]; then
    end=$(($(blockdev --getsize64 "$device") - 1048576))
    if ! cmp -s -n 1048576 "$device" /dev/zero || ! cmp -s -n 1048576 -i "$end:0" "$device" /dev/zero; then
        echo "there is something on the disk, but no file system"; exit 1
    fi
    mkfs.ext4 -q "$device"
elif [ -z "$kind" ]; then
    echo "the disk has partitions, or more than one signature"; exit 1
fi
mkdir -p "$place"
if ! grep -Eqs "^[^#]*[[:space:]]$place[[:space:]]" /etc/fstab; then
    cp -p /etc/fstab /etc/fstab.skysail 2>/dev/null || : > /etc/fstab.skysail
    echo "$device $place auto defaults,nofail,x-systemd.device-timeout=30s 0 2" >> /etc/fstab.skysail
    sync -d /etc/fstab.skysail
    mv /etc/fstab.skysail /etc/fstab
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
fi
# At a boot the system mounts it too, by the line in fstab: whoever comes second is told that it is mounted, which is well.
said=$(mount "$place" 2>&1) || mountpoint -q "$place" || { echo "$said"; exit 1; }
"""


async def mount(agent: Path, name: str) -> Mount:
    """Mount the disk ``name`` (its serial) at /mnt/<name>, now and at each boot; how it stands."""
    try:
        async with guest_agent.reached(agent) as channel:
            ended = await guest_agent.run(channel, "/bin/sh", "-s", name, seconds=MOUNT_SECONDS, input=SCRIPT)
    except (Gone, Refused) as failure:
        log.warning("the disk %s is not mounted: %s", name, failure)
        return "Failed"
    if ended.status != 0:
        log.warning("the disk %s is not mounted: %s", name, ended.said)
    return "Mounted" if ended.status == 0 else "Failed"
