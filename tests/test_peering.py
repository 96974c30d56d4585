"""PeerVpc, UnpeerVpc, IsVpcPeered: from the request to what a host lets through, over a simulated and a real one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clouds import Cloud, eventually, running_cloud, running_real_cloud
from crashing import Doom, inventory, ready, rows, running_tiny_cloud, whole
from skysail.contract.document import Port
from skysail.kit.config import Config
from skysail.resources import accounts
from skysail.store.database import Database
from skysail.store.vault import Vault
from test_regions import HERE, THERE, TWO, ended, launch, refused

SUBNETS = 'peer_subnets = ["192.0.2.0/24"]\n'


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with running_cloud(SUBNETS + TWO) as made:
        ready(made, "debian_12")
        yield made


def reached_by(cloud: Cloud, *names: str) -> list[list[int]]:
    """The networks whose guests the host lets through to each instance."""
    seen: Any = inventory(cloud)
    guests = {row["instance_name"]: row["id"] for row in rows(cloud, "SELECT id, instance_name FROM guests")}
    return [seen["reached_by"][guests[name]] for name in names]


def routed(cloud: Cloud) -> set[str]:
    """The instances that peer subnets reach."""
    guests = {row["id"]: row["instance_name"] for row in rows(cloud, "SELECT id, instance_name FROM guests")}
    return {guests[one] for one in inventory(cloud)["routed"]}


def settled(client: Any, answer: dict[str, Any]) -> dict[str, Any]:
    ended(client, answer)
    shown: dict[str, Any] = client.get_operation(operationId=answer["operation"]["id"])["operation"]
    return shown


def test_peer_and_unpeer(cloud: Cloud) -> None:
    here, there = cloud.client(region=HERE), cloud.client(region=THERE)
    launch(cloud, HERE, "one")
    launch(cloud, THERE, "two")
    ((first,), (second,)) = reached_by(cloud, "one", "two")
    assert first != second, "an account has a private network in each region"
    assert not here.is_vpc_peered()["isPeered"] and not there.is_vpc_peered()["isPeered"]
    assert "is not peered" in refused(here.unpeer_vpc)
    answer = here.peer_vpc()
    assert answer["operation"]["status"] == "Started" and answer["operation"]["resourceType"] == "PeeredVpc"
    assert here.is_vpc_peered()["isPeered"] and not there.is_vpc_peered()["isPeered"]
    shown = settled(here, answer)
    assert (shown["operationType"], shown["location"]["regionName"]) == ("PeerVpc", HERE)
    assert routed(cloud) == {"one"} and reached_by(cloud, "one", "two") == [[first], [second]]
    assert "peered already" in refused(here.peer_vpc)
    settled(there, there.peer_vpc())
    assert routed(cloud) == {"one", "two"}
    assert reached_by(cloud, "one", "two") == [[first, second], [first, second]]
    launch(cloud, HERE, "late")
    assert reached_by(cloud, "late") == [[first, second]] and routed(cloud) == {"one", "two", "late"}
    settled(here, here.unpeer_vpc())
    assert routed(cloud) == {"two"} and reached_by(cloud, "one", "two") == [[first], [second]]
    # What follows at once waits for what it asked, not for what was before.
    answers = [there.unpeer_vpc(), there.peer_vpc(), there.unpeer_vpc()]
    for answer in answers:
        settled(there, answer)
    assert routed(cloud) == set() and not there.is_vpc_peered()["isPeered"]


def test_accounts_are_never_joined(cloud: Cloud) -> None:
    database = Database.of(cloud.config)
    with database.transaction() as connection:
        other = accounts.create_account(connection, "neighbour", time.time())
        key, secret = accounts.create_access_key(connection, Vault.at(cloud.config.master_key), other, time.time())
    database.close()
    mine, theirs = cloud.client(), cloud.client(key, secret)
    launch(cloud, HERE, "mine")
    theirs.create_instances(instanceNames=["theirs"], availabilityZone=f"{HERE}a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    eventually(lambda: theirs.get_instance_state(instanceName="theirs")["state"]["name"] == "running")
    settled(mine, mine.peer_vpc())
    assert not theirs.is_vpc_peered()["isPeered"]
    settled(theirs, theirs.peer_vpc())
    ((one,), (two,)) = reached_by(cloud, "mine", "theirs")
    assert one != two
    settled(mine, mine.unpeer_vpc())
    settled(theirs, theirs.unpeer_vpc())


def test_a_cloud_with_nothing_to_peer_with_says_so() -> None:
    with running_cloud() as cloud:
        client = cloud.client()
        assert "one region, and no peer_subnets" in refused(client.peer_vpc, "NotFoundException")
        assert client.is_vpc_peered()["isPeered"] is False


@pytest.mark.parametrize("subnets", [["2001:db8::/32"], ["192.0.2.1/24"], ["172.26.4.0/24"], ["100.115.93.0/25"], ["x"]])
def test_subnets_that_cannot_be_are_refused(subnets: list[str]) -> None:
    with pytest.raises(ValueError):
        Config(peer_subnets=tuple(subnets))


def test_what_earlier_versions_wrote_of_a_guest_is_read() -> None:
    record = b'{"id":"g-1","mac":"52:54:00:00:00:0a","tenant":7,"private_ipv4":"172.26.0.10","public_ipv4":"192.0.2.10"}'
    read = msgspec.json.decode(record, type=Port)
    assert read.network == 7 and msgspec.json.decode(msgspec.json.encode(read), type=Port) == read


def test_an_agent_that_was_away_joins_when_it_is_back(cloud: Cloud) -> None:
    client = cloud.client()
    launch(cloud, HERE, "waits")
    cloud.kill("agent")
    answer = client.peer_vpc()
    time.sleep(1.0)
    assert client.get_operation(operationId=answer["operation"]["id"])["operation"]["status"] == "Started"
    cloud.start("agent")
    settled(client, answer)
    assert "waits" in routed(cloud)
    settled(client, client.unpeer_vpc())


def test_the_controller_dies_at_every_commit_of_peering() -> None:
    with running_cloud(SUBNETS + TWO) as cloud:
        ready(cloud, "debian_12")
        launch(cloud, THERE, "two")
        doom, client = Doom(cloud, "controller"), cloud.client(region=THERE)

        def peer() -> None:
            client.peer_vpc()

        def unpeer() -> None:
            client.unpeer_vpc()
        peered = parted = False
        while not (peered and parted):
            peered = doom.during("peer", peer) is None
            assert client.is_vpc_peered()["isPeered"] and routed(cloud) == {"two"}
            parted = doom.during("unpeer", unpeer) is None
            assert not client.is_vpc_peered()["isPeered"] and routed(cloud) == set()
        assert {"before a commit", "after a commit", "before a commit #3", "after a commit #3"} <= set(doom.deaths["peer"])


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="guests need root")
def test_the_agent_dies_at_every_step_of_peering() -> None:
    with running_tiny_cloud(SUBNETS) as cloud:
        client, doom = cloud.client(), Doom(cloud, "agent")
        client.create_instances(instanceNames=["one"], availabilityZone=f"{HERE}a", blueprintId="tiny", bundleId="nano_3_0")
        whole(cloud)

        def peer() -> None:
            client.peer_vpc()

        def unpeer() -> None:
            client.unpeer_vpc()
        peered = parted = False
        while not (peered and parted):
            peered = doom.during("peer", peer) is None
            assert routed(cloud) == {"one"}
            parted = doom.during("unpeer", unpeer) is None
            assert routed(cloud) == set()
        assert not doom.missed(), doom.deaths
        assert {"Ledger.write", "LinuxFabric.apply"} <= set(doom.deaths["peer"]), doom.deaths


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="guests need root")
def test_guests_of_two_regions_meet_when_both_are_peered() -> None:
    with running_real_cloud(more=TWO) as cloud:
        (one,) = cloud.launch("one", region=HERE)
        (two,) = cloud.launch("two", region=THERE)
        # Neither is open to pings by its public address.
        ping = f"ping -c 1 -W 2 {two['privateIpAddress']} > /dev/null; echo $?"

        def answered() -> bool:
            return cloud.ssh("one", ping).strip() == "0"
        assert "two" in cloud.ssh("two", "hostname", region=THERE)
        assert not answered()
        for region in (HERE, THERE):
            assert not answered()
            client = cloud.client(region=region)
            settled(client, client.peer_vpc())
        assert answered()
        back = cloud.ssh("two", f"ping -c 1 -W 2 {one['privateIpAddress']}", region=THERE)
        assert "1 received" in back
        settled(client, client.unpeer_vpc())
        assert not answered()
