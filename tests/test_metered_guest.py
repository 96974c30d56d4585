"""A real guest under load: what it burns and moves is what GetInstanceMetricData says, also over kill -9 of all else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

import stores
from clouds import RealCloud, eventually, running_real_cloud
from skysail.hypervisor import confinement
from skysail.inspect.verify import verify
from skysail.network import links
from skysail.network.plan import Layout, tap_name
from test_metrics import data, total

MIB = 1 << 20


@pytest.fixture
def metered() -> Iterator[RealCloud]:
    """A cloud of one guest that is measured twice a second, and held to its baseline when its credits are spent."""
    with running_real_cloud(more="sample_seconds = 0.5\ncpu_burst = true\n") as cloud:
        cloud.launch("one")
        yield cloud


def counters(cloud: RealCloud) -> tuple[int, int]:
    """Bytes in and out as the controller's meter has them."""
    found = stores.rows(cloud.config, "SELECT rx_bytes, tx_bytes FROM meters")
    return (found[0]["rx_bytes"], found[0]["tx_bytes"]) if found else (0, 0)


def kernel(cloud: RealCloud) -> tuple[int, int]:
    """Bytes in and out as the guest's tap counts them, and it alone since the guest was made."""
    folder, _ = cloud.guest("one")
    layout = Layout.of(cloud.config)
    link = next(link for link in links.inside(layout.namespace, links.every) if link.name == tap_name(folder.name))
    return link.tx_bytes, link.rx_bytes


@pytest.mark.real
def test_load_is_measured_and_survives_kill_9(metered: RealCloud) -> None:
    cloud = metered
    folder, record = cloud.guest("one")
    eventually(lambda: total(cloud, "StatusCheckFailed", "SampleCount") > 3, 60)

    # Processors.
    def burnt() -> float:
        return float(stores.rows(cloud.config, "SELECT cpu_seconds FROM meters")[0]["cpu_seconds"])

    before = burnt()
    cloud.ssh("one", "timeout 8 sh -c 'while :; do :; done' || true")
    eventually(lambda: burnt() > before + 2, 60, "its processors are seen to work")
    process = record["process"]["pid"]
    eventually(lambda: abs(burnt() - (confinement.used_seconds(folder.name, process) or 0)) < 1.5, 60,
               "the meter is the kernel's own counter")
    assert max(point["maximum"] for point in data(cloud, "CPUUtilization", ("Maximum",))) > 20

    # The network, while controller and agent are killed between sampling and storing.
    out = total(cloud, "NetworkOut")
    payload = "head -c 4194304 /dev/zero | base64 -w0 >/dev/null; "
    for victim in ("agent", "controller", "agent"):
        cloud.kill(victim)
        time.sleep(0.7)
        cloud.start(victim)
        cloud.ssh("one", payload + "head -c 1048576 /dev/zero | base64 -w0")
    eventually(lambda: total(cloud, "NetworkOut") > out + 3 * 1.3 * MIB, 60, "what it sent is seen")
    # Quiet now: what was taken in is exactly what the tap counted, neither more nor less.
    eventually(lambda: counters(cloud) == kernel(cloud), 60, "the meter and the tap agree")
    cloud.kill("agent")
    cloud.kill("controller")
    cloud.start("agent")
    cloud.start("controller")
    eventually(lambda: counters(cloud) == kernel(cloud), 60, "they still do")

    assert total(cloud, "StatusCheckFailed_System") == 0
    assert 0 < data(cloud, "BurstCapacityPercentage", ("Average",))[-1]["average"] <= 100

    # A guest whose debt is on its account is held to its baseline by its cgroup.
    cloud.kill("agent")
    log = cloud.config.root / "agent" / "samples.jsonl"
    *_, last = log.read_bytes().splitlines()
    line = json.loads(last)
    line["sample"]["sequence"] += 1
    line["sample"]["guests"] = []
    line["marks"][folder.name]["balance_seconds"] = -1000.0
    with log.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
    cloud.start("agent")
    quota = confinement._folders(folder.name)[0]

    def bound() -> int:
        for name in ("cpu.max", "cpu.cfs_quota_us"):
            if (quota / name).exists():
                return int((quota / name).read_text().split()[0])
        return 0
    # Five percent of each of two processors.
    eventually(lambda: bound() == confinement.PERIOD_MICROSECONDS // 10, 60, "it is throttled")
    eventually(lambda: data(cloud, "BurstCapacityTime", ("Minimum",))[-1]["minimum"] == 0, 60, "and that is seen")
    assert eventually(lambda: verify(cloud.config, 0.5) == [], 60)
