"""Whole migrations by post-copy between real agents, as in test_migrating_fleet: an instance that never comes to an end
without it, and one whose agents or source die while its memory comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

import ticker
from clouds import eventually
from fleets import printed
from skysail.hypervisor import userfault
from test_migrating_fleet import SLOW, Counting, counted

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
# Agents that hand a guest over before any of its memory has gone; what nobody asks for takes half a minute then.
EARLY = """
from skysail.hypervisor import departure, trail

async def slowly(monitor, ways):
    await monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 25_000})
    await trail.part(monitor, ways)

departure.part = slowly
departure.Departing._gone_through = staticmethod(lambda seen: True)
"""


@pytest.fixture
def counting() -> Iterator[Counting]:
    with counted(busy=True) as made:
        yield made


def test_an_instance_that_writes_faster_than_it_is_sent_goes_by_post_copy(counting: Counting) -> None:
    for _ in range(5):
        source, former = counting.place()
        stayed = counting.over(counting.begin(*SLOW, "--minutes", "0.25"))
        print(json.dumps(stayed))
        counting.rests()
        if stayed["state"] == "failed":
            break
        # Held back, it wrote little in a moment in which QEMU looked.
    assert stayed["state"] == "failed" and stayed["report"]["rounds"] > 2, stayed
    last = counting.counts(source, former)[-1]
    going = counting.begin(*SLOW, "--minutes", "5", "--post-copy")
    done = counting.over(going)
    print(json.dumps(done))
    assert done["state"] == "succeeded" and going.returncode == 0, done
    assert done["report"]["post_copy"] and not done["report"]["cut"] and done["report"]["gap_ms"] > 0
    target, guest = counting.place()
    assert target != source and counting.counts(target, guest)[0] >= last
    counting.rests()
    counting.counts_once()
    said = printed(counting.cloud, "migrations").stdout
    assert "post-copy" in said, said
    assert printed(counting.cloud, "verify").returncode == 0
    assert not userfault.DEVICE.stat().st_mode & 0o077


def test_agents_and_sources_that_die_while_memory_comes(counting: Counting) -> None:
    for one in counting.stations.values():
        one.kill("agent")
        one.start("agent", EARLY)

    def half_there() -> tuple[str, str, subprocess.Popen[str]]:
        source, _ = counting.place()
        going = counting.begin(*SLOW, "--post-copy")
        eventually(lambda: counting.place()[0] != source, 180, "it has gone over")
        assert pull(counting) == "coming"
        return source, counting.place()[1], going

    source, guest, going = half_there()
    for one in counting.stations.values():
        one.kill("agent")
    for one in counting.stations.values():
        one.start("agent", EARLY)
    done = counting.over(going)
    print(json.dumps(done))
    assert done["state"] == "succeeded" and done["report"]["post_copy"] and not done["report"]["cut"], done
    assert going.returncode == 0
    counting.rests()
    counting.counts_once()

    source, guest, going = half_there()
    former = next(path for path in counting.folder(source).glob("guests/*/guest.json"))
    os.kill(json.loads(former.read_bytes())["process"]["pid"], signal.SIGKILL)
    done = counting.over(going)
    print(json.dumps(done))
    assert done["state"] == "succeeded" and done["report"]["cut"] and going.returncode == 1, done
    counting.rests()
    target, guest = counting.place()
    assert target != source
    before = len(counting.counts(target, guest))
    eventually(lambda: len(counting.counts(target, guest)) > before + 5, 120, "it counts, from its disk")
    assert ticker.complaints(counting.serial(target, guest)) == [] and counting.state() == "running"
    assert list(counting.folder(source).glob("guests/*/run/qmp.sock")) == []
    said = printed(counting.cloud, "verify")
    assert said.returncode == 0, said.stdout


def pull(counting: Counting) -> str:
    """How its memory stands, by its host's record."""
    host, guest = counting.place()
    arrival = json.loads((counting.folder(host) / "guests" / guest / "guest.json").read_bytes())["arrival"]
    return str(arrival["pull"]["state"]) if arrival is not None else ""
