"""``skysail verify``: clean after a whole life, and it names each difference that is planted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

import stores
from clouds import Cloud, RealCloud, eventually, running_cloud
from skysail.inspect.verify import Difference, verify


def told(found: list[Difference]) -> str:
    return "\n".join(f"{one.subject}: {one.saw}; wanted: {one.wanted}" for one in found)


def change(cloud: Cloud, statement: str) -> None:
    """Edit a row behind the controller's back, references unchecked. ``{00}`` are bytes."""
    with stores.unreferenced(cloud.config) as connection:
        assert connection.exec_driver_sql(_blobs.sub(stores.BLOB, statement)).rowcount != 0, statement


def count(cloud: Cloud, table: str) -> int:
    return int(stores.rows(cloud.config, f"select count(*) as held from {table}")[0]["held"])


_blobs = re.compile(r"\{([0-9a-f]+)\}")
REGIONS = 'peer_subnets = ["192.0.2.0/24"]\n[regions]\n"us-east-1" = ["a", "b"]\n"eu-west-2" = ["a"]\n'


@pytest.fixture(scope="module")
def lived() -> Iterator[Cloud]:
    """A cloud with two instances, one in another region and a deleted one, whose controller is stopped: nothing is repaired
    meanwhile."""
    with running_cloud(REGIONS) as cloud:
        client = cloud.client()
        eventually(lambda: client.get_blueprints()["blueprints"], 20)
        client.create_instances(instanceNames=["one", "two", "gone"], availabilityZone="us-east-1a",
                                blueprintId="debian_12", bundleId="nano_3_0", tags=[{"key": "stage", "value": "test"}])
        eventually(lambda: {found["state"]["name"] for found in client.get_instances()["instances"]} == {"running"})
        elsewhere = cloud.client(region="eu-west-2")
        elsewhere.create_instances(instanceNames=["far"], availabilityZone="eu-west-2a", blueprintId="debian_12",
                                   bundleId="nano_3_0")
        elsewhere.peer_vpc()
        client.download_default_key_pair()
        client.create_domain(domainName="example.com", tags=[{"key": "stage"}])
        client.create_domain_entry(domainName="example.com",
                                   domainEntry={"name": "www.example.com", "type": "A", "target": "192.0.2.1"})
        client.create_domain(domainName="gone.example")
        client.delete_domain(domainName="gone.example")
        client.create_disk(diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
        eventually(lambda: client.get_disk(diskName="data")["disk"]["state"] == "available")
        client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdf")
        eventually(lambda: client.get_disk(diskName="data")["disk"]["attachmentState"] == "attached")
        client.create_instance_snapshot(instanceName="one", instanceSnapshotName="snap")
        client.create_disk_snapshot(diskName="data", diskSnapshotName="copy")
        eventually(lambda: client.get_disk_snapshot(diskSnapshotName="copy")["diskSnapshot"]["state"] == "completed")
        client.create_disk_from_snapshot(diskName="child", diskSnapshotName="copy", availabilityZone="us-east-1a", sizeInGb=8)
        client.enable_add_on(resourceName="one", addOnRequest={"addOnType": "AutoSnapshot"})
        change(cloud, "update add_ons set hour = 0, last_day = ''")  # due now
        eventually(lambda: "Success" in str(client.get_auto_snapshots(resourceName="one")["autoSnapshots"]))
        client.untag_resource(resourceName="one", tagKeys=["none"])
        client.stop_instance(instanceName="two")
        client.delete_instance(instanceName="gone")
        eventually(lambda: client.get_instance_state(instanceName="two")["state"]["name"] == "stopped")
        # What was deleted is gone to its last row: verify lets it be as long as it is leaving.
        eventually(lambda: count(cloud, "guests") == 3 and count(cloud, "domains") == 1)
        eventually(lambda: verify(cloud.config, 0.1) == [])
        cloud.kill("controller")
        yield cloud


@pytest.fixture
def store(lived: Cloud) -> Iterator[Cloud]:
    """The same, its database put back afterwards."""
    with stores.put_back(lived.config):
        yield lived


PLANTED = {
    "name forgotten": ("delete from names where name = 'one'", "Instance one: its name is not registered"),
    "disk's name": ("delete from names where name = 'data'", "Disk data: its name is not registered"),
    "disk's state": ("update disks set state = 'available' where name = 'data'", "disk data: available attached"),
    "disk not plugged": ("update guests set observed_disks = '[]'", "the guest does not have it"),
    "disk twice at a path": ("update disks set instance_id = (select id from instances where name = 'one'), "
                             "path = '/dev/xvdf'", "where another disk is"),
    "disk unknown": ("delete from disks where name = 'child'", "there on host-1, but no row knows it"),
    "disk lost": ("update disks set id = 'd-lost', made = true where name = 'child'", "volume d-lost: not there on host-1"),
    "snapshot's name": ("delete from names where name = 'snap'", "Snapshot snap: its name is not registered"),
    "snapshot's state": ("update snapshots set observed_state = 'failed' where name = 'snap'", "its host says failed"),
    "snapshot unknown": ("delete from snapshots where name = 'snap'", "there on host-1, but no row knows it"),
    "snapshot needed": ("update snapshots set id = 's-lost' where name = 'copy'", "which is not there"),
    "snapshot lost": ("update snapshots set id = 's-lost' where name = 'snap'", "snapshot s-lost: not there"),
    "copy without its source": ("update snapshots set duplicates = 's-lost', observed_state = '' where name = 'snap'",
                                "to be made of s-lost, which is not there"),
    "add-on left": ("update add_ons set resource_id = 'nobody'", "add-on of nobody: its resource is gone"),
    "automatic snapshot left": ("update snapshots set source_id = 'nobody' where auto_day != ''", "its source is gone"),
    "automatic snapshot twice": ("update snapshots set auto_day = (select max(auto_day) from snapshots), "
                                 "source_id = (select id from instances where name = 'one')", "3 of 20"),
    "automatic snapshots kept": (
        "insert into snapshots (id, account_id, region, name, kind, host_id, guest_id, volumes, source, size_gib, role, "
        "deleted, state, created_at, observed_state, progress, consistency, frozen_ms, parents, reason, source_id, auto_day) "
        "select id || column1, account_id, region, name, kind, host_id, guest_id, volumes, source, size_gib, role, deleted, "
        "state, created_at, observed_state, progress, consistency, frozen_ms, parents, reason, source_id, column1 "
        "from snapshots, (values ('1'), ('2'), ('3'), ('4'), ('5'), ('6'), ('7')) as more where auto_day != ''",
        "8 kept; wanted: 7 at the most"),
    "name kept": ("update names set name = 'ghost' where name = 'one'", "name ghost: taken, but nothing has it"),
    "size": ("update guests set memory_mib = 9999 where instance_name = 'one'", "instance one: 2 processors, 9999 MiB"),
    "role": ("update guests set role = 'stop' where instance_name = 'one'", "its guest's role is stop"),
    "process": ("update guests set role = 'run' where instance_name = 'two'", "its process does not run"),
    "state": ("update guests set observed_state = 'crashed' where instance_name = 'one'", "its host says crashed"),
    "document": ("update guests set private_ipv4 = '172.26.9.9' where instance_name = 'one'", "is another document"),
    "generation": ("update hosts set generation = generation + 1", "its agent holds generation"),
    "guest unknown": ("delete from guests where instance_name = 'one'", "there on host-1, but no row knows it"),
    "guest twice": ("update guests set instance_id = (select id from instances where name = 'one')", "3 guests"),
    "network of nobody": ("update guests set network = 99 where instance_name = 'one'", "in network 99 of nobody"),
    "network elsewhere": ("update guests set network = (select network from guests where instance_name = 'far')",
                          "in eu-west-2; wanted: the network of account"),
    "network apart": ("update networks set peered = true", "reached by guests of networks [1]; wanted: networks [1, 2]"),
    "network routed": ("update networks set peered = false", "of far: joined with the peer subnets; wanted: apart from them"),
    "network not routed": ("update networks set peered = true", "of one: apart from the peer subnets; wanted: joined"),
    "instance lost": ("delete from instances where name = 'one'", "no instance owns it"),
    "tags left": ("update tags set resource_id = 'nobody' where resource_id || key = "
                  "(select min(resource_id || key) from tags)", "tags of nobody"),
    "reference": ("update access_keys set account_id = 'nobody'", "points at a row of accounts"),
    "work without end": ("update operations set done = false where workflow = ''", "nothing carries it on"),
    "stuck work": ("update operations set done = false, created_at = 1 where type = 'CreateInstance'", "open since 1970"),
    "domain's name": ("delete from names where name = 'example.com'", "Domain example.com: its name is not registered"),
    "domain lost": ("delete from domains where name = 'example.com'", "domain_entries of"),
    "zone unknown": ("delete from domains where name = 'example.com'", "zone example.com.: served, but no row knows it"),
    "zone missing": ("update domains set name = 'other.com' where name = 'example.com'", "zone other.com.: its host's name"),
    "record": ("update domain_entries set record = '192.0.2.9'", "A www.example.com.: 60 192.0.2.1; wanted: 60 192.0.2.9"),
    "record lost": ("delete from domain_entries", "A www.example.com.: 60 192.0.2.1; wanted: no such record"),
    "record missing": ("update domain_entries set name = 'new.example.com'", "A new.example.com.: not there"),
    "serial": ("update domains set serial = serial + 9", "zone example.com.: serial "),
    "zone key": ("update domains set signing_sealed = {00112233445566778899aabbccddeeff0011}", "zone key of example.com"),
    "signed": ("update domains set ds = '1 13 2 00' where name = 'example.com'", "keys with the DS records none"),
    "alarm's name": ("insert into names select account_id, region, 'bell', 'Alarm', 'a-1' from names limit 1",
                     "name bell: taken, but nothing has it"),
    "metadata": ("update instances set metadata_options = '{\"http_tokens\": \"required\"}' where name = 'one'",
                 "it is told something else"),
    "metadata untold": ("update guests set instance_name = 'one', id = 'g-new' where instance_name = 'one'",
                        "it is told nothing"),
    "metadata told": ("delete from instances where name = 'one'", "told to nobody that the rows know"),
    "addresses": ("update guests set public_ipv4 = null where instance_name = 'one'", "public IPv4 address none"),
    "bundle without IPv4": ("update instances set bundle_id = 'nano_ipv6_3_0' where name = 'one'",
                            "wanted: as many as nano_ipv6_3_0 has"),
    "no address": ("update guests set public_ipv4 = null, public_ipv6 = null where instance_name = 'one'",
                   "no public address"),
    "led elsewhere": ("update guests set observed_addresses = '[\"192.0.2.1\"]' where instance_name = 'one'",
                      "its host leads 192.0.2.1 to it"),
    "measurements": ("insert into measurements values ('nobody', 60, 0, {80})", "measurements of nobody: no meter"),
    "notice given up": ("insert into deliveries values ('d-1', 'c-1', 'me@example.org', 'bell', '', 0, 9, null, 'away')",
                        "given up after 9 attempts: away"),
    "notice without a sender": ("insert into deliveries values ('d-1', 'c-1', 'me@example.org', 'bell', '', 0, 9, 1e12, '')",
                                "notice d-1: its contact method is gone"),
    "secret": ("update access_keys set secret_sealed = {00112233445566778899aabbccddeeff0011}", "does not open"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_named(store: Cloud, planted: str) -> None:
    if planted == "reference" and store.config.database:
        pytest.skip("PostgreSQL checks its references itself")
    statement, words = PLANTED[planted]
    change(store, statement)
    found = verify(store.config, 0.05)
    assert words in told(found), told(found)


def test_another_programs_schema_is_named(store: Cloud) -> None:
    change(store, "update schema_version set version = 1" if store.config.database else "pragma user_version = 1")
    assert "schema version 1" in told(verify(store.config, 0.05))


def test_an_agent_that_is_away_is_named(cloud: Cloud) -> None:
    cloud.kill("agent")
    assert "its agent does not answer" in told(verify(cloud.config, 0.05))


@pytest.mark.real
def test_what_a_machine_lost_or_kept_is_named(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    cloud.launch("one")
    assert verify(cloud.config) == []
    cloud.kill("controller")
    (guest,) = [path.name for path in cloud.config.guests_dir.iterdir()]

    def planted(act: Callable[[], object], words: str) -> None:
        act()
        found = verify(cloud.config)
        assert words in told(found), told(found)

    planted(lambda: (cloud.config.guests_dir / "g-stray").mkdir(), "the folder g-stray of no guest")
    planted(lambda: (cloud.config.volumes_dir / "g-left.qcow2").touch(), "volume g-left: there on host-1, but no row")
    planted(lambda: (cloud.config.volumes_dir / f"{guest}.qcow2").rename(cloud.config.root / "away"), "no volume of it")
