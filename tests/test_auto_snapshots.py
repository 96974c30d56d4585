"""Automatic snapshots: when they are due, that a day gets one whatever happens, and what boto3 sees of them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stores
from clouds import Cloud, eventually, running_cloud
from crashing import Doom, rows, whole
from skysail.contract.report import HostReport, SnapshotReport
from skysail.hosts import desired
from skysail.hosts.watch import write_report
from skysail.kit.errors import ApiError
from skysail.resources import add_on_schedule as schedule
from skysail.resources import auto_snapshots, snapshot_rows
from skysail.resources.request import Request
from skysail.serve.controller import HOST, WORKFLOWS
from skysail.store.schema import add_ons, operations, snapshots
from test_disks import create, disk, ended, snapshot, started
from test_instances import error, state
from test_workflows import Desk

HOUR, DAY = 3600.0, 86400.0
# Midnight (UTC).
MIDNIGHT = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).timestamp()


# --- when they are due

def chosen(hour: int, now: float, before: dict[str, Any] | None = None) -> Any:
    return schedule.enabled(hour, before, now)


@pytest.mark.parametrize(("former", "taken", "at", "new", "today", "tomorrow"), [
    (None, False, 5.0, 6, 6, 6),        # one that comes yet
    (None, False, 5.6, 6, None, 6),     # too near
    (None, False, 7.0, 6, None, 6),     # past
    (6, True, 7.0, 12, None, 12),       # taken today, and put off
    (6, True, 7.0, 3, None, 3),
    (12, False, 7.0, 6, 12, 6),         # an earlier hour: today as it was
    (12, False, 7.0, 10, 10, 10),       # at once
    (12, False, 7.0, 14, 14, 14),
    (12, False, 9.6, 10, 12, 10),       # within half an hour of the new hour
    (12, False, 11.6, 14, 12, 14),      # within half an hour of the former hour
    (6, False, 7.0, 12, 6, 12),         # today's is late: still due
])
def test_an_hour_is_changed_as_on_lightsail(former: int | None, taken: bool, at: float, new: int, today: int | None,
                                            tomorrow: int) -> None:
    now = MIDNIGHT + at * HOUR
    before = None if former is None else {
        "enabled": True, "hour": former, "held_hour": 0, "held_day": "",
        "last_day": schedule.day_of(now if taken else now - DAY)}
    row = chosen(new, now, before)
    assert row["hour"] == new
    assert schedule.next_hour(row, now) == (tomorrow if today is None else today)
    hours = [at for at in range(24) if schedule.due(row, MIDNIGHT + at * HOUR)]
    assert (hours[0] if hours else None) == today
    row["last_day"] = schedule.day_of(now)
    hours = [at for at in range(24) if schedule.due(row, MIDNIGHT + DAY + at * HOUR)]
    assert hours[0] == tomorrow


@given(st.lists(st.lists(st.tuples(st.floats(0, 23.98), st.one_of(st.none(), st.integers(0, 23)))), min_size=1, max_size=5))
def test_whatever_its_owner_changes_a_day_gets_one(days: list[list[tuple[float, int | None]]]) -> None:
    """Somebody looks now and then, and at the end of each day; the hour is changed at other times."""
    row: Any = chosen(6, MIDNIGHT)
    for number, events in enumerate(days):
        taken = []
        for hours, hour in [*sorted(events, key=lambda event: event[0]), (23.99, None)]:
            now = MIDNIGHT + number * DAY + hours * HOUR
            if hour is not None:
                row = chosen(hour, now, row)
            elif (day := schedule.due(row, now)) is not None:
                taken.append(day)
                row["last_day"] = day
        assert taken == [schedule.day_of(MIDNIGHT + number * DAY)]


# --- the rows, with a clock that is moved by hand

class Days(Desk):
    """A controller without its processes, whose host makes each snapshot as it reports."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.workflows = dict(WORKFLOWS)
        self.clock.advance(MIDNIGHT - self.clock.now())

    def look(self) -> int:
        with self.database.transaction() as connection:
            return auto_snapshots.follow(connection, self.clock.now())

    def copied(self, state: Any = "available") -> None:
        """The host reports its snapshots in this state, and those that shall go as gone."""
        with self.database.transaction() as connection:
            document = desired.compile(connection, HOST, self.vault)
            write_report(connection, HOST, HostReport(
                host=HOST, boot="b", sequence=1, generation=document.generation, vcpus=4096, memory_mib=1 << 20, disk_gib=999,
                accelerator="sim", snapshots=tuple(SnapshotReport(
                    id=one.id, state="gone" if one.role == "gone" else state, consistency="frozen", reason="as the test says")
                    for one in document.snapshots)), self.clock.now())
        self.drive()
        with self.database.transaction() as connection:
            snapshot_rows.sweep(connection)

    def kept(self, name: str = "one") -> list[tuple[str, str]]:
        return [(one["date"], one["status"]) for one in self.answer("GetAutoSnapshots", resourceName=name)["autoSnapshots"]]

    def answer(self, action: str, **params: Any) -> Any:
        with self.database.transaction() as connection:
            return self.actions[action](connection, Request(
                account_id=self.account, region="us-east-1", action=action, params=params))

    def enable(self, hour: str | None = None, name: str = "one") -> None:
        self.ask("EnableAddOn", resourceName=name, addOnRequest={
            "addOnType": "AutoSnapshot", **({"autoSnapshotAddOnRequest": {"snapshotTimeOfDay": hour}} if hour else {})})


