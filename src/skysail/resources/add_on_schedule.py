"""When automatic snapshots are due: pure functions of the clock and a row of add_ons.

A day (UTC) gets at most one snapshot. One whose hour went by while nobody looked is taken later on the same day, never on
another. Source: Lightsail API reference, AutoSnapshotAddOnRequest, from which the rules for a change of the hour are.
"""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import RowMapping

# This close to a snapshot, on either side of a change, the hour stays for the day.
NOTICE_SECONDS = 1800.0
DAY_SECONDS = 86400


def day_of(now: float) -> str:
    """The day (UTC) of this moment, as 2026-01-31."""
    return datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()


def _begin(day: str) -> float:
    return datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC).timestamp()


def hour_on(row: RowMapping, day: str) -> int:
    """The hour that holds on this day."""
    held: int = row["held_hour"] if row["held_day"] == day else row["hour"]
    return held


def due(row: RowMapping, now: float) -> str | None:
    """The day for which a snapshot is to be taken now; None when there is none to take."""
    day = day_of(now)
    if not row["enabled"] or row["last_day"] >= day or now < _begin(day) + 3600 * hour_on(row, day):
        return None
    return day


def next_hour(row: RowMapping, now: float) -> int:
    """The hour of the next snapshot."""
    today = day_of(now)
    return hour_on(row, today if row["last_day"] < today else day_of(now + DAY_SECONDS))


def enabled(hour: int, row: RowMapping | None, now: float) -> dict[str, Any]:
    """What the row says once its owner has chosen ``hour``; ``row`` is what it said before, if there was one."""
    today = day_of(now)
    begin = _begin(today)
    last = row["last_day"] if row is not None else ""
    late = begin + 3600 * hour < now + NOTICE_SECONDS
    chosen = {"enabled": True, "hour": hour, "held_hour": 0, "held_day": "", "last_day": last}
    if last >= today:
        return chosen
    if row is None or not row["enabled"]:
        # Nothing was promised for today; an hour that is past, or too near, begins tomorrow.
        return chosen | {"last_day": today if late else last}
    former = hour_on(row, today)
    if late or begin + 3600 * former <= now + NOTICE_SECONDS:
        # Today's is still taken when it was to be.
        return chosen | {"held_hour": former, "held_day": today}
    return chosen
