"""Domains: what the API takes and refuses, on a simulated host; then with a real PowerDNS, from the reply to dig."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError
from sqlalchemy import delete, insert, select

import stores
from clouds import Cloud, eventually, running_cloud
from name_servers import NameServer, free_port
from skysail.cli.main import main
from skysail.hosts import desired
from skysail.hosts.zones import ZoneCompiler
from skysail.inspect.verify import verify
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.resources import accounts, domains, zone_files
from skysail.resources.records import Entry
from skysail.serve import endpoint
from skysail.store.database import Database
from skysail.store.schema import hosts, static_ips
from skysail.store.vault import Vault

LONG = "a" * 64


class Registrar:
    """boto3's client, with the few words that tests of domains say often."""

    def __init__(self, cloud: Cloud) -> None:
        self.client: Any = cloud.client()

    def add(self, name: str, kind: str, target: str, domain: str = "example.com", **more: Any) -> dict[str, Any]:
        operation: dict[str, Any] = self.client.create_domain_entry(
            domainName=domain, domainEntry={"name": name, "type": kind, "target": target, **more})["operation"]
        return operation

    def entries(self, domain: str = "example.com") -> list[dict[str, Any]]:
        """What the customer made."""
        found = self.client.get_domain(domainName=domain)["domain"]["domainEntries"]
        return [entry for entry in found if entry["type"] != "SOA" and (entry["type"], entry["name"]) != ("NS", domain)]

    def refused(self, action: str, **params: Any) -> dict[str, Any]:
        with pytest.raises(ClientError) as caught:
            getattr(self.client, action)(**params)
        error: dict[str, Any] = caught.value.response["Error"]
        return error