@pytest.fixture
def days(tmp_path: Path) -> Iterator[Days]:
    made = Days(tmp_path)
    yield made
    made.database.close()


def test_one_a_day_and_seven_are_kept(days: Days) -> None:
    days.running()
    days.enable()
    for number in range(10):
        assert days.look() == 0, "not before its hour"
        days.clock.advance(6 * HOUR)
        assert days.look() == 1 and days.look() == 0
        # Nothing goes before the new one is whole.
        assert len(days.kept()) == min(number + 1, 8) and days.kept()[0] == (f"2026-03-{number + 1:02}", "InProgress")
        days.copied()
        assert len(days.kept()) == min(number + 1, 7)
        days.clock.advance(18 * HOUR)
    assert days.kept() == [(f"2026-03-{day:02}", "Success") for day in range(10, 3, -1)]
    days.copied()
    assert len(days.rows(snapshots)) == 7, "the files of the others are gone"
    assert days.answer("GetInstanceSnapshots")["instanceSnapshots"] == []


def test_a_controller_that_was_away_takes_it_on_the_same_day_or_not_at_all(days: Days) -> None:
    days.running()
    days.enable("20:00")
    days.clock.advance(23 * HOUR)
    assert days.look() == 1 and days.kept()[0][0] == "2026-03-01"
    days.copied()
    days.clock.advance(3 * DAY - 2 * HOUR)  # away for two of them, back at 21:00
    assert days.look() == 1 and [day for day, _ in days.kept()] == ["2026-03-04", "2026-03-01"]


def test_one_that_fails_costs_no_good_one(days: Days) -> None:
    days.running()
    days.enable("00:00")
    for number in range(9):
        days.clock.advance(DAY)
        assert days.look() == 1
        days.copied("failed" if number in (1, 8) else "available")
    seen = dict(days.kept())
    assert list(seen.values()).count("Success") == 7
    assert (seen["2026-03-10"], seen["2026-03-03"]) == ("Failed", "Failed")
    days.clock.advance(DAY)
    days.look()
    days.copied()
    days.clock.advance(DAY)
    days.look()
    days.copied()
    assert "2026-03-03" not in dict(days.kept()), "it goes with its time"
    (failed,) = {one["error_code"] for one in days.rows(operations) if one["status"] == "Failed"}
    assert failed == "SnapshotFailed"


def test_an_instance_that_is_being_changed_is_asked_again(days: Days) -> None:
    days.running()
    days.enable()
    days.clock.advance(7 * HOUR)
    days.ask("RebootInstance", instanceName="one")
    assert days.look() == 0
    days.report(one="running")
    days.drive()
    assert days.look() == 1


def test_what_was_taken_stays_when_disabled_and_goes_with_its_source(days: Days) -> None:
    days.running()
    days.enable()
    days.clock.advance(7 * HOUR)
    days.look()
    days.copied()
    days.ask("DisableAddOn", resourceName="one", addOnType="AutoSnapshot")
    assert days.answer("GetInstance", instanceName="one")["instance"]["addOns"] == [
        {"name": "AutoSnapshot", "status": "Disabled", "snapshotTimeOfDay": "06:00", "nextSnapshotTimeOfDay": None}]
    days.clock.advance(DAY)
    assert days.look() == 0 and len(days.kept()) == 1
    with pytest.raises(ApiError, match="not enabled"):
        days.ask("DisableAddOn", resourceName="one", addOnType="AutoSnapshot")
    days.enable("10:00")
    days.clock.advance(4 * HOUR)
    assert days.look() == 1  # and it is being made when its instance goes
    days.ask("DeleteInstance", instanceName="one")
    assert days.rows(add_ons) == []
    with pytest.raises(ApiError, match="does not exist"):
        days.kept()
    days.report(one="gone")
    days.copied()
    days.copied()
    assert days.rows(snapshots) == []


