"""Domains with a real PowerDNS: from the reply to dig, over kills and a change of the name servers' names."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from clouds import Cloud, eventually, running_cloud
from name_servers import NameServer, free_port
from registrar import ZONE, Registrar
from skysail.cli.main import main
from skysail.inspect.verify import verify
from skysail.resources import zone_files


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
