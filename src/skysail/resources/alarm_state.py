"""When an alarm alarms: a pure function of the last periods' values.

Source: Lightsail API reference, PutAlarm; CloudWatch user guide, "Configuring how alarms treat missing data".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Literal

State = Literal["OK", "ALARM", "INSUFFICIENT_DATA"]
Missing = Literal["breaching", "notBreaching", "ignore", "missing"]
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "GreaterThanOrEqualToThreshold": operator.ge, "GreaterThanThreshold": operator.gt,
    "LessThanThreshold": operator.lt, "LessThanOrEqualToThreshold": operator.le}


def evaluate(values: Sequence[float | None], *, comparison: str, threshold: float, datapoints_to_alarm: int,
             treat_missing_data: Missing, state: State) -> State:
    """The state after periods with these values (None: a gap), from the present ``state``.

    ALARM when ``datapoints_to_alarm`` of them breach. Where gaps could still make it so, they are taken as
    ``treat_missing_data`` says: ``ignore`` leaves the state as it is, ``missing`` says that it cannot be known.
    """
    breaching = sum(1 for value in values if value is not None and COMPARISONS[comparison](value, threshold))
    gaps = sum(1 for value in values if value is None)
    if treat_missing_data == "breaching":
        breaching += gaps
    if breaching >= datapoints_to_alarm:
        return "ALARM"
    if treat_missing_data in ("breaching", "notBreaching") or breaching + gaps < datapoints_to_alarm:
        return "OK"
    return state if treat_missing_data == "ignore" else "INSUFFICIENT_DATA"
