"""Several regions on one cloud: each with its own names, key pairs and lists, by the region that a client signs for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from botocore.exceptions import ClientError

from clouds import Cloud, eventually, running_cloud
from skysail.api.protocol import service_model
from skysail.kit.config import REGIONS, Config, load
from skysail.kit.errors import SkysailError
from skysail.serve import controller

HERE, THERE = "us-east-1", "eu-west-2"
TWO = f'[regions]\n"{HERE}" = ["a", "b"]\n"{THERE}" = ["a"]\n'


def refused(call: Any, code: str = "InvalidInputException", **params: Any) -> str:
    """The words of the API's refusal."""
    with pytest.raises(ClientError) as caught:
        call(**params)
    assert caught.value.response["Error"]["Code"] == code
    return str(caught.value.response["Error"]["Message"])


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with running_cloud(TWO) as made:
        eventually(lambda: made.client().get_blueprints()["blueprints"], 20)
        yield made


def run(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m WORDS`` over the cloud's folder."""
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "SKYSAIL_DATA": str(cloud.folder), "COLUMNS": "200"})


def launch(cloud: Cloud, region: str, *names: str, zone: str = "a") -> dict[str, dict[str, Any]]:
    """The new instances by name, once they run."""
    client = cloud.client(region=region)
    client.create_instances(instanceNames=list(names), availabilityZone=region + zone, blueprintId="debian_12",
                            bundleId="nano_3_0")

    def run() -> dict[str, dict[str, Any]] | None:
        found = {one["name"]: one for one in client.get_instances()["instances"]}
        return found if all(name in found and found[name]["state"]["name"] == "running" for name in names) else None
    made: dict[str, dict[str, Any]] = eventually(run, 30, "they run")
    return made


def ended(client: Any, answer: dict[str, Any]) -> None:
    for operation in answer.get("operations") or [answer["operation"]]:
        identifier = operation["id"]
        eventually(lambda wanted=identifier: client.get_operation(operationId=wanted)["operation"]["status"] == "Succeeded")


def test_the_names_are_those_that_clients_accept() -> None:
    assert set(REGIONS) == set(service_model().shape_for("RegionName").enum)


@pytest.mark.parametrize(("given", "words"), [
    ({"regions": {"mars-north-1": ["a"]}}, "there is no region 'mars-north-1'"),
    ({"default_region": "home"}, "there is no region 'home'"),
    ({"regions": {HERE: []}}, "zones of us-east-1"), ({"regions": {HERE: ["a", "a"]}}, "zones of us-east-1"),
    ({"zones": ["1"]}, "zones of us-east-1"), ({"regions": {THERE: ["a"]}, "default_region": HERE}, "not among the regions"),
    ({"regions": {HERE: ["a"]}, "zones": ["b"]}, "leave zones out")])
def test_a_configuration_that_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(given, Config)


def test_old_and_new_settings_say_the_same() -> None:
    assert Config().regions == {HERE: ("a",)} and Config().default_region == HERE
    assert Config(default_region=THERE, zones=("a", "b")).regions == {THERE: ("a", "b")}
    both = msgspec.convert({"regions": {THERE: ["b"], HERE: ["a", "c"]}}, Config)
    assert (both.default_region, both.zones) == (THERE, ("b",)), "the first is the default"
    assert msgspec.structs.replace(both, port=1).regions == both.regions


def test_regions_and_their_zones_are_listed_in_each(cloud: Cloud) -> None:
    for region in (HERE, THERE):
        found = cloud.client(region=region).get_regions(includeAvailabilityZones=True)["regions"]
        assert {one["name"]: [zone["zoneName"] for zone in one["availabilityZones"]] for one in found} == {
            HERE: [f"{HERE}a", f"{HERE}b"], THERE: [f"{THERE}a"]}
        assert len({one["displayName"] for one in found}) == 2


def test_a_region_that_is_not_served_is_refused_by_name(cloud: Cloud) -> None:
    told = refused(cloud.client(region="ap-south-1").get_instances)
    assert "serves the regions us-east-1, eu-west-2" in told and "ap-south-1" in told


def test_names_are_the_regions_own(cloud: Cloud) -> None:
    here, there = cloud.client(region=HERE), cloud.client(region=THERE)
    one, other = launch(cloud, HERE, "web")["web"], launch(cloud, THERE, "web")["web"]
    assert one["location"] == {"availabilityZone": f"{HERE}a", "regionName": HERE}
    assert other["location"] == {"availabilityZone": f"{THERE}a", "regionName": THERE}
    assert one["privateIpAddress"] != other["privateIpAddress"] and one["publicIpAddress"] != other["publicIpAddress"]
    assert f":{THERE}:" in other["arn"]
    assert "already in use" in refused(there.create_disk, diskName="web", availabilityZone=f"{THERE}a", sizeInGb=8)
    keys = [client.download_default_key_pair()["publicKeyBase64"] for client in (here, there)]
    assert keys[0] != keys[1], "each region has a default key pair of its own"
    there.tag_resource(resourceName="web", tags=[{"key": "stage", "value": "there"}])
    there.stop_instance(instanceName="web")
    eventually(lambda: there.get_instance_state(instanceName="web")["state"]["name"] == "stopped")
    left = here.get_instance(instanceName="web")["instance"]
    assert left["state"]["name"] == "running" and left["tags"] == []
    ended(there, there.delete_instance(instanceName="web"))
    refused(there.get_instance, "NotFoundException", instanceName="web")
    assert here.get_instance(instanceName="web")["instance"]["arn"] == one["arn"]
    types = [operation["operationType"] for operation in there.get_operations()["operations"]]
    assert "DeleteInstance" in types and "DeleteInstance" not in [
        operation["operationType"] for operation in here.get_operations()["operations"]]
    elsewhere = here.get_operations()["operations"][0]["id"]
    refused(there.get_operation, "NotFoundException", operationId=elsewhere)
    ended(here, here.delete_instance(instanceName="web"))


