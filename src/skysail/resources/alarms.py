"""Alarms: PutAlarm, GetAlarms, TestAlarm, DeleteAlarm, and how they follow what is measured.

Source: Lightsail API reference, PutAlarm. Each period is five minutes; instances are what can be monitored here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import contact_methods, metering, names, outbox, paging, tags
from skysail.resources.alarm_state import evaluate
from skysail.resources.instances import get_row
from skysail.resources.metrics import METRICS, STATISTICS, get_metric
from skysail.resources.request import Request
from skysail.store.schema import alarms, instances

PERIOD_SECONDS = 300
MAX_PERIODS = 288
MAX_ALARMS_PER_METRIC = 2
# A period is looked at once its last samples had the time to arrive.
GRACE_SECONDS = 20.0
STATES = ("OK", "ALARM", "INSUFFICIENT_DATA")


class Alarms:
    """The actions on alarms."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"PutAlarm": self.put, "GetAlarms": self.list_, "TestAlarm": self.test, "DeleteAlarm": self.delete}

    def put(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Make the alarm, or give the one of this name another configuration; then it keeps its state."""
        asked = request.params
        instance = get_row(connection, request, asked["monitoredResourceName"])
        get_metric(asked["metricName"])
        values = _configuration(asked) | {"instance_id": instance["id"], "metric": asked["metricName"]}
        held = connection.execute(_own(request).where(alarms.c.name == asked["alarmName"])).mappings().first()
        twins = connection.execute(select(alarms.c.id).where(
            alarms.c.instance_id == instance["id"], alarms.c.metric == asked["metricName"])).scalars().all()
        if len([twin for twin in twins if held is None or twin != held["id"]]) >= MAX_ALARMS_PER_METRIC:
            raise invalid_input(f"A metric of an instance takes at most {MAX_ALARMS_PER_METRIC} alarms.")
        if held is not None:
            if (held["instance_id"], held["metric"]) != (instance["id"], asked["metricName"]):
                values["state"] = "INSUFFICIENT_DATA"  # what it knew was of something else
            connection.execute(update(alarms).where(alarms.c.id == held["id"]).values(**values))
        else:
            identifier = str(uuid.uuid4())
            names.claim(connection, request, asked["alarmName"], "Alarm", identifier)
            connection.execute(insert(alarms).values(
                id=identifier, account_id=request.account_id, region=request.region, name=asked["alarmName"],
                state="INSUFFICIENT_DATA", created_at=self._clock.now(), **values))
            tags.put(connection, identifier, asked.get("tags") or [])
        row = self._get(connection, request)
        return {"operations": [self._record(connection, request, row)]}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = _own(request)
        if request.params.get("alarmName"):
            query = query.where(alarms.c.id == self._get(connection, request)["id"])
        if request.params.get("monitoredResourceName"):
            query = query.where(
                alarms.c.instance_id == get_row(connection, request, request.params["monitoredResourceName"])["id"])
        rows, token = paging.read(connection, query, request.params.get("pageToken"), alarms.c.name)
        monitored = {row["id"]: row for row in connection.execute(select(instances.c.id, instances.c.name).where(
            instances.c.id.in_([row["instance_id"] for row in rows]))).mappings()}
        tagged = tags.of(connection, [row["id"] for row in rows])
        return {"alarms": [_shape(row, monitored[row["instance_id"]]["name"], tagged.get(row["id"], [])) for row in rows],
                "nextPageToken": token}

    def test(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Send the notice that this state would, without changing the alarm."""
        row = self._get(connection, request)
        _notify(connection, row, request.params["state"], "This is a test: the alarm is in the state "
                f"{row['state']}.", self._clock.now())
        return {"operations": [self._record(connection, request, row)]}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = self._get(connection, request)
        tags.forget(connection, row["id"])
        names.release(connection, row["account_id"], row["region"], row["name"])
        connection.execute(delete(alarms).where(alarms.c.id == row["id"]))
        return {"operations": [self._record(connection, request, row)]}

    def _get(self, connection: Connection, request: Request) -> RowMapping:
        name = request.params["alarmName"]
        row = connection.execute(_own(request).where(alarms.c.name == name)).mappings().first()
        if row is None:
            raise not_found(f"The Alarm does not exist: {name}", "GetAlarms lists the ones that do.")
        return row

    def _record(self, connection: Connection, request: Request, row: RowMapping) -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=row["name"],
                              resource_type="Alarm", resource_id=row["id"])


