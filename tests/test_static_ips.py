"""Static IPs from the outside, on a simulated host: allocated, moved, released, and each wrong state refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
from botocore.exceptions import ClientError

import stores
from clouds import Cloud, eventually, running_cloud
from skysail.inspect.verify import verify
from skysail.store.schema import guests, leaving_addresses
from test_instances import error, launch, state
from test_workflows import Desk


def address(client, name: str) -> tuple[str, bool]:
    found = client.get_instance(instanceName=name)["instance"]
    return found["publicIpAddress"], found["isStaticIp"]


def test_a_static_ip_moves_between_instances(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "one", "two")
    eventually(lambda: state(client, "two") == "running")
    first = client.allocate_static_ip(staticIpName="front")["operations"]
    assert [(found["operationType"], found["status"]) for found in first] == [("AllocateStaticIp", "Succeeded")]
    front = client.get_static_ip(staticIpName="front")["staticIp"]
    assert front["isAttached"] is False and front["location"] == {"availabilityZone": "all", "regionName": "us-east-1"}
    before = address(client, "one")

    attached = client.attach_static_ip(staticIpName="front", instanceName="one")["operations"]
    assert {found["resourceType"] for found in attached} == {"StaticIp", "Instance"}
    assert address(client, "one") == (front["ipAddress"], True)
    assert client.get_static_ip(staticIpName="front")["staticIp"]["attachedTo"] == "one"
    client.detach_static_ip(staticIpName="front")
    client.attach_static_ip(staticIpName="front", instanceName="two")
    assert address(client, "two") == (front["ipAddress"], True)
    assert address(client, "one")[1] is False and address(client, "one")[0] != front["ipAddress"]
    assert before[0] != front["ipAddress"]
    eventually(lambda: verify(cloud.config, 0.1) == [])

    # It outlives its instance, and a stop.
    client.stop_instance(instanceName="two")
    eventually(lambda: state(client, "two") == "stopped")
    assert address(client, "two") == (front["ipAddress"], True)
    client.delete_instance(instanceName="two")
    left = client.get_static_ip(staticIpName="front")["staticIp"]
    assert left["isAttached"] is False and "attachedTo" not in left
    client.attach_static_ip(staticIpName="front", instanceName="one")
    client.detach_static_ip(staticIpName="front")
    client.release_static_ip(staticIpName="front")
    assert client.get_static_ips()["staticIps"] == []
    client.allocate_static_ip(staticIpName="front")
    eventually(lambda: verify(cloud.config, 0.1) == [])


def test_each_wrong_state_has_its_own_error(cloud: Cloud) -> None:
    client = cloud.client()
    launch(client, "one", "two")
    for name in ("front", "back"):
        client.allocate_static_ip(staticIpName=name)
    client.attach_static_ip(staticIpName="front", instanceName="one")
    assert "attached to one" in error(client.attach_static_ip, "InvalidInputException", staticIpName="front",
                                      instanceName="two")
    assert "has the static IP front already" in error(client.attach_static_ip, "InvalidInputException",
                                                      staticIpName="back", instanceName="one")
    assert "attached to one" in error(client.release_static_ip, "InvalidInputException", staticIpName="front")
    assert "is not attached" in error(client.detach_static_ip, "InvalidInputException", staticIpName="back")
    assert "already in use" in error(client.allocate_static_ip, "InvalidInputException", staticIpName="one")
    for call in (client.get_static_ip, client.detach_static_ip, client.release_static_ip):
        error(call, "NotFoundException", staticIpName="nobody")
    error(client.attach_static_ip, "NotFoundException", staticIpName="back", instanceName="nobody")
    for number in range(3):
        client.allocate_static_ip(staticIpName=f"more-{number}")
    assert "at most 5" in error(client.allocate_static_ip, "InvalidInputException", staticIpName="more-4")
    assert len(client.get_static_ips()["staticIps"]) == 5
    client.detach_static_ip(staticIpName="front")
    client.release_static_ip(staticIpName="front")


def test_a_full_pool_holds_a_static_ip_only_until_its_deleted_instance_is_gone() -> None:
    with running_cloud('public_pool = "100.115.120.0/28"\n') as cloud:
        client = cloud.client()
        launch(client, "one", "two", "three", "four")
        eventually(lambda: state(client, "four") == "running")
        client.allocate_static_ip(staticIpName="front")
        client.attach_static_ip(staticIpName="front", instanceName="one")  # which frees one address ...
        eventually(lambda: not stores.rows(cloud.config, "SELECT 1 FROM leaving_addresses"), 60, "its host leads it nowhere")
        launch(client, "five")  # ... and that is the last
        assert "no address left" in error(client.detach_static_ip, "InvalidInputException", staticIpName="front")
        client.delete_instance(instanceName="one")

        def attached() -> bool:
            try:
                client.attach_static_ip(staticIpName="front", instanceName="two")
            except ClientError as refused:
                assert "still being let go" in str(refused)
                return False
            return True
        eventually(attached)
        eventually(lambda: verify(cloud.config, 0.1) == [])


def test_an_address_is_given_to_nobody_before_its_host_let_go_of_it(tmp_path: Path) -> None:
    """The host may be away, and its guest be reached by the address all the while."""
    desk = Desk(tmp_path)

    def address(name: str) -> str:
        return next(str(row["public_ipv4"]) for row in desk.rows(guests) if row["instance_name"] == name)

    desk.running()
    former, guest = address("one"), desk.rows(guests)[0]["id"]
    desk.ask("AllocateStaticIp", staticIpName="fixed")
    desk.ask("AttachStaticIp", staticIpName="fixed", instanceName="one")
    desk.create("two")
    desk.seen[guest] = msgspec.structs.replace(desk.seen[guest], public_addresses=(former,))
    desk.report()
    desk.create("three")
    assert former not in {address(name) for name in ("one", "two", "three")}
    desk.seen[guest] = msgspec.structs.replace(desk.seen[guest], public_addresses=(address("one"),))
    desk.report()
    assert not desk.rows(leaving_addresses)
    desk.create("four")
    assert address("four") == former, "the lowest that is free"
    desk.database.close()
