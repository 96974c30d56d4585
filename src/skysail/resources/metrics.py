"""GetInstanceMetricData: what was measured, as Lightsail's datapoints.

Source: Lightsail API reference, GetInstanceMetricData. A time without samples has no datapoint: a gap is a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input
from skysail.resources import metering
from skysail.resources.instances import get_row
from skysail.resources.metering import Stats
from skysail.resources.request import Request

# What one answer holds at most (CloudWatch API reference, GetMetricStatistics).
MAX_DATAPOINTS = 1440
STATISTICS: dict[str, Callable[[Stats], float]] = {
    "Minimum": lambda stats: stats.minimum, "Maximum": lambda stats: stats.maximum, "Sum": lambda stats: stats.sum,
    "Average": lambda stats: stats.sum / stats.count, "SampleCount": lambda stats: float(stats.count)}
_MEMBERS = {"Minimum": "minimum", "Maximum": "maximum", "Sum": "sum", "Average": "average", "SampleCount": "sampleCount"}


class Metric(msgspec.Struct, frozen=True):
    """Its published unit, how fine it is (seconds), and the statistic that an alarm compares."""

    unit: str
    seconds: int = 300
    statistic: str = "Average"


METRICS = {
    "CPUUtilization": Metric("Percent"), "NetworkIn": Metric("Bytes", statistic="Sum"),
    "NetworkOut": Metric("Bytes", statistic="Sum"), "StatusCheckFailed": Metric("Count", 60, "Sum"),
    "StatusCheckFailed_Instance": Metric("Count", 60, "Sum"), "StatusCheckFailed_System": Metric("Count", 60, "Sum"),
    "BurstCapacityTime": Metric("Seconds"), "BurstCapacityPercentage": Metric("Percent"),
    "MetadataNoToken": Metric("Count", statistic="Sum"),
}


def get_metric(name: str) -> Metric:
    """The metric ``name`` of instances; raises InvalidInputException for one that is not measured here."""
    if name not in METRICS:
        raise invalid_input(f"The metric {name} is not measured for instances of this cloud.",
                            "Measured are: " + ", ".join(METRICS))
    return METRICS[name]


def in_periods(points: Iterable[tuple[int, Stats]], period: int) -> dict[int, Stats]:
    """The values of each period by its beginning, oldest first; a period without any is missing."""
    found: dict[int, Stats] = {}
    for at, stats in points:
        begin = at // period * period
        if begin in found:
            found[begin].add(stats)
        else:
            found[begin] = stats
    return found


class Metrics:
    """GetInstanceMetricData."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetInstanceMetricData": self.data}

    def data(self, connection: Connection, request: Request) -> dict[str, Any]:
        """One datapoint for each period that has values. Times are rounded down to the period; the last one is excluded."""
        asked = request.params
        instance = get_row(connection, request, asked["instanceName"])
        metric = get_metric(asked["metricName"])
        period, start, end = asked["period"], _seconds(asked["startTime"]), _seconds(asked["endTime"])
        if period % 60:
            raise invalid_input("period takes a multiple of 60.")
        if asked["unit"] != metric.unit:
            raise invalid_input(f"The unit of {asked['metricName']} is {metric.unit}.")
        if not asked["statistics"]:
            raise invalid_input("statistics takes one or more of " + ", ".join(STATISTICS))
        if start >= end:
            raise invalid_input("startTime has to be before endTime.")
        if (end - start) / max(period, metric.seconds) > MAX_DATAPOINTS:
            raise invalid_input(f"An answer holds at most {MAX_DATAPOINTS} datapoints.",
                                "Ask for a longer period, or for less time.")
        # Minutes are kept for days, five minutes for months.
        recent = start >= self._clock.now() - metering.KEPT_SECONDS[60]
        resolution = 60 if metric.seconds == 60 and recent else 300
        points = metering.read(connection, instance["id"], asked["metricName"], resolution, start // period * period, end)
        return {"metricName": asked["metricName"], "metricData": [
            {"timestamp": at, "unit": metric.unit}
            | {_MEMBERS[statistic]: STATISTICS[statistic](stats) for statistic in asked["statistics"]}
            for at, stats in in_periods(points, period).items()]}


def _seconds(told: Any) -> float:
    """A timestamp as JSON 1.1 has it, seconds since the epoch; the model lets ISO 8601 pass too."""
    try:
        moment = float(told) if isinstance(told, (int, float)) else _parsed(str(told)).timestamp()
    except (ValueError, OverflowError):
        moment = float("inf")
    if not 0 <= moment < 2**33:
        raise invalid_input("startTime and endTime take a moment after 1970 in seconds since the epoch.")
    return moment


def _parsed(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
