"""The transfer allowance, and what Prometheus is told."""

from __future__ import annotations

import calendar
import re
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert

from clouds import eventually, running_cloud
from skysail.resources import transfer
from skysail.serve import prometheus, usage
from skysail.store.schema import transfers
from test_metrics import launch, total
from test_samples import store

GB = 1 << 30
JUNE = calendar.timegm((2026, 6, 1, 0, 0, 0))


@pytest.mark.parametrize(("received", "sent", "beyond"), [
    (100, 200, 0), (1024, 0, 0), (5000, 0, 0), (0, 1025, 1), (1000, 100, 76), (2000, 300, 300)])
def test_only_what_goes_out_beyond_the_allowance_costs(tmp_path: Path, received: int, sent: int, beyond: int) -> None:
    database = store(tmp_path)
    with database.transaction() as connection:
        connection.execute(insert(transfers).values(
            instance_id="i-1", month="2026-06", account_id="1", instance_name="one", bundle_id="nano_3_0", region="us-east-1",
            rx_bytes=received * GB, tx_bytes=sent * GB))
        (used,) = transfer.usage(connection, "2026-06")
        assert not transfer.usage(connection, "2026-07")
    assert (used.allowance_bytes, used.overage_bytes) == (1024 * GB, beyond * GB)
    assert used.overage_usd == pytest.approx(0.09 * beyond, abs=0.01)
    database.close()


@pytest.mark.parametrize(("day", "share"), [(-10.0, 1.0), (0.0, 1.0), (15.0, 0.5), (29.0, 1 / 30)])
def test_a_young_instance_has_its_part_of_the_month(day: float, share: float) -> None:
    assert transfer.allowance_share("2026-06", JUNE + day * 86400) == pytest.approx(share)
    assert transfer.allowance_share("2026-12", None) == 1.0
    assert transfer.price("us-west-2") == 0.09 and transfer.price("ap-southeast-2") == transfer.price("sa-east-1") == 0.17


SERIES = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)+)\})? (\S+)')


def parsed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The text format, read strictly: each series after its HELP and TYPE."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            found[line.split()[2]] = []
        elif not line.startswith("# TYPE "):
            series = SERIES.fullmatch(line)
            assert series is not None, line
            found[series[1]].append((dict(re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', series[2] or "")), float(series[3])))
    return found


def test_an_operator_sees_usage_and_metrics(capfd: pytest.CaptureFixture[str]) -> None:
    with running_cloud("sample_seconds = 0.2\n") as cloud:
        launch(cloud, "one", "#load cpu=0.5 rx=100000 tx=50000")
        eventually(lambda: total(cloud, "NetworkIn") > 100_000)
        url = f"http://127.0.0.1:{cloud.port}/metrics"
        answer = httpx.get(url)
        assert answer.headers["content-type"] == prometheus.CONTENT_TYPE
        seen = parsed(answer.text)
        ((labels, cpu),) = seen["skysail_instance_cpu_seconds_total"]
        assert labels["instance"] == "one" and cpu > 0
        assert seen["skysail_host_seen_timestamp_seconds"][0][1] == pytest.approx(time.time(), abs=120)
        assert seen["skysail_instance_status_check_failed"][0][1] == 0
        later = parsed(httpx.get(url).text)
        assert later["skysail_instance_cpu_seconds_total"][0][1] >= cpu
        assert httpx.get(url, headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 403
        (used,) = usage.of_month(cloud.config)
        assert used.instance == "one" and used.rx_bytes > 100_000 and used.overage_usd == 0
        cloud.client().delete_instance(instanceName="one")
        assert [one.instance for one in usage.of_month(cloud.config)] == ["one"]


def test_a_token_opens_the_metrics_to_others(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with running_cloud(f'metrics_token_file = "{token}"\n') as cloud:
        url = f"http://127.0.0.1:{cloud.port}/metrics"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer guess"}).status_code == 401
        assert "skysail_host_vcpus" in httpx.get(url, headers={"Authorization": "Bearer secret"}).text
        token.write_text("")
        assert httpx.get(url, headers={"Authorization": "Bearer x"}).status_code == 401


def test_labels_are_escaped() -> None:
    assert prometheus._labels({"a": 'x"\\\n'}) == r'{a="x\"\\\n"}'
