"""Instances from the outside: boto3 against a real controller and a real agent, whose engines are simulated."""

from __future__ import annotations

import asyncssh
import pytest
from botocore.exceptions import ClientError

from clouds import Cloud, eventually, running_cloud


def launch(client, *names: str, **more):
    eventually(lambda: client.get_blueprints()["blueprints"], 20, "a blueprint is ready")
    asked = {"availabilityZone": "us-east-1a", "blueprintId": "debian_12", "bundleId": "nano_3_0"} | more
    return client.create_instances(instanceNames=list(names), **asked)["operations"]


def state(client, name: str) -> str:
    return client.get_instance_state(instanceName=name)["state"]["name"]


def error(call, code: str, **params) -> str:
    with pytest.raises(ClientError) as caught:
        call(**params)
    assert caught.value.response["Error"]["Code"] == code, caught.value.response
    return caught.value.response["Error"]["Message"]


def test_a_whole_life(cloud: Cloud) -> None:
    client = cloud.client()
    operations = launch(client, "one", "two", tags=[{"key": "stage", "value": "test"}])
    assert [operation["status"] for operation in operations] == ["Started", "Started"]
    for name in ("one", "two"):
        eventually(lambda name=name: state(client, name) == "running", what=f"{name} runs")
    for operation in operations:
        settled = client.get_operation(operationId=operation["id"])["operation"]
        assert (settled["status"], settled["isTerminal"]) == ("Succeeded", True)
    one, two = sorted(client.get_instances()["instances"], key=lambda found: found["name"])
    assert one["publicIpAddress"] != two["publicIpAddress"] and one["privateIpAddress"] != two["privateIpAddress"]
    assert one["tags"] == [{"key": "stage", "value": "test"}]
    assert client.get_instance(instanceName="one")["instance"] == one

    assert client.stop_instance(instanceName="one")["operations"][0]["status"] == "Started"
    eventually(lambda: state(client, "one") == "stopped")
    client.start_instance(instanceName="one")
    eventually(lambda: state(client, "one") == "running")
    assert client.reboot_instance(instanceName="one")["operations"][0]["status"] == "Succeeded"
    eventually(lambda: state(client, "one") == "running")

    assert client.delete_instance(instanceName="one")["operations"][0]["isTerminal"]
    error(client.get_instance, "NotFoundException", instanceName="one")
    launch(client, "one")
    eventually(lambda: state(client, "one") == "running")


def test_wrong_requests_get_lightsails_errors(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "taken")
    assert "already in use" in error(lambda: launch(client, "taken"), "InvalidInputException")
    good = {"instanceNames": ["x1"], "availabilityZone": "us-east-1a", "blueprintId": "debian_12",
            "bundleId": "nano_3_0"}
    for wrong in ({"availabilityZone": "us-east-1z"}, {"blueprintId": "windows_95"}, {"bundleId": "tiny_0_0"},
                  {"userData": "x" * 17_000}):
        error(client.create_instances, "InvalidInputException", **{**good, **wrong})
    error(client.create_instances, "NotFoundException", **{**good, "keyPairName": "nobody"})
    error(client.start_instance, "NotFoundException", instanceName="nobody")
    eventually(lambda: state(client, "taken") == "running")
    assert "only a stopped one" in error(client.start_instance, "InvalidInputException", instanceName="taken")
    assert [found["name"] for found in client.get_instances()["instances"]] == ["taken"]
    assert "CreateBucket" in error(client.create_bucket, "InvalidInputException", bucketName="files",
                                   bundleId="small_1_0")


def test_firewall(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "web")

    def opened() -> set[tuple[str, int, int]]:
        states = client.get_instance_port_states(instanceName="web")["portStates"]
        return {(found["protocol"], found["fromPort"], found["toPort"]) for found in states}

    assert opened() == {("tcp", 22, 22), ("tcp", 80, 80)}
    client.open_instance_public_ports(instanceName="web", portInfo={"protocol": "udp", "fromPort": 53, "toPort": 60})
    client.close_instance_public_ports(instanceName="web", portInfo={"protocol": "tcp", "fromPort": 80, "toPort": 80})
    assert opened() == {("tcp", 22, 22), ("udp", 53, 60)}
    client.put_instance_public_ports(
        instanceName="web", portInfos=[{"protocol": "tcp", "fromPort": 443, "toPort": 443, "cidrs": ["192.0.2.0/24"]}])
    assert opened() == {("tcp", 443, 443)}
    for wrong in ({"protocol": "tcp", "fromPort": 9, "toPort": 8}, {"protocol": "tcp", "fromPort": 1, "toPort": 70000},
                  {"protocol": "tcp", "fromPort": 1, "toPort": 2, "cidrs": ["300.1.1.1/8"]}):
        error(client.open_instance_public_ports, "InvalidInputException", instanceName="web", portInfo=wrong)


def test_access_details_are_a_certificate_of_the_regions_authority(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "door")
    eventually(lambda: state(client, "door") == "running")
    details = client.get_instance_access_details(instanceName="door", protocol="ssh")["accessDetails"]
    certificate = asyncssh.import_certificate(details["certKey"])
    key = asyncssh.import_private_key(details["privateKey"])
    assert certificate.key.public_data == key.public_data
    assert certificate.principals == [details["username"]]
    assert details["hostKeys"][0]["algorithm"] == "ssh-ed25519"


@pytest.mark.parametrize("victim", ["controller", "agent"])
def test_kill_9_loses_no_operation(cloud: Cloud, victim: str) -> None:
    client = cloud.client()
    operations = launch(client, *(f"host-{number}" for number in range(10)))
    cloud.kill(victim)
    cloud.start(victim)
    for operation in operations:
        eventually(lambda operation=operation: client.get_operation(operationId=operation["id"])["operation"]["status"]
                   == "Succeeded", what="the operation ends")
    assert {found["state"]["name"] for found in client.get_instances()["instances"]} == {"running"}


@pytest.mark.parametrize("habit", ["kept", "changes"])
def test_a_public_address_is_kept_unless_the_operator_wants_lightsails_habit(habit: str) -> None:
    with running_cloud(f'public_address = "{habit}"\n') as cloud:
        client = cloud.client()
        launch(client, "home")
        eventually(lambda: state(client, "home") == "running")
        before = client.get_instance(instanceName="home")["instance"]["publicIpAddress"]
        client.stop_instance(instanceName="home")
        eventually(lambda: state(client, "home") == "stopped")
        client.start_instance(instanceName="home")
        eventually(lambda: state(client, "home") == "running")
        after = client.get_instance(instanceName="home")["instance"]["publicIpAddress"]
        assert (after == before) is (habit == "kept")


def test_a_pool_without_addresses_is_said_so() -> None:
    with running_cloud('public_pool = "100.115.120.0/28"\n') as cloud:
        client = cloud.client()
        launch(client, *(f"host-{number}" for number in range(5)))
        assert "no address left" in error(lambda: launch(client, "one-more"), "InvalidInputException")
        assert len(client.get_instances()["instances"]) == 5