def test_every_noun_lives_in_its_region(cloud: Cloud) -> None:
    here, there = cloud.client(region=HERE), cloud.client(region=THERE)
    launch(cloud, THERE, "only")
    there.create_key_pair(keyPairName="laptop")
    there.allocate_static_ip(staticIpName="fixed")
    there.attach_static_ip(staticIpName="fixed", instanceName="only")
    ended(there, there.create_disk(diskName="data", availabilityZone=f"{THERE}a", sizeInGb=8))
    ended(there, there.attach_disk(diskName="data", instanceName="only", diskPath="/dev/xvdf"))
    ended(there, there.create_instance_snapshot(instanceName="only", instanceSnapshotName="snap"))
    ended(there, there.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    there.put_alarm(alarmName="bell", metricName="CPUUtilization", monitoredResourceName="only", threshold=1,
                    comparisonOperator="GreaterThanThreshold", evaluationPeriods=1)
    assert set(there.get_active_names()["activeNames"]) == {
        "only", "laptop", "fixed", "data", "snap", "copy", "bell", "LightsailDefaultKeyPair"}
    assert set(here.get_active_names()["activeNames"]) <= {"LightsailDefaultKeyPair"}
    lists = {"get_instances": "instances", "get_static_ips": "staticIps", "get_disks": "disks", "get_alarms": "alarms",
             "get_instance_snapshots": "instanceSnapshots", "get_disk_snapshots": "diskSnapshots"}
    for call, member in lists.items():
        (found,) = getattr(there, call)()[member]
        assert found["location"]["regionName"] == THERE and getattr(here, call)()[member] == [], call
    refused(here.get_disk, "NotFoundException", diskName="data")
    refused(here.get_instance_access_details, "NotFoundException", instanceName="only")
    assert there.get_instance_access_details(instanceName="only")["accessDetails"]["username"] == "admin"
    refused(here.create_instances_from_snapshot, "NotFoundException", instanceNames=["twin"], bundleId="nano_3_0",
            availabilityZone=f"{HERE}a", instanceSnapshotName="snap")
    ended(there, there.create_instances_from_snapshot(instanceNames=["twin"], bundleId="nano_3_0",
                                                      availabilityZone=f"{THERE}a", instanceSnapshotName="snap"))
    ended(there, there.delete_instance(instanceName="twin"))


def test_zones_are_those_of_the_callers_region(cloud: Cloud) -> None:
    here, there = cloud.client(region=HERE), cloud.client(region=THERE)
    told = refused(here.create_disk, diskName="lost", availabilityZone=f"{THERE}a", sizeInGb=8)
    assert f"{THERE}a is in the region {THERE}; this request is for {HERE}" in told
    told = refused(there.create_instances, instanceNames=["lost"], availabilityZone=f"{THERE}b", blueprintId="debian_12",
                   bundleId="nano_3_0")
    assert f"{THERE}b does not exist" in told
    launch(cloud, HERE, "mover")
    ended(here, here.create_disk(diskName="far", availabilityZone=f"{HERE}b", sizeInGb=8))
    assert "not in the same zone" in refused(here.attach_disk, diskName="far", instanceName="mover", diskPath="/dev/xvdf")
    launch(cloud, HERE, "near", zone="b")
    ended(here, here.attach_disk(diskName="far", instanceName="near", diskPath="/dev/xvdf"))


def test_domains_are_asked_for_at_home_and_follow_what_is_anywhere(cloud: Cloud) -> None:
    here, there = cloud.client(region=HERE), cloud.client(region=THERE)
    assert f"only available in the {HERE} Region" in refused(there.create_domain, domainName="example.com")
    here.create_domain(domainName="example.com")
    refused(there.tag_resource, "NotFoundException", resourceName="example.com", tags=[{"key": "stage"}])
    here.tag_resource(resourceName="example.com", tags=[{"key": "stage"}])
    one, other = (launch(cloud, region, "pages")["pages"]["publicIpAddress"] for region in (HERE, THERE))

    def alias(name: str, target: str) -> None:
        here.create_domain_entry(domainName="example.com", domainEntry={
            "name": f"{name}.example.com", "type": "A", "target": target, "isAlias": True})
    alias("home", "pages")
    alias("away", other)
    document = msgspec.json.decode((cloud.folder / "agent" / "document.json").read_bytes())

    def served() -> dict[str, Any]:
        document = msgspec.json.decode((cloud.folder / "agent" / "document.json").read_bytes())
        return {one["name"]: one["records"] for one in document["zones"][0]["record_sets"] if one["type"] == "A"}
    assert document["zones"]
    eventually(lambda: served() == {"home.example.com.": [one], "away.example.com.": [other]}, what=str(served()))


def test_a_region_comes_to_a_living_cloud_and_does_not_go_while_it_is_used() -> None:
    with running_cloud() as cloud:
        eventually(lambda: cloud.client().get_blueprints()["blueprints"], 20)
        launch(cloud, HERE, "old")
        refused(cloud.client(region=THERE).get_instances)

        def restart(settings: str) -> None:
            cloud.kill("controller")
            (cloud.folder / "skysail.toml").write_text(f'port = {cloud.port}\n{cloud.store}engines = "sim"\n{settings}')
            cloud.config = load(str(cloud.folder))
            cloud.start("controller")
        restart(TWO)
        launch(cloud, THERE, "new")
        assert [one["name"] for one in cloud.client().get_instances()["instances"]] == ["old"]
        without = load(str(cloud.folder))
        for settings, words in ((f'[regions]\n"{HERE}" = ["a", "b"]\n', "the region eu-west-2 .* holds Instance new, Key"),
                                (f'[regions]\n"{HERE}" = ["b"]\n"{THERE}" = ["a"]\n', "the zone us-east-1a .* holds old")):
            (cloud.folder / "skysail.toml").write_text(f'port = {cloud.port}\n{cloud.store}engines = "sim"\n{settings}')
            without = load(str(cloud.folder))
            with pytest.raises(SkysailError, match=words) as caught:
                controller.initialise(without)
            assert controller.refused(without) == (caught.value.what, caught.value.cure)
        there = cloud.client(region=THERE)
        ended(there, there.delete_instance(instanceName="new"))
        (key,) = there.get_key_pairs(includeDefaultKeyPair=True)["keyPairs"]
        there.delete_key_pair(keyPairName=key["name"], expectedFingerprint=key["fingerprint"])
        restart(f'[regions]\n"{HERE}" = ["a", "b"]\n')
        refused(cloud.client(region=THERE).get_instances)
        assert [one["name"] for one in cloud.client().get_regions()["regions"]] == [HERE]
        (cloud.folder / "skysail.toml").write_text(f'{cloud.store}engines = "sim"\n[regions]\n"us-east-2" = ["a"]\n')
        what, cure = json.loads(run(cloud, "skysail.serve.controller", "--check").stdout)
        assert "the region us-east-1 cannot leave" in what and "old" in what and "skysail.toml" in cure
        begun = run(cloud, "skysail.serve.controller", "--prepare")
        assert begun.returncode == 1 and "cannot leave" in begun.stderr and "Traceback" not in begun.stderr


def operator(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    """``skysail WORDS`` on this cloud."""
    return run(cloud, "skysail.cli.main", *words)


def test_the_operator_works_in_a_region_and_searches_all(cloud: Cloud) -> None:
    made = json.loads(operator(cloud, "launch", "seeker", "--region", THERE, "--json").stdout)
    assert made["location"]["availabilityZone"] == f"{THERE}a"
    operator(cloud, "launch", "seeker")
    for region, expected in ((THERE, {THERE}), (HERE, {HERE}), ("", {HERE, THERE})):
        listed = json.loads(operator(cloud, "list", "--json", *(["--region", region] if region else [])).stdout)
        assert {one["location"]["regionName"] for one in listed if one["name"] == "seeker"} == expected
    assert "region" in operator(cloud, "list").stdout
    refused_ = operator(cloud, "list", "--region", "mars-north-1")
    assert refused_.returncode == 1 and "no region mars-north-1" in refused_.stderr and HERE in refused_.stderr
    cloud.client(region=THERE).tag_resource(resourceName="seeker", tags=[{"key": "purpose", "value": "Needle in hay"}])

    def found(text: str) -> list[tuple[str, str, str]]:
        told = json.loads(operator(cloud, "search", text, "--json").stdout)
        return [(one["region"], one["type"], one["name"]) for one in told]
    both = [(THERE, "Instance", "seeker"), (HERE, "Instance", "seeker")]
    assert found("SEEK") == both
    assert found("needle") == found(made["publicIpAddress"]) == found(made["privateIpAddress"]) == both[:1]
    assert found(made["arn"].rpartition("/")[2]) == found(made["ipv6Addresses"][0]) == both[:1]
    assert found("nothing of that kind") == []
    shown = operator(cloud, "search", "seeker").stdout
    assert "admin" in shown and made["publicIpAddress"] in shown and "running" in shown
    assert operator(cloud, "search", "").returncode == 1
    # What belongs to the command stays the command's.
    said = operator(cloud, "ssh", "--region", "mars-north-1", "seeker", "--", "true", "--region", THERE)
    assert "no region mars-north-1" in said.stderr
