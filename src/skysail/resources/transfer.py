"""The transfer allowance: what an instance moved in a month, what its plan holds, and what is beyond it.

Both directions count against the allowance, and what goes out beyond it costs. Source: Amazon Lightsail user guide, "Data
transfer in Lightsail". An instance that is younger than the month has the part of the allowance that is left of the month.
"""

from __future__ import annotations

import calendar
import time

import msgspec
from sqlalchemy import Connection, RowMapping, select

from skysail.resources import catalog, metering
from skysail.store.schema import instances, transfers

GB = 1 << 30
# USD a GB, as Lightsail lists it per region; one that is not here is given the dearest of them.
OVERAGE_USD = {"us": 0.09, "ca": 0.09, "eu": 0.09, "ap-south-1": 0.13, "ap-southeast-1": 0.12, "ap-southeast-2": 0.17,
               "ap-northeast-1": 0.14, "ap-northeast-2": 0.13}
OTHER_OVERAGE_USD = 0.17


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One instance's month. ``overage_usd`` is the list price of what it sent beyond its allowance."""

    instance: str
    region: str
    month: str
    rx_bytes: int
    tx_bytes: int
    allowance_bytes: int
    overage_bytes: int
    overage_usd: float


def price(region: str) -> float:
    """USD for a GB beyond the allowance."""
    return OVERAGE_USD.get(region, OVERAGE_USD.get(region.partition("-")[0], OTHER_OVERAGE_USD))


def usage(connection: Connection, month: str) -> list[Usage]:
    """Every instance that moved anything in ``month`` (as 2026-01), deleted ones too; by name."""
    rows = connection.execute(
        select(transfers, instances.c.created_at).outerjoin(instances, instances.c.id == transfers.c.instance_id)
        .where(transfers.c.month == month).order_by(transfers.c.instance_name, transfers.c.instance_id)).mappings()
    return [_usage(row, price(row["region"])) for row in rows]


def _usage(row: RowMapping, usd: float) -> Usage:
    bundle = catalog.BUNDLES.get(row["bundle_id"])
    allowance = int(allowance_share(row["month"], row["created_at"]) * bundle["transferPerMonthInGb"] * GB) if bundle else 0
    # What came in uses the allowance up too, but never costs. Without a plan there is no allowance to be beyond of.
    beyond = max(0, min(row["tx_bytes"], row["rx_bytes"] + row["tx_bytes"] - allowance)) if bundle else 0
    return Usage(instance=row["instance_name"], region=row["region"], month=row["month"], rx_bytes=row["rx_bytes"],
                 tx_bytes=row["tx_bytes"], allowance_bytes=allowance, overage_bytes=beyond,
                 overage_usd=round(beyond / GB * usd, 2))


def allowance_share(month: str, created_at: float | None) -> float:
    """The part of the month from the instance's creation on; the whole one for what was there before, or is gone."""
    begin = calendar.timegm(time.strptime(month, "%Y-%m"))
    end = calendar.timegm(time.strptime(metering.month(begin + 32 * metering.DAY_SECONDS), "%Y-%m"))
    if created_at is None or created_at <= begin:
        return 1.0
    return max(0.0, (end - created_at) / (end - begin))
