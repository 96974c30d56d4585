"""Names of addresses, from the API to dig: they follow what domains say, as aliases do."""

from __future__ import annotations

import ipaddress
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from sqlalchemy import select

from clouds import Cloud, eventually
from name_servers import NameServer, free_port
from skysail.hosts.reverse import generic
from skysail.inspect.verify import verify
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.store.database import Database
from skysail.store.schema import reverse_zones
from test_instances import launch, state

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="the name server has a user of its own")]
ZONES = '"93.115.100.in-addr.arpa", "1.6.3.7.9.7.b.6.3.5.d.f.ip6.arpa"'


@pytest.fixture
def served() -> Iterator[tuple[Cloud, NameServer]]:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    cloud = Cloud(folder, f'engines = "sim"\ndns = "powerdns"\ndns_port = {free_port()}\ndns_api_port = {free_port()}\n'
                          f'name_servers = ["ns1.example.net"]\nreverse_zones = [{ZONES}]\n')
    server = NameServer(cloud.config)
    try:
        server.start()
        cloud.start("agent")
        cloud.start("controller")
        yield cloud, server
    finally:
        cloud.stop()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_an_address_has_the_name_that_leads_to_it(served: tuple[Cloud, NameServer]) -> None:
    cloud, server = served
    client = cloud.client()

    def named(address: str, name: str) -> None:
        pointer = ipaddress.ip_address(address).reverse_pointer
        eventually(lambda: server.dig(pointer, "PTR") == f"{name}.\n", 60, f"{address} is {name}")

    launch(client, "one")
    eventually(lambda: state(client, "one") == "running")
    found = client.get_instance(instanceName="one")["instance"]
    first, six = found["publicIpAddress"], found["ipv6Addresses"][0]
    named(first, f"ip-{first.replace('.', '-')}.example.net")
    named(six, generic(six, "example.net"))
    client.create_domain(domainName="example.com")
    for name, kind, target, alias in (("www.example.com", "A", "one", True), ("mail.example.com", "AAAA", six, False),
                                      ("*.example.com", "A", first, False)):
        client.create_domain_entry(domainName="example.com", domainEntry={
            "name": name, "type": kind, "target": target, "isAlias": alias})
    named(first, "www.example.com")
    named(six, "mail.example.com")

    client.allocate_static_ip(staticIpName="front")
    front = client.get_static_ip(staticIpName="front")["staticIp"]["ipAddress"]
    named(front, f"ip-{front.replace('.', '-')}.example.net")
    client.attach_static_ip(staticIpName="front", instanceName="one")
    named(front, "www.example.com")
    eventually(lambda: server.dig(ipaddress.ip_address(first).reverse_pointer, "PTR") == "", 60, "nobody has that address")
    client.create_domain_entry(domainName="example.com", domainEntry={"name": "example.com", "type": "A", "target": front})
    named(front, "example.com")
    eventually(lambda: verify(cloud.config, 0.1) == [])

    with pytest.raises(ClientError, match="reverse zone"):
        client.create_domain(domainName="1.93.115.100.in-addr.arpa")
    with pytest.raises(ClientError, match="reverse zone"):
        client.create_domain(domainName="115.100.in-addr.arpa")

    # A zone that the operator takes out goes from the name server, and from the rows behind it.
    toml = cloud.folder / "skysail.toml"
    toml.write_text(toml.read_text().replace(ZONES, ZONES.partition(", ")[2]))
    cloud.config = load(str(cloud.folder))
    cloud.kill("controller")
    cloud.start("controller")
    eventually(lambda: "REFUSED" in server.dig(ipaddress.ip_address(front).reverse_pointer, "PTR", "+noall", "+comments"), 60)

    def rows() -> list[str]:
        database = Database.of(cloud.config)
        with database.transaction(write=False) as connection:
            held = connection.execute(select(reverse_zones.c.name)).scalars().all()
        database.close()
        return [*held]

    eventually(lambda: rows() == ["1.6.3.7.9.7.b.6.3.5.d.f.ip6.arpa"], 60)
    named(six, "mail.example.com")


@pytest.mark.parametrize("zone", ["example.com", "203.in-addr.arpa.", "g.ip6.arpa", "IN-ADDR.ARPA"])
def test_what_is_no_reverse_zone_is_refused(tmp_path: Path, zone: str) -> None:
    (tmp_path / "skysail.toml").write_text(f'reverse_zones = ["{zone}"]\n')
    with pytest.raises(SkysailError, match="reverse_zones"):
        load(str(tmp_path))
