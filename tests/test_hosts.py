"""Hosts as the operator sees them: what a host tells of itself, and which versions of the contract go together."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from clouds import Cloud, eventually
from skysail import contract
from skysail.contract.facts import HostFacts
from skysail.hypervisor import accelerator, offer, qemu
from skysail.kit.config import Config
from skysail.serve import endpoint, membership
from skysail.serve.facts import Facts, processor
from skysail.serve.membership import Membership


def operator(cloud: Cloud, *words: str) -> Any:
    """What ``skysail WORDS --json`` says of this cloud."""
    done = printed(cloud, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def printed(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    """``skysail WORDS`` on this cloud, for people."""
    return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True,
                          env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)}, check=False)


def speaking(version: int) -> str:
    """What makes a program one of another version of the contract, before it loads anything that says which it is."""
    return f"import skysail.contract as contract\ncontract.VERSION = {version}\ncontract.common.__defaults__ = ({version},)"


def held_version(cloud: Cloud) -> int:
    """The version of the document that the agent holds to."""
    version: int = json.loads((cloud.folder / "agent" / "document.json").read_text())["version"]
    return version


def test_a_host_tells_what_it_is(cloud: Cloud) -> None:
    (seen,) = eventually(lambda: [one for one in operator(cloud, "host", "list") if one["memory_mib"]], 60, "a report")
    assert seen["id"] == "host-1" and seen["state"] == "ready" and seen["zones"] == ["us-east-1a", "us-east-1b"]
    assert seen["images"] == ["debian_12"] and seen["guests"] == 0
    facts = seen["facts"]
    assert facts["kernel"] == platform.release() and facts["contract"] == contract.VERSION and facts["host"] == "host-1"
    assert facts["accelerator"] == "sim" and facts["cpu_flags"]
    assert operator(cloud, "host", "show", "host-1")["facts"] == facts
    text = printed(cloud, "host", "show", "host-1").stdout
    assert "fpu" in text.split() and facts["kernel"] in text
    absent = printed(cloud, "host", "show", "host-9")
    assert absent.returncode == 1 and "there is no host host-9" in absent.stderr


def test_a_host_that_falls_silent_is_away_until_it_answers(cloud: Cloud) -> None:
    eventually(lambda: operator(cloud, "host", "list")[0]["state"] == "ready", 60)
    def metric() -> bool:
        return 'skysail_host_up{host="host-1"} 1\n' in httpx.get(f"{endpoint.url(cloud.config)}/metrics").text

    assert metric()
    cloud.kill("agent")
    gone = eventually(lambda: [one for one in operator(cloud, "host", "list") if one["state"] == "away"], 60)
    assert gone[0]["since"] is not None and not metric()
    cloud.start("agent")
    eventually(lambda: operator(cloud, "host", "list")[0]["state"] == "ready", 60)


@pytest.mark.parametrize("apart", [-1, 1])
def test_controller_and_agent_may_be_one_version_apart(cloud: Cloud, apart: int) -> None:
    cloud.kill("agent")
    cloud.start("agent", speaking(contract.VERSION + apart))
    eventually(lambda: operator(cloud, "host", "list")[0]["facts"]["contract"] == contract.VERSION + apart, 60)
    assert operator(cloud, "host", "list")[0]["state"] == "ready"
    client = cloud.client()
    client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "running", 60, "it runs")
    assert held_version(cloud) == min(contract.VERSION, contract.VERSION + apart), "they speak the older version of the two"


@pytest.mark.parametrize(("apart", "cure"), [(-2, "upgrade the host first"), (2, "upgrade the controller first")])
def test_versions_further_apart_refuse_each_other_in_words(cloud: Cloud, apart: int, cure: str) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30, "a blueprint")
    cloud.kill("agent")
    client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    cloud.start("agent", speaking(contract.VERSION + apart))
    refused = eventually(lambda: [one for one in operator(cloud, "host", "list") if one["state"] == "refused"], 60)[0]
    assert f"its agent speaks version {contract.VERSION + apart}" in refused["reason"] and cure in refused["reason"]
    assert cure in cloud.log("controller")
    assert client.get_instance_state(instanceName="one")["state"]["name"] == "pending", "nothing is sent to it"
    cloud.kill("agent")
    cloud.start("agent")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "running", 60, "it runs")
    assert operator(cloud, "host", "list")[0]["state"] == "ready"


def test_the_common_version_is_the_older_one() -> None:
    assert [contract.common(theirs, 5) for theirs in (3, 4, 5, 6, 7)] == [None, 4, 5, 5, None]


@pytest.mark.real
def test_qemu_says_what_it_offers(cloud: Cloud) -> None:
    found = offer.ask("tcg")
    assert qemu.MACHINE in found.machine_types and "none" not in found.machine_types
    assert qemu.cpu_model("tcg") in found.cpu_models and "Westmere" in found.cpu_models
    assert not {"max", "host"} & set(found.cpu_models), "a model that is another one on each machine"
    # AMX is emulated by no QEMU: a guest could have the model by name, and not run.
    assert "SapphireRapids" not in found.cpu_models
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    assert found.qemu.partition(" ")[0] in said


@pytest.mark.real
def test_the_facts_of_this_machine_are_those_that_its_guests_get(cloud: Cloud) -> None:
    told = Facts(cloud.config.__class__(data=cloud.config.data, engines="real"), "host-1").tell()
    assert isinstance(told, HostFacts)
    assert told.accelerator == accelerator.probe(cloud.config.accelerator_file).accelerator
    assert told.guest_cpu in told.cpu_models and told.guest_machine in told.machine_types


def test_the_first_processor_speaks_for_all() -> None:
    said = ("processor\t: 0\nmodel name\t: Example 9\nflags\t\t: sse fpu\npower management:\n\n"
            "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n")
    assert processor(said) == ("Example 9", ("fpu", "sse"))
    assert processor("processor: 0\n") == ("", ())


@pytest.mark.parametrize(("settings", "joined_at", "underlay"), [
    ({}, "", ""), ({"join_listen": "192.0.2.1"}, "", "192.0.2.1"), ({"join_listen": "::"}, "", ""),
    ({}, "192.0.2.7", "192.0.2.7"), ({}, "2001:db8::7", "2001:db8::7"), ({}, "host-7.example.com", ""),
    ({"underlay_address": "198.51.100.7"}, "192.0.2.7", "198.51.100.7")])
def test_where_other_hosts_reach_this_one(tmp_path: Path, settings: dict[str, Any], joined_at: str, underlay: str) -> None:
    config = Config(data=str(tmp_path), **settings)
    if joined_at:
        membership.keep(config, Membership(host="host-7", address=joined_at, port=1))
    assert membership.underlay(config) == underlay
