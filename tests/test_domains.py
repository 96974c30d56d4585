"""Domains: what the API takes and refuses, on a simulated host, and what becomes of it for the hosts."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from sqlalchemy import delete, insert, select

import stores
from clouds import Cloud, eventually, running_cloud
from registrar import ZONE, Registrar
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


def test_a_cloud_without_names_for_its_name_servers_does_not_start() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    for wrong in ("[]", '["ns1"]', '["NS1.example.com"]', '["ns1.example.com."]', '["a b.c"]'):
        (folder / "skysail.toml").write_text(f"name_servers = {wrong}\n")
        with pytest.raises(SkysailError, match="name_servers"):
            load(str(folder))
    shutil.rmtree(folder)
