"""UpdateInstanceMetadataOptions from the outside, over a simulated host."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from clouds import Cloud, eventually
from crashing import Doom, rows
from skysail.inspect.verify import verify

DEFAULTS = {"httpTokens": "optional", "httpEndpoint": "enabled", "httpPutResponseHopLimit": 1, "httpProtocolIpv6": "disabled"}


def launched(cloud: Cloud, *names: str, **more: Any) -> Any:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30)
    client.create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0", **more)
    eventually(lambda: {one["state"]["name"] for one in client.get_instances()["instances"]} == {"running"})
    return client


def options(client: Any, name: str = "one") -> dict[str, Any]:
    found: dict[str, Any] = client.get_instance(instanceName=name)["instance"]["metadataOptions"]
    return found


def applied(client: Any, **wanted: Any) -> bool:
    return options(client) == DEFAULTS | {"state": "applied"} | wanted


def test_options_are_changed_one_by_one(cloud: Cloud) -> None:
    client = launched(cloud, "one", "two")
    eventually(lambda: applied(client))
    operation = client.update_instance_metadata_options(instanceName="one", httpTokens="required")["operation"]
    assert (operation["operationType"], operation["status"], operation["resourceName"]) == (
        "UpdateInstanceMetadataOptions", "Started", "one")
    eventually(lambda: client.get_operation(operationId=operation["id"])["operation"]["status"] == "Succeeded")
    assert applied(client, httpTokens="required")
    client.update_instance_metadata_options(instanceName="one", httpPutResponseHopLimit=64, httpProtocolIpv6="enabled")
    client.update_instance_metadata_options(instanceName="one", httpEndpoint="disabled")
    eventually(lambda: applied(client, httpTokens="required", httpEndpoint="disabled", httpPutResponseHopLimit=64,
                               httpProtocolIpv6="enabled"))
    assert options(client, "two") == DEFAULTS | {"state": "applied"}, "an instance's own"
    eventually(lambda: verify(cloud.config, 0.1) == [])


def test_a_stopped_instance_takes_them_and_a_start_keeps_them(cloud: Cloud) -> None:
    client = launched(cloud, "one")
    client.stop_instance(instanceName="one")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "stopped")
    client.update_instance_metadata_options(instanceName="one", httpTokens="required")
    eventually(lambda: applied(client, httpTokens="required"))
    client.start_instance(instanceName="one")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "running")
    assert applied(client, httpTokens="required")


def test_while_the_host_is_away_they_are_pending(cloud: Cloud) -> None:
    client = launched(cloud, "one")
    eventually(lambda: applied(client))
    cloud.kill("agent")
    operation = client.update_instance_metadata_options(instanceName="one", httpTokens="required")["operation"]
    assert options(client)["state"] == "pending"
    later = client.update_instance_metadata_options(instanceName="one", httpPutResponseHopLimit=3)["operation"]
    eventually(lambda: client.get_operation(operationId=operation["id"])["operation"]["isTerminal"], what="a later one won")
    assert not client.get_operation(operationId=later["id"])["operation"]["isTerminal"]
    cloud.start("agent")
    eventually(lambda: applied(client, httpTokens="required", httpPutResponseHopLimit=3))
    eventually(lambda: client.get_operation(operationId=later["id"])["operation"]["status"] == "Succeeded")


WRONG = {
    "none": ({}, "Name one option"), "hops": ({"httpPutResponseHopLimit": 0}, "1 to 64"),
    "many hops": ({"httpPutResponseHopLimit": 65}, "1 to 64"), "tokens": ({"httpTokens": "never"}, "optional, required"),
    "nobody": ({"instanceName": "nobody", "httpTokens": "required"}, "does not exist: nobody"),
    "IPv6": ({"instanceName": "plain", "httpProtocolIpv6": "enabled"}, "has no IPv6 address"),
    "on its way": ({"instanceName": "leaving", "httpTokens": "required"}, "is stopping"),
}


def test_each_wrong_state_has_its_own_error(cloud: Cloud) -> None:
    client = launched(cloud, "one", "leaving")
    client.create_instances(instanceNames=["plain"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0", ipAddressType="ipv4")
    eventually(lambda: client.get_instance_state(instanceName="plain")["state"]["name"] == "running")
    cloud.kill("agent")
    client.stop_instance(instanceName="leaving")
    for asked, words in WRONG.values():
        with pytest.raises(ClientError, match=words):
            client.update_instance_metadata_options(**{"instanceName": "one"} | asked)
    assert options(client) == DEFAULTS | {"state": "applied"}


@pytest.mark.parametrize("victim", ["controller"])
def test_the_controller_dies_at_every_commit_of_an_update(cloud: Cloud, victim: str) -> None:
    client = launched(cloud, "one")
    doom = Doom(cloud, victim)
    turn = iter(range(1, 1000))

    def act() -> None:
        cloud.client().update_instance_metadata_options(instanceName="one", httpPutResponseHopLimit=1 + next(turn) % 64)

    deaths = doom.everywhere("update", act, lambda: None)
    assert {"before a commit", "after a commit", "before a commit #2"} <= set(deaths), deaths
    assert options(client)["state"] == "applied"
    assert {row["status"] for row in rows(cloud, "SELECT status FROM operations")} == {"Succeeded"}
