"""GetInstanceMetricData from the outside: what a simulated guest burns and moves is what boto3 is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from clouds import Cloud, eventually, running_cloud
from skysail.inspect.verify import verify
from skysail.serve import endpoint

UNITS = {"CPUUtilization": "Percent", "NetworkIn": "Bytes", "NetworkOut": "Bytes", "StatusCheckFailed": "Count",
         "StatusCheckFailed_Instance": "Count", "StatusCheckFailed_System": "Count", "BurstCapacityTime": "Seconds",
         "BurstCapacityPercentage": "Percent", "MetadataNoToken": "Count"}


def data(cloud: Cloud, metric: str, statistics: tuple[str, ...] = ("Average",), name: str = "one",
         **more: Any) -> list[dict[str, Any]]:
    asked = {"period": 300, "startTime": time.time() - 3600, "endTime": time.time() + 60, "unit": UNITS.get(metric, "Count")}
    found: list[dict[str, Any]] = cloud.client().get_instance_metric_data(
        instanceName=name, metricName=metric, statistics=list(statistics), **asked | more)["metricData"]
    return found


def total(cloud: Cloud, metric: str, statistic: str = "Sum") -> float:
    return sum(point[statistic[0].lower() + statistic[1:]] for point in data(cloud, metric, (statistic,)))


def launch(cloud: Cloud, name: str, load: str) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30)
    client.create_instances(instanceNames=[name], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0", userData=load)
    eventually(lambda: client.get_instance_state(instanceName=name)["state"]["name"] == "running")


@pytest.fixture(scope="module")
def busy() -> Iterator[Cloud]:
    """A cloud whose instance ``one`` burns half a processor of its two and moves bytes, sampled five times a second."""
    with running_cloud("sample_seconds = 0.2\n") as cloud:
        launch(cloud, "one", "#load cpu=0.5 rx=10000 tx=2000")
        eventually(lambda: total(cloud, "NetworkIn", "SampleCount") > 5)
        yield cloud


def test_a_load_is_seen(busy: Cloud) -> None:
    for point in data(busy, "CPUUtilization", ("Minimum", "Maximum", "Average", "SampleCount")):
        assert point["average"] == pytest.approx(25, abs=15) and point["unit"] == "Percent"
        assert point["minimum"] <= point["average"] <= point["maximum"] <= 100 and "sum" not in point
    first = total(busy, "NetworkIn"), total(busy, "NetworkOut")
    assert first[0] == pytest.approx(5 * first[1], rel=0.5)
    eventually(lambda: total(busy, "NetworkIn") > first[0] and total(busy, "NetworkOut") > first[1])
    for metric in ("StatusCheckFailed", "StatusCheckFailed_Instance", "StatusCheckFailed_System"):
        points = data(busy, metric, ("Sum",), period=60)
        assert points and {point["sum"] for point in points} == {0}
        assert all(point["timestamp"].timestamp() % 60 == 0 for point in points)
    # It burns more than its baseline of a tenth of a processor: its capacity, launch credits of 25 %, shrinks.
    (burst,) = {point["maximum"] for point in data(busy, "BurstCapacityPercentage", ("Maximum",))[-1:]}
    assert 0 < burst < 42
    assert {point["sum"] for point in data(busy, "MetadataNoToken", ("Sum",))} == {0}


def test_times_are_held(busy: Cloud) -> None:
    now = time.time()
    assert data(busy, "CPUUtilization", startTime=now - 7200, endTime=now - 3600) == []
    assert data(busy, "CPUUtilization", startTime=now - 400 * 86400, endTime=now + 60, period=86400)
    for point in data(busy, "CPUUtilization", startTime=now - 600, endTime=now + 1, period=60):
        assert point["timestamp"].timestamp() % 300 == 0


@pytest.mark.parametrize("wrong", [
    {"period": 90}, {"period": 30}, {"unit": "Bytes"}, {"startTime": 2e9, "endTime": 1e9}, {"statistics": []},
    {"startTime": 0.0, "period": 60}, {"metricName": "DiskReadOps", "unit": "Count"}, {"startTime": 1e10, "endTime": 2e10}])
def test_what_cannot_be_asked_is_said(busy: Cloud, wrong: dict[str, Any]) -> None:
    asked = {"instanceName": "one", "metricName": "CPUUtilization", "period": 300, "startTime": time.time() - 600,
             "endTime": time.time(), "unit": "Percent", "statistics": ["Average"]} | wrong
    with pytest.raises(ClientError) as refused:
        _unchecked(busy).get_instance_metric_data(**asked)
    assert refused.value.response["Error"]["Code"] == "InvalidInputException"


def _unchecked(cloud: Cloud) -> Any:
    """A client that sends what botocore would refuse itself."""
    key, secret = cloud.credentials()
    return boto3.client("lightsail", region_name="us-east-1", endpoint_url=endpoint.url(cloud.config),
                        aws_access_key_id=key, aws_secret_access_key=secret,
                        config=Config(parameter_validation=False, retries={"total_max_attempts": 1}))


def test_an_unknown_instance_is_not_found(busy: Cloud) -> None:
    with pytest.raises(ClientError) as refused:
        data(busy, "CPUUtilization", name="nobody")
    assert refused.value.response["Error"]["Code"] == "NotFoundException"


def test_a_stopped_instance_has_a_gap_and_a_deleted_one_nothing(cloud: Cloud) -> None:
    cloud.stop()
    (cloud.folder / "skysail.toml").open("a").write("sample_seconds = 0.2\n")
    cloud.start("agent")
    cloud.start("controller")
    client = cloud.client()
    launch(cloud, "one", "#load cpu=1 rx=1000")
    eventually(lambda: total(cloud, "CPUUtilization", "SampleCount") > 3)
    client.stop_instance(instanceName="one")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "stopped")

    def settled() -> float | None:
        before = total(cloud, "CPUUtilization", "SampleCount"), total(cloud, "StatusCheckFailed", "SampleCount")
        time.sleep(1.0)
        return before[0] if before == (total(cloud, "CPUUtilization", "SampleCount"),
                                       total(cloud, "StatusCheckFailed", "SampleCount")) else None
    assert eventually(settled)
    # Agent and controller may die: what was taken in stays, and goes on where it stood.
    bytes_before = total(cloud, "NetworkIn")
    for name in ("agent", "controller"):
        cloud.kill(name)
        cloud.start(name)
    assert total(cloud, "NetworkIn") == bytes_before
    client.start_instance(instanceName="one")
    eventually(lambda: total(cloud, "NetworkIn") > bytes_before)
    assert eventually(lambda: verify(cloud.config, 0.1) == [])
    client.delete_instance(instanceName="one")
    launch(cloud, "one", "#load")
    eventually(lambda: total(cloud, "StatusCheckFailed", "SampleCount") > 2)
    assert total(cloud, "NetworkIn") == 0
