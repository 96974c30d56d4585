"""ipAddressType and SetIpAddressType as the customer sees them, against a simulated host."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import httpx
import msgspec
import pytest

from clouds import Cloud, eventually, running_cloud
from crashing import Doom, rows
from skysail.inspect.verify import verify
from skysail.metadata import tree
from test_instances import error, launch, state
from test_metadata import guest

SIX = "nano_ipv6_3_0"


def shown(client: Any, name: str = "one") -> tuple[str, str, str, int]:
    """Type, bundle, public IPv4 address and number of IPv6 addresses."""
    found = client.get_instance(instanceName=name)["instance"]
    return found["ipAddressType"], found["bundleId"], found.get("publicIpAddress", ""), len(found["ipv6Addresses"])


def started(client: Any, *names: str, **more: Any) -> None:
    launch(client, *names, **more)
    for name in names:
        eventually(lambda name=name: state(client, name) == "running")


def change(client: Any, kind: str, name: str = "one", **more: Any) -> None:
    """Change the type, and wait until its operation succeeded."""
    (operation,) = client.set_ip_address_type(resourceType="Instance", resourceName=name, ipAddressType=kind,
                                              **more)["operations"]
    assert (operation["operationType"], operation["resourceName"]) == ("SetIpAddressType", name)
    eventually(lambda: client.get_operation(operationId=operation["id"])["operation"]["status"] == "Succeeded")


def test_an_instance_without_a_public_ipv4_address(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one", bundleId=SIX)
    started(client, "two", bundleId=SIX, ipAddressType="ipv6")
    for name in ("one", "two"):
        assert shown(client, name) == ("ipv6", SIX, "", 1)
        assert ipaddress.ip_address(client.get_instance(instanceName=name)["instance"]["privateIpAddress"]).is_private
    details = client.get_instance_access_details(instanceName="one")["accessDetails"]
    assert "ipAddress" not in details and details["ipv6Addresses"]
    client.stop_instance(instanceName="one")
    eventually(lambda: state(client, "one") == "stopped")
    client.start_instance(instanceName="one")
    eventually(lambda: state(client, "one") == "running")
    assert shown(client) == ("ipv6", SIX, "", 1)
    eventually(lambda: verify(cloud.config, 0.1) == [])
    client.delete_instance(instanceName="one")
    eventually(lambda: len(rows(cloud, "SELECT id FROM guests")) == 1)


def test_plans_without_a_public_ipv4_address_are_in_the_catalogue(cloud: Cloud) -> None:
    offered = {one["bundleId"]: one for one in cloud.client().get_bundles()["bundles"]}
    for size, price in (("nano", 3.5), ("micro", 5.0), ("small", 10.0), ("medium", 20.0), ("large", 40.0), ("xlarge", 80.0),
                        ("2xlarge", 160.0), ("4xlarge", 380.0)):
        alone, both = offered[f"{size}_ipv6_3_0"], offered[f"{size}_3_0"]
        assert (alone["price"], alone["publicIpv4AddressCount"], both["publicIpv4AddressCount"]) == (price, 0, 1)
        for member in ("cpuCount", "ramSizeInGb", "diskSizeInGb", "transferPerMonthInGb", "power"):
            assert alone[member] == both[member]


def test_every_change_of_type(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one")
    _, bundle, address, _ = shown(client)
    assert shown(client) == ("dualstack", "nano_3_0", address, 1)
    six = client.get_instance(instanceName="one")["instance"]["ipv6Addresses"]
    change(client, "ipv6", acceptBundleUpdate=True)
    assert shown(client) == ("ipv6", SIX, "", 1)
    assert client.get_instance(instanceName="one")["instance"]["ipv6Addresses"] == six, "what it keeps stays the same"
    change(client, "ipv4", acceptBundleUpdate=True)
    assert shown(client)[:2] == ("ipv4", bundle) and shown(client)[2] and shown(client)[3] == 0
    change(client, "dualstack")
    assert shown(client)[0] == "dualstack" and shown(client)[3] == 1
    client.stop_instance(instanceName="one")
    eventually(lambda: state(client, "one") == "stopped")
    change(client, "ipv6", acceptBundleUpdate=True)
    client.start_instance(instanceName="one")
    eventually(lambda: state(client, "one") == "running")
    change(client, "dualstack", acceptBundleUpdate=True)
    eventually(lambda: verify(cloud.config, 0.1) == [])


def test_a_snapshot_begins_as_any_type(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one", bundleId=SIX)
    client.create_instance_snapshot(instanceName="one", instanceSnapshotName="snap")
    eventually(lambda: client.get_instance_snapshot(instanceSnapshotName="snap")["instanceSnapshot"]["state"] == "available")
    for name, bundle, more in (("six", SIX, {}), ("both", "nano_3_0", {}), ("four", "nano_3_0", {"ipAddressType": "ipv4"})):
        client.create_instances_from_snapshot(instanceNames=[name], instanceSnapshotName="snap", bundleId=bundle,
                                              availabilityZone="us-east-1a", **more)
    assert [shown(client, name)[0] for name in ("six", "both", "four")] == ["ipv6", "dualstack", "ipv4"]


def test_an_alias_follows_only_what_there_is(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one")
    client.create_domain(domainName="example.com")
    for kind in ("A", "AAAA"):
        client.create_domain_entry(domainName="example.com", domainEntry={
            "name": "www.example.com", "type": kind, "target": "one", "isAlias": True})

    def served() -> list[str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket))) as http:
            (zone,) = http.get("http://agent/inventory").json()["zones"]
        return sorted(one["type"] for one in zone["record_sets"] if one["name"] == "www.example.com.")
    eventually(lambda: served() == ["A", "AAAA"])
    change(client, "ipv6", acceptBundleUpdate=True)
    eventually(lambda: served() == ["AAAA"])
    change(client, "ipv4", acceptBundleUpdate=True)
    eventually(lambda: served() == ["A"])


def test_each_wrong_state_has_its_own_error(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one", "fixed")
    started(client, "old", bundleId="nano_2_0")
    started(client, "six", bundleId=SIX)
    client.allocate_static_ip(staticIpName="static")
    client.attach_static_ip(staticIpName="static", instanceName="fixed")
    client.allocate_static_ip(staticIpName="other")
    client.create_domain(domainName="example.com")

    def refused(words: str, kind: str, name: str = "one", resource: str = "Instance", code: str = "InvalidInputException",
                **more: Any) -> None:
        said = error(lambda: client.set_ip_address_type(resourceType=resource, resourceName=name, ipAddressType=kind, **more),
                     code)
        assert words in said, said
    refused("dualstack already", "dualstack")
    refused("becomes nano_ipv6_3_0", "ipv6")
    refused("becomes nano_3_0", "ipv4", "six", acceptBundleUpdate=False)
    refused("no counterpart", "ipv6", "old", acceptBundleUpdate=True)
    refused("has the static IP static", "ipv6", "fixed", acceptBundleUpdate=True)
    refused("not offered by this cloud yet", "ipv4", "one", "LoadBalancer")
    refused("not offered by this cloud yet", "dualstack", "one", "Distribution")
    refused("A Disk has no IP address type", "ipv4", "one", "Disk")
    refused("does not exist: nobody", "ipv4", "nobody", code="NotFoundException")
    assert "is IPv6-only" in error(lambda: client.attach_static_ip(staticIpName="other", instanceName="six"),
                                   "InvalidInputException")
    for words, bundle, kind in (("has no public IPv4 address", SIX, "dualstack"), ("has no public IPv4 address", SIX, "ipv4"),
                                ("is not IPv6-only", "nano_3_0", "ipv6"), ("is not IPv6-only", "nano_2_0", "ipv6")):
        assert words in error(lambda bundle=bundle, kind=kind: launch(client, "new", bundleId=bundle, ipAddressType=kind),
                              "InvalidInputException")
    cloud.kill("agent")
    client.stop_instance(instanceName="one")
    refused("is stopping", "ipv4")


def test_without_ipv6_there_is_nothing_to_change_to() -> None:
    with running_cloud('public_ipv6 = ""\n') as cloud:
        client = cloud.client()
        started(client, "one")
        for kind in ("ipv6", "dualstack"):
            said = error(lambda kind=kind: client.set_ip_address_type(
                resourceType="Instance", resourceName="one", ipAddressType=kind, acceptBundleUpdate=True),
                         "InvalidInputException")
            assert "no public IPv6 addresses" in said
        assert "no public IPv6" in error(lambda: launch(client, "six", bundleId=SIX), "InvalidInputException")


def test_while_the_host_is_away_the_change_is_under_way(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one")
    cloud.kill("agent")
    one = {"resourceType": "Instance", "resourceName": "one"}
    (first,) = client.set_ip_address_type(**one, ipAddressType="ipv4")["operations"]
    assert first["status"] == "Started" and shown(client)[0] == "ipv4"
    (second,) = client.set_ip_address_type(**one, ipAddressType="dualstack")["operations"]
    cloud.start("agent")
    for operation in (first, second):
        eventually(lambda operation=operation: client.get_operation(
            operationId=operation["id"])["operation"]["status"] == "Succeeded")


def test_a_start_gives_no_ipv4_address_where_there_is_none() -> None:
    """With public addresses that change at each start, as on Lightsail."""
    with running_cloud('public_address = "changes"\n') as cloud:
        client = cloud.client()
        started(client, "one", bundleId=SIX)
        client.stop_instance(instanceName="one")
        eventually(lambda: state(client, "one") == "stopped")
        client.start_instance(instanceName="one")
        assert shown(client) == ("ipv6", SIX, "", 1)


def test_the_controller_dies_at_every_commit_of_a_change(cloud: Cloud) -> None:
    client = cloud.client()
    started(client, "one")
    doom = Doom(cloud, "controller")

    def act() -> None:
        kind = "ipv4" if shown(cloud.client())[0] == "dualstack" else "dualstack"
        cloud.client().set_ip_address_type(resourceType="Instance", resourceName="one", ipAddressType=kind)

    deaths = doom.everywhere("change", act, lambda: None)
    assert {"before a commit", "after a commit", "before a commit #2"} <= set(deaths), deaths
    assert {row["status"] for row in rows(cloud, "SELECT status FROM operations")} == {"Succeeded"}
    (row,) = rows(cloud, "SELECT public_ipv4, public_ipv6, observed_addresses FROM guests")
    observed = row["observed_addresses"]  # SQLite keeps JSON as text
    assert len(json.loads(observed) if isinstance(observed, str) else observed) == len(
        [one for one in (row["public_ipv4"], row["public_ipv6"]) if one])


@pytest.mark.parametrize("kind", ["ipv4", "ipv6", "dualstack"])
def test_metadata_tell_the_addresses_that_there_are(kind: str) -> None:
    port = guest().port
    had = msgspec.structs.replace(port, public_ipv4="" if kind == "ipv6" else port.public_ipv4,
                                  public_ipv6="" if kind == "ipv4" else port.public_ipv6)
    made = tree.record(msgspec.structs.replace(guest(), port=had))
    assert made is not None
    assert ("meta-data/public-ipv4" in made.leaves, "meta-data/ipv6" in made.leaves) == (kind != "ipv6", kind != "ipv4")
