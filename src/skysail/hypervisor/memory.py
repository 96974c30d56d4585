"""The memory of a guest that goes to another host: QEMU's own migration, as its source sees it.

Source: QEMU QMP Reference Manual, migrate, migrate-set-parameters, migrate_cancel, query-migrate, yank; docs/devel/migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

from skysail.contract.migration import STREAMS, Terms
from skysail.hypervisor import process
from skysail.hypervisor.capabilities import capabilities
from skysail.hypervisor.qmp import Monitor, Refused

UNBOUNDED = 1 << 40
# The most that auto-converge may hold a guest back. QEMU's own bound, 99, would leave its owner nothing of it.
SLOWED_PERCENT = 80
PUT_AWAY_SECONDS = 5.0
# QEMU's words for a migration that is over, one way or the other.
OVER = ("", "none", "cancelled", "failed")
# What its words begin with for one whose memory goes after its guest.
AFTER = "postcopy"


async def send(monitor: Monitor, outlet: Path, terms: Terms, tls: dict[str, str]) -> None:
    """Begin to send it to a Unix socket, by the certificates in ``tls``; undone by :func:`cancel`. QEMU waits with its last
    step, the guest standing still, for ``migrate-continue``."""
    # QEMU says that an attempt has failed a moment before it has put it away, and takes no other one until then.
    end = time.monotonic() + PUT_AWAY_SECONDS
    while time.monotonic() < end and await _yankable(monitor):
        await asyncio.sleep(0.01)
    await monitor.execute("migrate-set-capabilities", capabilities(terms.post_copy))
    await monitor.execute("migrate-set-parameters", {
        **tls, "multifd-channels": STREAMS, "max-bandwidth": terms.bytes_per_second or UNBOUNDED,
        "max-postcopy-bandwidth": terms.bytes_per_second, "downtime-limit": terms.pause_ms,
        "max-cpu-throttle": SLOWED_PERCENT})
    await monitor.execute("migrate", {"uri": f"unix:{outlet}"})


async def cancel(monitor: Monitor) -> str:
    """QEMU's word on a migration that has been called off: it may have been through already, or go after its guest."""
    with contextlib.suppress(Refused):
        await monitor.execute("migrate_cancel")
    while (word := await status(monitor)) not in (*OVER, "completed") and not word.startswith(AFTER):
        await asyncio.sleep(0.01)
        with contextlib.suppress(Refused):
            await monitor.execute("yank", {"instances": await _yankable(monitor)})
    return word


async def _yankable(monitor: Monitor) -> list[dict[str, Any]]:
    """QEMU's migrations that it has not put away, in QMP's words."""
    return [one for one in await monitor.execute("query-yank") if one["type"] == "migration"]


async def status(monitor: Monitor) -> str:
    """QEMU's word on its migration; empty when there was none. A clone, or a guest that came, also has a word on the state
    that it was loaded from, and runs on."""
    word = str((await monitor.execute("query-migrate")).get("status", ""))
    if word == "completed" and await process.status(monitor) not in ("postmigrate", "finish-migrate"):
        return ""
    return word
