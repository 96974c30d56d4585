"""Instances that go to other hosts, as their operator has them: real controller, real agents over simulated guests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

import stores
from clouds import Cloud, eventually, running_cloud
from fleets import Machine, machine, printed, row, told
from skysail.serve import endpoint
from skysail.store.schema import disks, guests, moves


@pytest.fixture
def pair() -> Iterator[tuple[Cloud, Machine]]:
    """A cloud of two hosts."""
    with running_cloud() as cloud, machine(cloud, zones=("a", "b")) as other:
        eventually(lambda: row(cloud, "host-1").facts and row(cloud, "host-2").facts and row(cloud, "host-2").memory_mib, 60,
                   "both hosts report")
        yield cloud, other


def launch(cloud: Cloud, *names: str) -> None:
    client = cloud.client()
    client.create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    for name in names:
        eventually(lambda name=name: state(cloud, name) == "running", 60, f"{name} runs")


def state(cloud: Cloud, name: str) -> str:
    return str(cloud.client().get_instance_state(instanceName=name)["state"]["name"])


def where(cloud: Cloud) -> dict[str, str]:
    with stores.transaction(cloud.config) as connection:
        return {one.instance_name: one.host_id for one in connection.execute(select(guests))}


def is_clean(cloud: Cloud) -> bool:
    with stores.transaction(cloud.config) as connection:
        return connection.execute(select(moves.c.id)).first() is None


def running(host: Cloud) -> list[str]:
    """The guests that run on a host, as its own agent says."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(host.config.agent_socket))) as http:
        return [str(one) for one in http.get("http://agent/inventory").json()["running"]]


def test_an_instance_goes_to_the_other_host_and_back(pair: tuple[Cloud, Machine]) -> None:
    cloud, other = pair
    launch(cloud, "one")
    before = cloud.client().get_instance(instanceName="one")["instance"]
    first, = where(cloud).values()
    second = {"host-1": "host-2", "host-2": "host-1"}[first]
    done = told(cloud, "migrate", "one")
    assert (done["state"], done["source"], done["target"], done["percent"]) == ("succeeded", first, second, 100), done
    assert done["why"] == "there is no other one" and done["report"]["seconds"] > 0
    eventually(lambda: is_clean(cloud), 60, "nothing of it is left")
    assert cloud.client().get_instance(instanceName="one")["instance"] == before, "its owner sees nothing of it"
    eventually(lambda: len(running(cloud)) + len(running(other)) == 1, 30)
    verified = printed(cloud, "verify")
    assert verified.returncode == 0, verified.stdout
    back = printed(cloud, "migrate", "one", "--to", first)
    assert back.returncode == 0 and f"one: {second} to {first} in " in back.stdout, back.stdout + back.stderr
    assert [one["target"] for one in told(cloud, "migrations")] == [first, second]
    page = httpx.get(f"{endpoint.url(cloud.config)}/metrics").text
    assert 'skysail_migrations_total{outcome="succeeded"} 2' in page
    nowhere = printed(cloud, "migrate", "one", "--to", first)
    assert nowhere.returncode == 1 and f"is on {first} already" in nowhere.stderr
    operations = cloud.client().get_operations()["operations"]
    assert {one["operationType"] for one in operations} == {"CreateInstance"}


def test_a_host_is_emptied(pair: tuple[Cloud, Machine]) -> None:
    cloud, _ = pair
    launch(cloud, "one", "two", "three", "four")
    cloud.client().stop_instance(instanceName="four")
    eventually(lambda: state(cloud, "four") == "stopped", 60)
    off = where(cloud)["four"]
    cloud.client().create_disk(diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
    with stores.transaction(cloud.config) as connection:
        connection.execute(update(disks).values(host_id=off))
    here = sorted(name for name, host in where(cloud).items() if host == off)
    done = subprocess.run([sys.executable, "-m", "skysail.cli.main", "host", "drain", off, "--json"], capture_output=True,
                          text=True, env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)}, check=False)
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and answer["left"] == ["disk data"], done.stdout + done.stderr
    assert sorted(one["instance"] for one in answer["migrations"]) == here
    assert {(one["state"], one["off"]) for one in answer["migrations"] if one["instance"] == "four"} == {("succeeded", True)}
    assert {one["state"] for one in answer["migrations"]} == {"succeeded"}
    assert set(where(cloud).values()) == {"host-1", "host-2"} - {off}
    assert told(cloud, "host", "show", off)["cordoned"]
    cloud.client().start_instance(instanceName="four")
    eventually(lambda: state(cloud, "four") == "running", 60, "it starts where it is")
    cloud.client().delete_disk(diskName="data")
    eventually(lambda: printed(cloud, "host", "drain", off).returncode == 0, 60, "nothing is left")
    assert {state(cloud, name) for name in ("one", "two", "three", "four")} == {"running"}


def test_a_controller_that_is_killed_has_its_successor_go_on(pair: tuple[Cloud, Machine]) -> None:
    """At a moment that nobody chose, again and again."""
    cloud, other = pair
    launch(cloud, "one", "two")
    chance = random.Random(7)
    for _ in range(4):
        begun = [subprocess.Popen([sys.executable, "-m", "skysail.cli.main", "migrate", name, "--json"], text=True,
                                  stdout=subprocess.PIPE, env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)})
                 for name in ("one", "two")]
        time.sleep(chance.uniform(0.3, 2.5))
        cloud.kill("controller")
        time.sleep(chance.uniform(0, 0.5))
        cloud.start("controller")
        for one in begun:
            done: dict[str, Any] = json.loads(one.communicate(timeout=120)[0])
            assert done["state"] == "succeeded", done
        eventually(lambda: is_clean(cloud), 60, "nothing of it is left")
        assert sorted(running(cloud) + running(other)) == sorted(ids(cloud))


def ids(cloud: Cloud) -> list[str]:
    with stores.transaction(cloud.config) as connection:
        return list(connection.execute(select(guests.c.id)).scalars())