def follow(connection: Connection, now: float) -> int:
    """Each alarm looks at its last periods that are over; a change of state and the notice of it are one commit. How many
    changed."""
    changed = 0
    end = (now - GRACE_SECONDS) // PERIOD_SECONDS * PERIOD_SECONDS
    for row in connection.execute(select(alarms)).mappings().all():
        begin = end - row["evaluation_periods"] * PERIOD_SECONDS
        points = dict(metering.read(connection, row["instance_id"], row["metric"], PERIOD_SECONDS, begin, end))
        statistic = STATISTICS[METRICS[row["metric"]].statistic]
        values = [statistic(points[at]) if at in points else None for at in range(int(begin), int(end), PERIOD_SECONDS)]
        state = evaluate(values, comparison=row["comparison"], threshold=row["threshold"],
                         datapoints_to_alarm=row["datapoints_to_alarm"], treat_missing_data=row["treat_missing_data"],
                         state=row["state"])
        if state != row["state"]:
            connection.execute(update(alarms).where(alarms.c.id == row["id"]).values(state=state))
            told = ", ".join("no data" if value is None else f"{value:g}" for value in values[-10:])
            _notify(connection, row, state, f"It was in the state {row['state']}. Its last periods: {told}.", now)
            changed += 1
    return changed


def _notify(connection: Connection, row: RowMapping, state: str, remark: str, now: float) -> None:
    if not row["notification_enabled"] or state not in row["notification_triggers"]:
        return
    monitored = connection.execute(select(instances.c.name).where(instances.c.id == row["instance_id"])).scalar_one()
    for protocol in row["contact_protocols"]:
        contact = contact_methods.find_valid(connection, row["account_id"], row["region"], protocol)
        if contact is not None:
            outbox.put(connection, contact, f"{state}: {row['name']} ({row['metric']} of {monitored})",
                       f"The alarm {row['name']} is in the state {state}.\n{remark}\n\nIt alarms when {row['metric']} of the "
                       f"instance {monitored} ({METRICS[row['metric']].statistic} of five minutes, "
                       f"{METRICS[row['metric']].unit}) is {row['comparison']} {row['threshold']:g} in "
                       f"{row['datapoints_to_alarm']} of {row['evaluation_periods']} periods.\n", now)


def _configuration(asked: dict[str, Any]) -> dict[str, Any]:
    """The checked settings; raises InvalidInputException."""
    periods = asked["evaluationPeriods"]
    points = asked.get("datapointsToAlarm", periods)
    if not 1 <= periods <= MAX_PERIODS:
        raise invalid_input(f"evaluationPeriods takes 1 to {MAX_PERIODS}, each of five minutes.")
    if not 1 <= points <= periods:
        raise invalid_input("datapointsToAlarm takes 1 up to evaluationPeriods.")
    triggers = asked.get("notificationTriggers") or ["ALARM"]
    if "ALARM" not in triggers:
        raise invalid_input("notificationTriggers has ALARM among them.")
    protocols = asked.get("contactProtocols") or []
    contact_methods.refuse_sms(protocols)
    return {
        "comparison": asked["comparisonOperator"], "threshold": float(asked["threshold"]), "evaluation_periods": periods,
        "datapoints_to_alarm": points, "treat_missing_data": asked.get("treatMissingData", "missing"),
        "contact_protocols": list(dict.fromkeys(protocols)), "notification_triggers": list(dict.fromkeys(triggers)),
        "notification_enabled": asked.get("notificationEnabled", True)}


def _own(request: Request) -> Any:
    return select(alarms).where(alarms.c.account_id == request.account_id, alarms.c.region == request.region)


def _arn(row: RowMapping, kind: str, identifier: str) -> str:
    return f"arn:aws:lightsail:{row['region']}:{row['account_id']}:{kind}/{identifier}"


def _shape(row: RowMapping, monitored: str, tagged: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": row["name"], "arn": _arn(row, "Alarm", row["id"]), "createdAt": row["created_at"],
        "location": {"availabilityZone": "all", "regionName": row["region"]}, "resourceType": "Alarm",
        "supportCode": f"{row['account_id']}/{row['id']}", "tags": tagged,
        "monitoredResourceInfo": {"arn": _arn(row, "Instance", row["instance_id"]), "name": monitored,
                                  "resourceType": "Instance"},
        "comparisonOperator": row["comparison"], "evaluationPeriods": row["evaluation_periods"], "period": PERIOD_SECONDS,
        "threshold": row["threshold"], "datapointsToAlarm": row["datapoints_to_alarm"],
        "treatMissingData": row["treat_missing_data"], "statistic": METRICS[row["metric"]].statistic,
        "metricName": row["metric"], "state": row["state"], "unit": METRICS[row["metric"]].unit,
        "contactProtocols": row["contact_protocols"], "notificationTriggers": row["notification_triggers"],
        "notificationEnabled": row["notification_enabled"],
    }
