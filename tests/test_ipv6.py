"""IPv6 as the customer sees it, against a simulated host."""

from __future__ import annotations

import ipaddress
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import Cloud, eventually
from skysail.hosts import placement
from skysail.kit.config import Config
from test_instances import error, launch, state

PREFIX = ipaddress.IPv6Network(Config().public_ipv6)


@pytest.fixture
def ipv4_cloud() -> Iterator[Cloud]:
    """A cloud whose operator gave it no IPv6 prefix."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    made = Cloud(folder, 'engines = "sim"\npublic_ipv6 = ""\n')
    try:
        made.start("agent")
        made.start("controller")
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_instances_have_an_ipv6_address_unless_they_are_asked_not_to(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "one", "two")
    launch(client, "both", ipAddressType="dualstack")
    launch(client, "four", ipAddressType="ipv4")
    found = {name: client.get_instance(instanceName=name)["instance"] for name in ("one", "two", "both", "four")}
    assert {name: one["ipAddressType"] for name, one in found.items()} == {
        "one": "dualstack", "two": "dualstack", "both": "dualstack", "four": "ipv4"}
    assert found["four"]["ipv6Addresses"] == []
    written = [address for name in ("one", "two", "both") for address in found[name]["ipv6Addresses"]]
    assert len(set(written)) == 3
    for address in written:
        assert len(address.split(":")) == 8 and "" not in address.split(":"), "all eight groups, as Lightsail writes them"
        assert ipaddress.IPv6Address(address) in PREFIX
    assert "IPv6-only" in error(lambda: launch(client, "six", ipAddressType="ipv6"), "InvalidInputException")


def test_the_way_in_names_the_ipv6_address(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "one")
    launch(client, "four", ipAddressType="ipv4")
    for name in ("one", "four"):
        eventually(lambda name=name: state(client, name) == "running")
        details = client.get_instance_access_details(instanceName=name)["accessDetails"]
        assert details["ipv6Addresses"] == client.get_instance(instanceName=name)["instance"]["ipv6Addresses"]


def test_an_address_is_free_again_when_its_guest_is_gone(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "one")
    eventually(lambda: state(client, "one") == "running")
    address = client.get_instance(instanceName="one")["instance"]["ipv6Addresses"]
    client.delete_instance(instanceName="one")

    def again() -> bool:
        launch(client, "next")
        found = client.get_instance(instanceName="next")["instance"]["ipv6Addresses"]
        client.delete_instance(instanceName="next")
        return bool(found == address)
    eventually(again)


def test_rules_of_either_version_are_kept(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "web")
    client.put_instance_public_ports(instanceName="web", portInfos=[
        {"protocol": "tcp", "fromPort": 443, "toPort": 443, "ipv6Cidrs": ["2001:db8::/32"]},
        {"protocol": "icmpv6", "fromPort": 128, "toPort": 0, "ipv6Cidrs": ["::/0"]}])
    kept = {one["protocol"]: (one["cidrs"], one["ipv6Cidrs"])
            for one in client.get_instance_port_states(instanceName="web")["portStates"]}
    assert kept == {"tcp": ([], ["2001:db8::/32"]), "icmpv6": ([], ["::/0"])}


def test_without_a_prefix_everything_is_ipv4(ipv4_cloud: Cloud) -> None:
    client = ipv4_cloud.client()
    launch(client, "one")
    launch(client, "both", ipAddressType="dualstack")
    for name in ("one", "both"):
        eventually(lambda name=name: state(client, name) == "running")
        found = client.get_instance(instanceName=name)["instance"]
        assert (found["ipAddressType"], found["ipv6Addresses"]) == ("ipv4", [])


def test_addresses_are_chosen_from_the_lowest_on() -> None:
    assert placement.choose_address("fd53::/64", [], skip=9) == "fd53::a"
    assert placement.choose_address("fd53::/64", ["fd53::a", "fd53::c"], skip=9) == "fd53::b"
    assert placement.choose_address("192.0.2.0/28", ["192.0.2.10"], skip=9) == "192.0.2.11"
    with pytest.raises(placement.NoHost):
        placement.choose_address("192.0.2.0/28", [f"192.0.2.{number}" for number in range(15)], skip=9)
    with pytest.raises(placement.NoHost):
        placement.choose_address("fd53::/126", ["fd53::2"], skip=1)
