"""The month's transfer, as the operator sees it."""

from __future__ import annotations

import re
import time

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import metering, transfer
from skysail.store.visit import visit


def of_month(config: Config, month: str = "") -> list[transfer.Usage]:
    """Every instance's transfer in ``month`` (as 2026-01; '' is this one). Raises :class:`SkysailError`."""
    month = month or metering.month(time.time())
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", month):
        raise SkysailError(f"{month} is no month", "write it as 2026-01")
    return visit(config, lambda connection: transfer.usage(connection, month), list[transfer.Usage])


def summary(used: transfer.Usage) -> dict[str, str]:
    """For a table: gigabytes and dollars."""
    def gigabytes(size: int) -> str:
        return f"{size / transfer.GB:.2f} GB"
    return {"instance": used.instance, "region": used.region, "in": gigabytes(used.rx_bytes), "out": gigabytes(used.tx_bytes),
            "allowance": gigabytes(used.allowance_bytes), "overage": gigabytes(used.overage_bytes),
            "price": f"{used.overage_usd:.2f} USD"}
