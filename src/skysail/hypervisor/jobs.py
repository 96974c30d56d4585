"""Work that QEMU does in the background. Source: QEMU QMP Reference Manual, query-jobs, job-cancel, job-dismiss."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from skysail.hypervisor.qmp import Monitor, Refused


async def jobs(monitor: Monitor, prefix: str) -> list[dict[str, Any]]:
    """The jobs whose name begins so."""
    return [job for job in await monitor.execute("query-jobs") if job["id"].startswith(prefix)]


async def dismiss(monitor: Monitor, prefix: str) -> None:
    """QEMU has none of these jobs any more: those that run are cancelled."""
    while seen := await jobs(monitor, prefix):
        for job in seen:
            with contextlib.suppress(Refused):  # it ended, or is ending, by itself
                if job["status"] == "concluded":
                    await monitor.execute("job-dismiss", {"id": job["id"]})
                elif job["status"] != "aborting":
                    await monitor.execute("job-cancel", {"id": job["id"]})
        await asyncio.sleep(0.01)