@pytest.fixture(scope="module")
def shared() -> Iterator[Cloud]:
    with running_cloud() as made:
        client = made.client()
        eventually(lambda: client.get_blueprints()["blueprints"], 20)
        client.create_instances(instanceNames=["web-1"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        yield made


@pytest.fixture
def registrar(shared: Cloud) -> Iterator[Registrar]:
    """A fresh example.com."""
    made = Registrar(shared)
    made.client.create_domain(domainName="example.com")
    yield made
    for domain in made.client.get_domains()["domains"]:
        made.client.delete_domain(domainName=domain["name"])


def test_a_domain_from_its_making_to_its_end(shared: Cloud) -> None:
    client = shared.client()
    made = client.create_domain(domainName="Example.ORG.", tags=[{"key": "stage", "value": "test"}])["operation"]
    assert made["operationType"] == "CreateDomain" and made["status"] == "Succeeded" and made["isTerminal"]
    assert made["resourceType"] == "Domain" and made["resourceName"] == "example.org"
    assert made["location"] == {"availabilityZone": "all", "regionName": "global"}
    assert client.get_operation(operationId=made["id"])["operation"] == made
    domain = client.get_domain(domainName="example.org")["domain"]
    assert domain["location"] == {"availabilityZone": "all", "regionName": "global"}
    assert domain["arn"].startswith("arn:aws:lightsail:global:") and ":Domain/" in domain["arn"]
    assert domain["tags"] == [{"key": "stage", "value": "test"}] and domain["resourceType"] == "Domain"
    assert [(entry["type"], entry["target"]) for entry in domain["domainEntries"]][:2] == [
        ("NS", "ns1.skysail.internal"), ("NS", "ns2.skysail.internal")]
    assert domain["domainEntries"][2]["type"] == "SOA"
    assert client.get_domain(domainName="EXAMPLE.org.")["domain"] == domain, "reads are stable"
    assert [found["name"] for found in client.get_domains()["domains"]] == ["example.org"]
    client.tag_resource(resourceName="example.org", tags=[{"key": "more"}])
    client.untag_resource(resourceName="example.org", tagKeys=["stage"])
    assert client.get_domain(domainName="example.org")["domain"]["tags"] == [{"key": "more"}]
    gone = client.delete_domain(domainName="example.org")["operation"]
    assert gone["operationType"] == "DeleteDomain" and gone["status"] == "Succeeded"
    with pytest.raises(client.exceptions.NotFoundException):
        client.get_domain(domainName="example.org")
    client.create_domain(domainName="example.org")
    assert client.get_domain(domainName="example.org")["domain"]["tags"] == []
    client.delete_domain(domainName="example.org")
    eventually(lambda: verify(shared.config, 0.1) == [])


@pytest.mark.parametrize("name", [
    "", "com", "example", "-a.com", "a-.com", "a..com", ".com", f"{LONG}.com", "a b.com", "a_b.com", "münchen.de", "1.2.3.4",
    "*.com", "a.com..", "a/b.com", ".".join(["a" * 60] * 5), "a.com\n"])
def test_names_that_are_none(registrar: Registrar, name: str) -> None:
    assert registrar.refused("create_domain", domainName=name)["Code"] == "InvalidInputException"
    assert [found["name"] for found in registrar.client.get_domains()["domains"]] == ["example.com"]


def test_a_name_is_had_once_in_a_cloud_and_nobody_gets_below_anothers(registrar: Registrar, shared: Cloud) -> None:
    assert "already" in registrar.refused("create_domain", domainName="EXAMPLE.com")["Message"]
    registrar.client.create_domain(domainName="own.example.com")
    other = _another_account(shared)
    with pytest.raises(other.exceptions.InvalidInputException, match="already"):
        other.create_domain(domainName="example.com")
    with pytest.raises(other.exceptions.InvalidInputException, match="already"):
        other.create_domain(domainName="deep.below.example.com")
    with pytest.raises(other.exceptions.NotFoundException):
        other.get_domain(domainName="example.com")
    with pytest.raises(other.exceptions.NotFoundException):
        other.delete_domain(domainName="example.com")
    other.create_domain(domainName="example.net")
    assert [found["name"] for found in other.get_domains()["domains"]] == ["example.net"]
    other.delete_domain(domainName="example.net")


def _another_account(cloud: Cloud) -> Any:
    database = Database.of(cloud.config)
    with database.transaction() as connection:
        account = accounts.find_account(connection, "other") or accounts.create_account(connection, "other", time.time())
        key, secret = accounts.create_access_key(connection, Vault.at(cloud.config.master_key), account, time.time())
    database.close()
    return cloud.client(key, secret)


def test_another_region_is_told_where_domains_are(registrar: Registrar, shared: Cloud) -> None:
    credentials = json.loads((shared.folder / "credentials.json").read_text())
    elsewhere = boto3.client("lightsail", region_name="eu-west-1", endpoint_url=endpoint.url(shared.config),
                             aws_access_key_id=credentials["access_key_id"],
                             aws_secret_access_key=credentials["secret_access_key"])
    with pytest.raises(elsewhere.exceptions.InvalidInputException, match="serves the region us-east-1"):
        elsewhere.get_domains()


def test_every_type_is_taken_and_shown_as_it_was_written(registrar: Registrar) -> None:
    wanted = [("example.com", "A", "192.0.2.1"), ("example.com", "A", "192.0.2.2"),
              ("www.example.com", "AAAA", "2001:DB8::1"),
              ("blog.example.com", "CNAME", "Other.Example.net"), ("example.com", "MX", "10 mail.example.com"),
              ("child.example.com", "NS", "ns1.example.net."), ("_sip._tcp.example.com", "SRV", "1 10 5060 sip.example.com"),
              ("example.com", "TXT", '"v=spf1 -all"'), ("*.any.example.com", "A", "192.0.2.3"),
              ("_dmarc.example.com", "TXT", '"v=DMARC1; p=none"'), ("_x.example.com", "CNAME", "_y.acm-validations.aws.")]
    for name, kind, target in wanted:
        operation = registrar.add(name, kind, target)
        assert operation["operationType"] == "CreateDomainEntry" and operation["status"] == "Succeeded"
        assert operation["resourceName"] == "example.com"
    found = registrar.entries()
    assert sorted((entry["name"], entry["type"], entry["target"]) for entry in found) == sorted(wanted)
    assert not any(entry["isAlias"] for entry in found) and len({entry["id"] for entry in found}) == len(found)
    assert registrar.entries() == found


MALFORMED = [
    ("www.example.org", "A", "192.0.2.1"), ("example.com.evil.org", "A", "192.0.2.1"), ("badexample.com", "A", "192.0.2.1"),
    ("www", "A", "192.0.2.1"), ("a b.example.com", "A", "192.0.2.1"), (f"{LONG}.example.com", "A", "192.0.2.1"),
    ("a..example.com", "A", "192.0.2.1"), (".example.com", "A", "192.0.2.1"), ("x.*.example.com", "A", "192.0.2.1"),
    ("é.example.com", "A", "192.0.2.1"), (f"{'a.' * 125}example.com", "A", "192.0.2.1"), ("-a.example.com", "A", "192.0.2.1"),
    ("www.example.com\n", "A", "192.0.2.1"), ('w"w.example.com', "A", "192.0.2.1"), ("$x.example.com", "A", "192.0.2.1"),
    ("www.example.com", "A", ""), ("www.example.com", "A", "192.0.2"), ("www.example.com", "A", "192.0.2.256"),
    ("www.example.com", "A", "192.0.02.1"), ("www.example.com", "A", "2001:db8::1"), ("www.example.com", "A", " 192.0.2.1"),
    ("www.example.com", "A", "192.0.2.1\n192.0.2.2"), ("www.example.com", "A", "web-1"),
    ("www.example.com", "AAAA", "192.0.2.1"), ("www.example.com", "AAAA", "fe80::1%eth0"), ("www.example.com", "AAAA", ":::"),
    ("example.com", "CNAME", "example.net"), ("www.example.com", "CNAME", "a b"), ("www.example.com", "CNAME", "."),
    ("www.example.com", "CNAME", "x\ny"), ("www.example.com", "CNAME", f"{LONG}.example.net"),
    ("example.com", "MX", "mail.example.com"), ("example.com", "MX", "65536 mail.example.com"),
    ("example.com", "MX", "-1 mail.example.com"), ("example.com", "MX", "10 mail.example.com x"),
    ("example.com", "MX", "٣ mail.x"),
    ("example.com", "NS", "ns1.example.net"), ("child.example.com", "NS", "192.0.2.1 x"),
    ("www.example.com", "SRV", "1 10 5060 sip.example.com"), ("_sip._tcp.example.com", "SRV", "1 10 sip.example.com"),
    ("_sip._tcp.example.com", "SRV", "1 10 70000 sip.example.com"),
    ("example.com", "TXT", "v=spf1 -all"), ("example.com", "TXT", '"open'), ("example.com", "TXT", '"a" b'),
    ("example.com", "TXT", f'"{"x" * 256}"'), ("example.com", "TXT", f'"{"x" * 5000}"'), ("example.com", "TXT", '"a\\999"'),
    ("example.com", "TXT", '"two\nlines"'), ("example.com", "TXT", '"x" ; "comment"'), ("example.com", "TXT", '"x"\n"y"'),
    ("example.com", "SOA", "ns1.x. h.x. 1 2 3 4 5"), ("example.com", "CAA", '0 issue "x"'), ("example.com", "a", "192.0.2.1"),
    ("example.com", "A' OR 1=1 --", "192.0.2.1"), ("example.com", "", "192.0.2.1"),
]


@pytest.mark.parametrize(("name", "kind", "target"), MALFORMED)
def test_malformed_entries_are_refused_and_leave_nothing(registrar: Registrar, name: str, kind: str, target: str) -> None:
    before = registrar.client.get_domain(domainName="example.com")
    error = registrar.refused("create_domain_entry", domainName="example.com",
                              domainEntry={"name": name, "type": kind, "target": target})
    assert error["Code"] == "InvalidInputException" and len(error["Message"]) < 500, error
    after = registrar.client.get_domain(domainName="example.com")
    assert after["domain"] == before["domain"]


def test_what_cannot_be_together_is_refused(registrar: Registrar) -> None:
    def refused(name: str, kind: str, target: str) -> str:
        message: str = registrar.refused("create_domain_entry", domainName="example.com", domainEntry={
            "name": name, "type": kind, "target": target})["Message"]
        return message

    registrar.add("a.example.com", "A", "192.0.2.1")
    registrar.add("six.example.com", "AAAA", "2001:db8::1")
    registrar.add("c.example.com", "CNAME", "a.example.com")
    registrar.add("example.com", "TXT", '"v=spf1 a -all"')
    assert "already exists" in refused("A.example.com", "A", "192.0.2.1")
    assert "already exists" in refused("six.example.com", "AAAA", "2001:0db8:0:0::1")
    assert "CNAME" in refused("a.example.com", "CNAME", "b.example.com")
    assert "CNAME" in refused("c.example.com", "A", "192.0.2.1")
    assert "CNAME" in refused("c.example.com", "CNAME", "b.example.com")
    assert "SPF" in refused("example.com", "TXT", '"v=SPF1 mx -all"')
    for number in range(20):
        try:
            registrar.add("big.example.com", "TXT", " ".join(f'"{number:03}{"x" * 240}"' for _ in range(16)))
        except ClientError as full:
            assert number >= 10 and "DNS message" in str(full)
            break
    else:
        raise AssertionError("a record set that no DNS message holds was taken")


def test_entries_are_changed_and_deleted_by_id_or_as_they_are(registrar: Registrar) -> None:
    client = registrar.client
    registrar.add("www.example.com", "A", "192.0.2.1")
    registrar.add("www.example.com", "A", "192.0.2.2")
    first, second = registrar.entries()
    (done,) = client.update_domain_entry(domainName="example.com", domainEntry={
        "id": first["id"], "name": "www.example.com", "type": "A", "target": "192.0.2.9"})["operations"]
    assert done["operationType"] == "UpdateDomainEntry" and done["status"] == "Succeeded"
    assert {entry["id"]: entry["target"] for entry in registrar.entries()} == {first["id"]: "192.0.2.9",
                                                                              second["id"]: "192.0.2.2"}
    assert "already exists" in registrar.refused("update_domain_entry", domainName="example.com", domainEntry={
        "id": first["id"], "target": "192.0.2.2"})["Message"]
    assert registrar.refused("update_domain_entry", domainName="example.com", domainEntry={
        "id": "nobody", "target": "192.0.2.2"})["Code"] == "NotFoundException"
    assert registrar.refused("update_domain_entry", domainName="example.com", domainEntry={
        "name": "www.example.com", "type": "A", "target": "192.0.2.2"})["Code"] == "InvalidInputException"
    assert registrar.refused("delete_domain_entry", domainName="example.com", domainEntry={
        "name": "www.example.com", "type": "A", "target": "192.0.2.3"})["Code"] == "NotFoundException"
    client.delete_domain_entry(domainName="example.com", domainEntry={"id": first["id"]})
    client.delete_domain_entry(domainName="example.com", domainEntry={
        "name": "WWW.example.com.", "type": "A", "target": "192.0.2.2", "isAlias": False})
    assert registrar.entries() == []
    own = client.get_domain(domainName="example.com")["domain"]["domainEntries"]
    for entry in own:
        assert registrar.refused("delete_domain_entry", domainName="example.com", domainEntry={
            "id": entry["id"]})["Code"] == "InvalidInputException"


def test_an_alias_has_an_instance_as_its_target(registrar: Registrar) -> None:
    registrar.add("example.com", "A", "web-1", isAlias=True)
    address = registrar.client.get_instance(instanceName="web-1")["instance"]["publicIpAddress"]
    registrar.add("by-address.example.com", "A", address, isAlias=True)
    assert [(entry["target"], entry["isAlias"]) for entry in registrar.entries()] == [(address, True), ("web-1", True)]
    for name, kind, target in (("x.example.com", "A", "web-9"), ("x.example.com", "A", "192.0.2.1"),
                               ("x.example.com", "CNAME", "web-1"), ("x.example.org", "A", "web-1"),
                               ("example.com", "A", "web-1"), ("x.example.com", "A", "' OR 1=1")):
        assert registrar.refused("create_domain_entry", domainName="example.com", domainEntry={
            "name": name, "type": kind, "target": target, "isAlias": True})["Code"] == "InvalidInputException"
    assert "alias" in registrar.refused("create_domain_entry", domainName="example.com", domainEntry={
        "name": "example.com", "type": "A", "target": "192.0.2.1"})["Message"]
    registrar.client.delete_domain_entry(domainName="example.com", domainEntry={
        "name": "example.com", "type": "A", "target": "web-1", "isAlias": True})
    assert [entry["name"] for entry in registrar.entries()] == ["by-address.example.com"]


ZONE = """\
$ORIGIN example.com.
$TTL 1h
@       IN SOA ns1.old.example. admin.old.example. ( 2024010101 1h 15m 2w 1h )
        IN NS  ns1.old.example.
        IN MX  10 Mail
        IN TXT "v=spf1 mx -all"
www 300 IN A   192.0.2.1
        IN A   192.0.2.2   ; two of them
*.apps  IN CNAME www
_sip._tcp SRV 0 5 5060 sip
v6      IN AAAA 2001:db8::1
"""


def test_a_zone_file_is_read_whole_or_not_at_all() -> None:
    domain, entries, left_out = zone_files.read(ZONE)
    assert domain == "example.com" and len(left_out) == 2
    assert sorted((entry.name, entry.type, entry.record, entry.ttl) for entry in entries) == [
        ("*.apps.example.com", "CNAME", "www.example.com.", 3600),
        ("_sip._tcp.example.com", "SRV", "0 5 5060 sip.example.com.", 3600),
        ("example.com", "MX", "10 mail.example.com.", 3600), ("example.com", "TXT", '"v=spf1 mx -all"', 3600),
        ("v6.example.com", "AAAA", "2001:0db8:0000:0000:0000:0000:0000:0001", 3600),
        ("www.example.com", "A", "192.0.2.1", 300), ("www.example.com", "A", "192.0.2.2", 300)]
    for bad, words in (("other.org. A 192.0.2.1", "outside of the zone"), ("x CAA 0 issue \"y\"", "CAA"),
                       ("$INCLUDE /etc/passwd", "INCLUDE"), ("$GENERATE 1-9999999 a$ A 192.0.2.1", "GENERATE"),
                       ("x A 192.0.2", "not a zone file"), ("a_b.x SRV 1 1 1 y", "RFC 2782"),
                       ("x\\032y A 192.0.2.1", "labels")):
        with pytest.raises(SkysailError, match=words):
            zone_files.read(ZONE + bad + "\n")
    for nothing in ("", "\x00", "www A 192.0.2.1\n", "$ORIGIN .\n@ 60 TXT x\n"):
        with pytest.raises(SkysailError):
            zone_files.read(nothing)


def test_hosts_get_a_document_when_what_an_alias_follows_moves_on_another(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    with database.transaction() as connection:
        account = accounts.create_account(connection, "first", 0.0)
        connection.execute(insert(hosts), [{"id": name, "address": "x"} for name in ("one", "two")])

        def generations() -> list[int]:
            return [*connection.execute(select(hosts.c.generation).order_by(hosts.c.id)).scalars()]

        row = domains.create(connection, account, "example.com", ["ns1.example.net"], 100.0)
        assert generations() == [2, 2]
        domains.replace_entries(connection, row, [Entry("a.example.com", "A", "192.0.2.1", "192.0.2.1")], 100.0)
        desired.bump(connection, "one")
        assert generations() == [4, 3]
        domains.replace_entries(connection, row, [Entry("a.example.com", "A", "web-1", alias="web-1")], 100.0)
        desired.bump(connection, "one")
        assert generations() == [6, 5]
        assert [one.name for one in next(ZoneCompiler().zones(connection, Vault(bytes(32)))).record_sets] == ["example.com."]
    database.close()


def test_a_zone_is_made_again_only_when_something_in_it_changed(tmp_path: Path) -> None:
    database, vault, compiler = stores.fresh(tmp_path), Vault(bytes(32)), ZoneCompiler()
    database.migrate()
    with database.transaction() as connection:
        account = accounts.create_account(connection, "first", 0.0)
        connection.execute(insert(hosts).values(id="one", address="x"))
        rows = [domains.create(connection, account, f"{name}.example", ["ns1.example.net"], 100.0) for name in "abc"]
        alias = Entry("www.b.example", "A", "front", alias="front", alias_region="us-east-1")
        domains.replace_entries(connection, rows[1], [alias], 100.0)

        def made() -> list[Any]:
            return [*compiler.zones(connection, vault)]

        first = made()
        assert all(one is other for one, other in zip(first, made(), strict=True))
        domains.replace_entries(connection, rows[0], [Entry("a.example", "A", "192.0.2.1", "192.0.2.1")], 200.0)
        second = made()
        assert [one is other for one, other in zip(first, second, strict=True)] == [False, True, True]
        # An alias follows what it names, although nothing in its domain changed.
        for address in ("192.0.2.8", "192.0.2.9"):
            connection.execute(delete(static_ips))
            connection.execute(insert(static_ips).values(id="s", account_id=account, region="us-east-1", name="front",
                                                         ipv4=address, created_at=0.0))
            third = made()
            assert [one is other for one, other in zip(second, third, strict=True)] == [True, False, True]
            assert third[1].record_sets[1].records == (address,)
        assert [one.name for one in third] == ["a.example.", "b.example.", "c.example."]
        assert third == [*ZoneCompiler().zones(connection, vault)]
    database.close()


def test_a_database_from_before_domains_gets_their_tables(tmp_path: Path) -> None:
    database = Database(tmp_path / "skysail.sqlite")
    database.migrate()
    with database.transaction() as connection:
        for table in ("zone_reports", "domain_entries", "domains"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("PRAGMA user_version = 2")
    database.migrate()
    with database.transaction(write=False) as connection:
        assert [*ZoneCompiler().zones(connection, Vault(bytes(32)))] == []
    database.close()


@pytest.fixture
def served() -> Iterator[tuple[Cloud, NameServer]]:
    """A cloud with a simulated host, whose domains a real PowerDNS serves; instances change addresses as on Lightsail."""
    if os.geteuid() != 0:
        pytest.skip("PowerDNS gets a user of its own, which needs root")
    with running_cloud(f'dns = "powerdns"\ndns_port = {free_port()}\ndns_api_port = {free_port()}\n'
                       'public_address = "changes"\n') as cloud:
        cloud.folder.chmod(0o755)
        power = NameServer(cloud.config)
        power.start()
        try:
            yield cloud, power
        finally:
            power.stop()


@pytest.mark.real
def test_from_the_reply_to_dig_and_an_alias_that_follows(served: tuple[Cloud, NameServer]) -> None:
    cloud, power = served
    made = Registrar(cloud)

    def seen(name: str, kind: str, wanted: str) -> None:
        eventually(lambda: power.dig(name, kind) == wanted, 30, f"{kind} {name} is {wanted!r}")

    made.client.create_domain(domainName="example.com")
    seen("example.com", "NS", "ns1.skysail.internal.\nns2.skysail.internal.\n")
    made.add("www.example.com", "A", "192.0.2.1")
    seen("www.example.com", "A", "192.0.2.1\n")
    (entry,) = made.entries()
    made.client.update_domain_entry(domainName="example.com", domainEntry={**entry, "target": "192.0.2.2"})
    seen("www.example.com", "A", "192.0.2.2\n")
    made.client.delete_domain_entry(domainName="example.com", domainEntry={"id": entry["id"]})
    seen("www.example.com", "A", "")

    eventually(lambda: made.client.get_blueprints()["blueprints"], 20)
    made.client.create_instances(instanceNames=["web-1", "web-2"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                 bundleId="nano_3_0")
    address = made.client.get_instance(instanceName="web-1")["instance"]["publicIpAddress"]
    eventually(lambda: made.client.get_instance_state(instanceName="web-1")["state"]["name"] == "running")
    made.add("example.com", "A", "web-1", isAlias=True)
    made.add("also.example.com", "A", address, isAlias=True)
    seen("example.com", "A", f"{address}\n")
    made.client.stop_instance(instanceName="web-1")
    eventually(lambda: made.client.get_instance_state(instanceName="web-1")["state"]["name"] == "stopped")
    serial = int(power.dig("example.com", "SOA").split()[2])
    made.client.start_instance(instanceName="web-1")
    moved = made.client.get_instance(instanceName="web-1")["instance"]["publicIpAddress"]
    assert moved != address
    seen("example.com", "A", f"{moved}\n")
    seen("also.example.com", "A", f"{moved}\n")
    assert int(power.dig("example.com", "SOA").split()[2]) > serial
    eventually(lambda: verify(cloud.config, 0.1) == [])
    made.client.delete_instance(instanceName="web-1")
    seen("example.com", "A", "")
    assert len(made.entries()) == 2, "the entry stays its owner's"

    made.client.allocate_static_ip(staticIpName="front")
    fixed = made.client.get_static_ip(staticIpName="front")["staticIp"]["ipAddress"]
    made.add("front.example.com", "A", "front", isAlias=True)
    made.add("fixed.example.com", "A", fixed, isAlias=True)
    seen("front.example.com", "A", f"{fixed}\n")
    made.client.attach_static_ip(staticIpName="front", instanceName="web-2")
    seen("fixed.example.com", "A", f"{fixed}\n")
    made.client.detach_static_ip(staticIpName="front")
    made.client.release_static_ip(staticIpName="front")
    seen("front.example.com", "A", "")
    (ipv6,) = made.client.get_instance(instanceName="web-2")["instance"]["ipv6Addresses"]
    made.add("six.example.com", "AAAA", "web-2", isAlias=True)
    eventually(lambda: ipaddress.IPv6Address(power.dig("six.example.com", "AAAA").strip() or "::")
               == ipaddress.IPv6Address(ipv6))

    made.client.delete_domain(domainName="example.com")
    eventually(lambda: "REFUSED" in power.dig("example.com", "SOA", "+noall", "+comments"))
    made.client.create_domain(domainName="example.com")
    seen("example.com", "NS", "ns1.skysail.internal.\nns2.skysail.internal.\n")
    assert power.dig("also.example.com", "A") == ""
    eventually(lambda: verify(cloud.config, 0.1) == [])


@pytest.mark.real
def test_kill_of_agent_and_name_server_in_a_burst_loses_nothing(served: tuple[Cloud, NameServer]) -> None:
    cloud, power = served
    made = Registrar(cloud)
    made.client.create_domain(domainName="example.com")
    for number in range(60):
        made.add(f"n{number}.example.com", "A", f"192.0.2.{number}")
        if number == 20:
            cloud.kill("agent")
        if number == 30:
            power.kill()
        if number == 40:
            cloud.start("agent")
    power.start()
    eventually(lambda: power.dig("n59.example.com", "A") == "192.0.2.59\n")
    assert [power.dig(f"n{number}.example.com", "A") for number in range(0, 60, 7)] == [
        f"192.0.2.{number}\n" for number in range(0, 60, 7)]
    eventually(lambda: verify(cloud.config, 0.1) == [])


@pytest.mark.real
def test_zones_are_exported_imported_and_signed_by_the_command_line(
        served: tuple[Cloud, NameServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    cloud, power = served
    monkeypatch.setenv("SKYSAIL_DATA", str(cloud.folder))
    made = Registrar(cloud)
    file = tmp_path / "example.com.zone"
    file.write_text(ZONE + "x CAA 0 issue \"y\"\n")
    assert main(["zones", "import", str(file)]) == 1
    assert "nothing was imported" in capsys.readouterr().err
    assert made.client.get_domains()["domains"] == []
    file.write_text(ZONE)
    assert main(["zones", "import", str(file)]) == 0
    assert "example.com: 7 entries, served" in capsys.readouterr().out
    assert power.dig("www.example.com", "A", "+noall", "+answer").split()[1] == "300"
    assert power.dig("a.apps.example.com", "CNAME") == "www.example.com.\n"
    before = made.entries()
    assert main(["zones", "import", str(file)]) == 1
    assert "--replace" in capsys.readouterr().err
    file.write_text(ZONE.replace("192.0.2.2", "192.0.2.3"))
    assert main(["zones", "import", str(file), "--replace"]) == 0
    after = made.entries()
    assert len({entry["id"] for entry in before} & {entry["id"] for entry in after}) == 6, "what stays keeps its id"
    assert power.dig("www.example.com", "A") in ("192.0.2.1\n192.0.2.3\n", "192.0.2.3\n192.0.2.1\n")

    capsys.readouterr()
    assert main(["zones", "export", "example.com"]) == 0
    exported = capsys.readouterr().out
    assert power.dig("example.com", "SOA").split()[2] in exported
    assert {entry.meaning for entry in zone_files.read(exported)[1]} == {
        entry.meaning for entry in zone_files.read(file.read_text())[1]}

    assert main(["zones", "dnssec", "example.com", "--json"]) == 0
    signer = json.loads(capsys.readouterr().out)
    assert signer["state"] == "served" and signer["ds"].split()[1:3] == ["13", "2"]
    assert power.dig("example.com", "DNSKEY").startswith("257 3 13 ")
    assert "RRSIG" in power.dig("www.example.com", "A", "+dnssec", "+noall", "+answer")
    eventually(lambda: verify(cloud.config, 0.1) == [])
    power.kill()
    shutil.rmtree(cloud.config.dns_dir / "database")
    again = NameServer(cloud.config)
    again.start()
    try:
        eventually(lambda: again.dig("example.com", "DNSKEY").startswith("257 3 13 "), 60, "the lost zone is served again")
        assert main(["zones", "list", "--json"]) == 0
        (listed,) = json.loads(capsys.readouterr().out)
        assert (listed["ds"], listed["entries"]) == (signer["ds"], 7)
        eventually(lambda: verify(cloud.config, 0.1) == [])
        assert main(["zones", "dnssec", "example.com", "--off"]) == 0
        assert again.dig("example.com", "DNSKEY") == ""
    finally:
        again.stop()
    assert main(["zones", "export", "nothing.example"]) == 1


@pytest.mark.real
def test_verify_names_what_differs_on_the_name_server(served: tuple[Cloud, NameServer]) -> None:
    cloud, power = served
    made = Registrar(cloud)
    made.client.create_domain(domainName="example.com")
    made.add("www.example.com", "A", "192.0.2.1")
    eventually(lambda: power.dig("www.example.com", "A") == "192.0.2.1\n")
    eventually(lambda: verify(cloud.config, 0.1) == [])
    api = httpx.Client(base_url=f"http://127.0.0.1:{cloud.config.dns_api_port}/api/v1/servers/localhost", timeout=30,
                       headers={"X-API-Key": cloud.config.dns_key_file.read_text()})

    def planted(words: str) -> None:
        found = "\n".join(f"{one.subject}: {one.saw}; wanted: {one.wanted}" for one in verify(cloud.config, 0.05))
        assert words in found, found

    def patch(*sets: dict[str, Any]) -> None:
        assert api.patch("/zones/example.com.", json={"rrsets": sets}).status_code == 204

    patch({"name": "www.example.com.", "type": "A", "ttl": 60, "changetype": "REPLACE",
           "records": [{"content": "203.0.113.9", "disabled": False}]})
    planted("zone example.com., A www.example.com.: 60 203.0.113.9; wanted: 60 192.0.2.1")
    patch({"name": "www.example.com.", "type": "A", "changetype": "DELETE"},
          {"name": "more.example.com.", "type": "TXT", "ttl": 60, "changetype": "REPLACE",
           "records": [{"content": '"x"', "disabled": False}]})
    planted("zone example.com., A www.example.com.: not there")
    planted("more.example.com.: 60 \"x\"; wanted: no such record")
    assert api.post("/zones/example.com./cryptokeys", json={"keytype": "csk", "active": True}).status_code == 201
    planted("zone example.com.: keys with the DS records")
    assert api.post("/zones", json={"name": "stray.test.", "kind": "Native", "nameservers": []}).status_code == 201
    planted("zone stray.test.: served, but no row knows it")
    made.add("new.example.com", "A", "192.0.2.2")
    eventually(lambda: [one.subject for one in verify(cloud.config, 0.05)] == ["zone stray.test."], 60,
               "the next change of the zone puts right what strangers did to it")
    cloud.kill("agent")
    assert api.delete("/zones/example.com.").status_code == 204
    cloud.start("agent")
    eventually(lambda: power.dig("www.example.com", "A") == "192.0.2.1\n", 60, "an agent that starts makes its zones whole")


@pytest.mark.real
def test_new_name_servers_are_named_by_domains_that_were_there(served: tuple[Cloud, NameServer]) -> None:
    cloud, power = served
    made = Registrar(cloud)
    made.client.create_domain(domainName="example.com")
    eventually(lambda: power.dig("example.com", "NS"))
    cloud.kill("controller")
    settings = cloud.folder / "skysail.toml"
    settings.write_text('name_servers = ["ns.example.com"]\n' + settings.read_text())
    cloud.start("controller")
    eventually(lambda: power.dig("example.com", "NS") == "ns.example.com.\n")
    assert power.dig("example.com", "SOA").startswith("ns.example.com. hostmaster.example.com. ")


def test_a_cloud_without_names_for_its_name_servers_does_not_start() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    for wrong in ("[]", '["ns1"]', '["NS1.example.com"]', '["ns1.example.com."]', '["a b.c"]'):
        (folder / "skysail.toml").write_text(f"name_servers = {wrong}\n")
        with pytest.raises(SkysailError, match="name_servers"):
            load(str(folder))
    shutil.rmtree(folder)
