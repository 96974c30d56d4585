"""The logs of this machine's processes: kept to their bound, whoever writes them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from skysail.kit import logs
from skysail.kit.process import in_thread

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0


async def tend(folder: Path) -> None:
    """Rotate each log in ``folder`` that has grown too long; runs until cancelled."""
    while True:
        for path in sorted(folder.glob("*.log")):
            try:
                await in_thread(logs.rotate, path)
            except OSError as failure:
                log.warning("%s could not be rotated: %s", path, failure)
        await asyncio.sleep(LOOK_SECONDS)
