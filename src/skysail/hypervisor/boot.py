"""The wait for a guest that boots, and the cure of a boot that hangs.

An emulated processor whose timer is lost between two threads of QEMU never runs its kernel's housekeeping again: the boot
stands, the kernel complains on the console from another processor, and nothing goes on. Seen under TCG on a machine with many
times more work than processors. A reset is what its owner would do; before the system is up it costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from pathlib import Path

from skysail.hypervisor import guest_agent, process
from skysail.hypervisor.qmp import Monitor

log = logging.getLogger(__name__)
BOOT_SECONDS = 300.0
# The kernel complains after 21 s, also where it only had to wait; what still makes no progress after these is hung.
HUNG_SECONDS = 60.0
SERIAL_BYTES = 256 << 10
BEGINNING = b"Linux version "
# Source: Linux, kernel/rcu/tree_stall.h, rcu_check_gp_kthread_expired_fqs_timer.
COMPLAINT = re.compile(rb"rcu_\w+ kthread timer wakeup didn't happen")


def lost_its_timer(serial: bytes) -> bool:
    """Whether the boot that the end of a ``serial`` log tells of has complained about a timer that never came."""
    return COMPLAINT.search(serial, max(serial.rfind(BEGINNING), 0)) is not None


async def await_agent(run: Path, monitor: Monitor, seconds: float = BOOT_SECONDS) -> None:
    """Until the agent of the guest in the folder ``run`` answers, or the guest goes off by itself; at most ``seconds``,
    because its owner may have removed the agent, and a guest that runs is not restarted for that. One whose boot hangs for
    want of a timer is reset, once."""
    end, hung, reset = time.monotonic() + seconds, None, False
    while (now := time.monotonic()) < end:
        if await guest_agent.answers(run / "agent.sock", 2.0) or await process.status(monitor) != "running":
            return
        if not reset and lost_its_timer(_said(run / "serial.log")):
            hung = hung or now
            if now - hung >= HUNG_SECONDS:
                log.warning("guest %s lost a timer while it booted, and hangs: it is reset", run.parent.name)
                await monitor.execute("system_reset")
                end, reset = now + seconds, True
        await asyncio.sleep(0.2)
    log.warning("guest %s runs, but its agent did not answer in %.0f s", run.parent.name, seconds)


def _said(serial: Path) -> bytes:
    """The end of a serial log; its folder is the guest process's own, so that a link there leads nowhere."""
    try:
        descriptor = os.open(serial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(max(0, os.fstat(descriptor).st_size - SERIAL_BYTES))
        return file.read(SERIAL_BYTES)