def test_a_day_whose_snapshot_was_deleted_gets_no_other(days: Days) -> None:
    days.running()
    days.enable()
    days.clock.advance(7 * HOUR)
    days.look()
    days.copied()
    days.ask("DeleteAutoSnapshot", resourceName="one", date="2026-03-01")
    days.enable("12:00")
    days.clock.advance(12 * HOUR)
    assert days.look() == 0 and days.kept() == []
    with pytest.raises(ApiError, match="no automatic snapshot of 2026-03-01"):
        days.ask("DeleteAutoSnapshot", resourceName="one", date="2026-03-01")


# --- from the outside

def due_now(cloud: Cloud, day: str = "") -> None:
    """Every enabled add-on's hour is past, and its last day was before, as if it were another day."""
    stores.change(cloud.config, "UPDATE add_ons SET hour = 0, held_day = '', last_day = :day", day=day)


def auto(client: Any, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get_auto_snapshots(resourceName=name)["autoSnapshots"]
    return found


def taken(cloud: Cloud, *names: str) -> None:
    """Each of these has an automatic snapshot of today, whole."""
    due_now(cloud)
    client = cloud.client()
    for name in names:
        eventually(lambda name=name: auto(client, name) and auto(client, name)[0]["status"] == "Success", what=name)
        assert auto(client, name)[0]["date"] == datetime.datetime.now(datetime.UTC).date().isoformat()


def asked(hour: str) -> dict[str, Any]:
    return {"addOnType": "AutoSnapshot", "autoSnapshotAddOnRequest": {"snapshotTimeOfDay": hour}}


def test_add_ons_of_instances_and_disks(cloud: Cloud) -> None:
    client = started(cloud, "plain")
    client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0", addOns=[asked("03:00")])
    eventually(lambda: state(client, "one") == "running")
    create(client, "data", addOns=[{"addOnType": "AutoSnapshot"}])
    (held,) = client.get_instance(instanceName="one")["instance"]["addOns"]
    assert held == {"name": "AutoSnapshot", "status": "Enabled", "snapshotTimeOfDay": "03:00",
                    "nextSnapshotTimeOfDay": "03:00"}
    assert client.get_instance(instanceName="plain")["instance"]["addOns"] == []
    assert disk(client, "data")["addOns"][0]["snapshotTimeOfDay"] == "06:00"
    (operation,) = client.enable_add_on(resourceName="plain", addOnRequest=asked("23:00"))["operations"]
    assert (operation["operationType"], operation["resourceName"], operation["isTerminal"]) == ("EnableAddOn", "plain", True)

    refused = "InvalidInputException"
    for hour in ("06:30", "23:59"):
        assert "is not valid" in error(client.enable_add_on, refused, resourceName="one", addOnRequest=asked(hour))
    idle = {"addOnType": "StopInstanceOnIdle", "stopInstanceOnIdleRequest": {"threshold": "1", "duration": "5"}}
    assert "StopInstanceOnIdle is not offered" in error(client.enable_add_on, refused, resourceName="one", addOnRequest=idle)
    error(client.create_disk, refused, diskName="other", availabilityZone="us-east-1a", sizeInGb=8, addOns=[idle])
    error(client.disable_add_on, refused, resourceName="one", addOnType="StopInstanceOnIdle")
    error(client.enable_add_on, "NotFoundException", resourceName="none", addOnRequest=asked("06:00"))
    client.create_key_pair(keyPairName="key")
    assert "KeyPair" in error(client.enable_add_on, refused, resourceName="key", addOnRequest=asked("06:00"))
    assert "no automatic snapshot" in error(client.delete_auto_snapshot, "NotFoundException", resourceName="one",
                                            date="2026-01-01")


def test_an_automatic_snapshot_is_restored(cloud: Cloud) -> None:
    client = started(cloud, "one")
    create(client, "data")
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf"))
    create(client, "loose")
    for name in ("one", "loose"):
        client.enable_add_on(resourceName=name, addOnRequest=asked("00:00"))
    taken(cloud, "one", "loose")
    (found,) = auto(client, "one")
    assert found["fromAttachedDisks"] == [{"path": "/dev/xvdf", "sizeInGb": 8}]
    answer = client.get_auto_snapshots(resourceName="loose")
    assert (answer["resourceName"], answer["resourceType"]) == ("loose", "Disk")
    assert client.get_instance_snapshots()["instanceSnapshots"] == client.get_disk_snapshots()["diskSnapshots"] == []

    place = {"availabilityZone": "us-east-1a", "bundleId": "small_3_0"}
    ended(client, client.create_instances_from_snapshot(
        instanceNames=["two"], sourceInstanceName="one", restoreDate=found["date"], addOns=[asked("04:00")], **place))
    assert client.get_instance(instanceName="two")["instance"]["addOns"][0]["snapshotTimeOfDay"] == "04:00"
    assert disk(client, "two-data")["attachedTo"] == "two"
    ended(client, client.create_disk_from_snapshot(
        diskName="copy", availabilityZone="us-east-1a", sizeInGb=16, sourceDiskName="loose",
        useLatestRestorableAutoSnapshot=True, addOns=[asked("05:00")]))
    assert disk(client, "copy")["addOns"][0]["snapshotTimeOfDay"] == "05:00"

    refused, missing = "InvalidInputException", "NotFoundException"
    snapshot(client, "one", "snap")
    for wrong, kind, words in (
            ({"sourceInstanceName": "one"}, refused, "either restoreDate"),
            ({"sourceInstanceName": "one", "restoreDate": found["date"], "useLatestRestorableAutoSnapshot": True}, refused,
             "either restoreDate"),
            ({"sourceInstanceName": "one", "restoreDate": "yesterday"}, refused, "is not valid"),
            ({"sourceInstanceName": "one", "restoreDate": "2001-01-01"}, missing, "2001-01-01"),
            ({"sourceInstanceName": "two", "useLatestRestorableAutoSnapshot": True}, missing, "can be restored"),
            ({"sourceInstanceName": "loose", "useLatestRestorableAutoSnapshot": True}, missing, "does not exist"),
            ({"sourceInstanceName": "one", "instanceSnapshotName": "snap"}, refused, "Name either"),
            ({}, refused, "Name either"),
            ({"instanceSnapshotName": "snap", "restoreDate": found["date"]}, refused, "go with sourceInstanceName")):
        assert words in error(client.create_instances_from_snapshot, kind, instanceNames=["three"], **place, **wrong)

    # One of its disk that is being made keeps the instance, as any other snapshot does; one of its own goes with it.
    client.enable_add_on(resourceName="data", addOnRequest=asked("00:00"))
    taken(cloud, "data")
    stores.change(cloud.config, "UPDATE snapshots SET state = 'pending' WHERE auto_day != ''")
    assert f"auto-{found['date']}" in error(client.delete_instance, refused, instanceName="one")
    client.delete_auto_snapshot(resourceName="data", date=found["date"])

    # They go with their source; what was made of them goes on.
    client.delete_disk(diskName="loose")
    ended(client, client.delete_instance(instanceName="one"))
    error(client.get_auto_snapshots, missing, resourceName="one")
    assert state(client, "two") == "running" and disk(client, "copy")["state"] == "available"


def test_a_controller_that_dies_at_any_commit_takes_one_for_the_day() -> None:
    with running_cloud() as cloud:
        client = started(cloud, "one")
        client.enable_add_on(resourceName="one", addOnRequest=asked("23:00"))
        doom = Doom(cloud, "controller")

        def take() -> None:
            if not rows(cloud, "SELECT id FROM snapshots WHERE auto_day != ''"):
                taken(cloud, "one")

        def forget() -> None:
            cloud.client().delete_auto_snapshot(resourceName="one", date=auto(cloud.client(), "one")[0]["date"])
            whole(cloud)

        while True:
            died = doom.during("take", take)
            found = rows(cloud, "SELECT auto_day, state FROM snapshots WHERE NOT deleted")
            assert [one["state"] for one in found] == ["available"], (died, found)
            if died is None:
                break
            forget()
        assert len(doom.deaths["take"]) >= 4, doom.deaths
