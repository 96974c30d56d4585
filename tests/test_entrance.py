"""A single address from the outside, on a simulated host: which names lead to whom, and that they follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from botocore.exceptions import ClientError
from sqlalchemy import insert, select, update

import stores
from clouds import Cloud, eventually, running_cloud
from skysail.cli.main import main
from skysail.contract.document import HostDocument
from skysail.contract.report import Inventory
from skysail.hosts import entrance
from skysail.inspect.verify import verify
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.resources import addresses
from skysail.store.database import Database
from skysail.store.schema import accounts, guests, hosts, instances
from test_instances import launch, state

SHARED = "192.0.2.7"
SETTINGS = f'single_address = "{SHARED}"\ninstance_domain = "cloud.example.net"\n'


@pytest.fixture
def shared() -> Iterator[Cloud]:
    with running_cloud(SETTINGS) as made:
        yield made


def asked(cloud: Cloud, path: str) -> bytes:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket))) as agent:
        return agent.get(f"http://agent{path}").content


def names(cloud: Cloud) -> dict[str, str]:
    """Which instance each name leads to, as the host has it."""
    document = msgspec.json.decode(asked(cloud, "/document"), type=HostDocument)
    owners = {guest.port.private_ipv4: guest.instance for guest in document.guests}
    there = msgspec.json.decode(asked(cloud, "/inventory"), type=Inventory)
    return {name: owners[address] for name, address in there.names.items()}


def test_names_of_instances_and_of_domains_lead_to_them_and_follow(shared: Cloud) -> None:
    client = shared.client()
    launch(client, "one", "Two_2.x")
    eventually(lambda: state(client, "Two_2.x") == "running")
    own = {"one.us-east-1.cloud.example.net": "one", "two-2-x.us-east-1.cloud.example.net": "Two_2.x"}
    eventually(lambda: names(shared) == own)

    client.allocate_static_ip(staticIpName="front")
    client.attach_static_ip(staticIpName="front", instanceName="one")
    address = client.get_instance(instanceName="Two_2.x")["instance"]["publicIpAddress"]
    client.create_domain(domainName="example.com")
    for name, kind, target, more in (
            ("example.com", "A", "front", {"isAlias": True}), ("www.example.com", "CNAME", "example.com", {}),
            ("*.apps.example.com", "A", "Two_2.x", {"isAlias": True}), ("direct.example.com", "A", address, {}),
            ("away.example.com", "A", "203.0.113.9", {}), ("loop.example.com", "CNAME", "pool.example.com", {}),
            ("pool.example.com", "CNAME", "loop.example.com", {})):
        client.create_domain_entry(domainName="example.com",
                                   domainEntry={"name": name, "type": kind, "target": target, **more})
    wanted = own | {"example.com": "one", "www.example.com": "one", "*.apps.example.com": "Two_2.x",
                    "direct.example.com": "Two_2.x"}
    eventually(lambda: names(shared) == wanted)
    # Whoever asks for these names is told the address that the world can reach.
    def served() -> dict[str, tuple[str, ...]]:
        document = msgspec.json.decode(asked(shared, "/document"), type=HostDocument)
        return {one.name: one.records for one in document.zones[0].record_sets if one.type == "A"}

    eventually(lambda: served() == {"example.com.": (SHARED,), "*.apps.example.com.": (SHARED,),
                                    "direct.example.com.": (SHARED,), "away.example.com.": ("203.0.113.9",)})
    assert verify(shared.config, 0.1) == []

    client.detach_static_ip(staticIpName="front")
    client.attach_static_ip(staticIpName="front", instanceName="Two_2.x")
    eventually(lambda: names(shared).get("www.example.com") == "Two_2.x")
    assert "direct.example.com" not in names(shared), "that address is nobody's now"
    client.delete_instance(instanceName="one")
    eventually(lambda: "one.us-east-1.cloud.example.net" not in names(shared))
    assert verify(shared.config, 0.1) == []


def test_each_instance_has_a_port_for_its_life(shared: Cloud, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    client = shared.client()
    launch(client, "one", "two", "three")
    eventually(lambda: state(client, "three") == "running")
    monkeypatch.setenv("SKYSAIL_DATA", str(shared.folder))

    def ports() -> dict[str, int]:
        assert main(["list", "--json"]) == 0
        return {one["name"]: one["sshPort"] for one in json.loads(capsys.readouterr().out)}

    assert ports() == {"one": 22000, "two": 22001, "three": 22002}
    client.stop_instance(instanceName="three")
    client.delete_instance(instanceName="one")
    launch(client, "four")
    eventually(lambda: state(client, "three") == "stopped" and state(client, "four") == "running")
    assert ports() == {"two": 22001, "three": 22002, "four": 22000}
    client.start_instance(instanceName="three")
    assert main(["list"]) == 0 and "22002" in capsys.readouterr().out
    eventually(lambda: {guest.instance: guest.port.ssh_port for guest in msgspec.json.decode(
        asked(shared, "/document"), type=HostDocument).guests if guest.role != "gone"} == ports())
    eventually(lambda: verify(shared.config, 0.1) == [])


def test_who_may_jump_follows_the_key_pairs(shared: Cloud) -> None:
    client = shared.client()
    launch(client, "one")

    def held() -> int:
        document = msgspec.json.decode(asked(shared, "/document"), type=HostDocument | None)
        return len(document.entrance.accounts[0].keys) if document and document.entrance and document.entrance.accounts else 0

    eventually(lambda: held() == 1, what="the default key pair")
    client.create_key_pair(keyPairName="laptop")
    eventually(lambda: held() == 2)
    client.delete_key_pair(keyPairName="laptop")
    eventually(lambda: held() == 1)


def test_a_cloud_may_take_to_a_single_address_later_and_leave_it(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    with database.transaction() as connection:
        connection.execute(insert(accounts), [{"id": str(number), "tenant": number, "name": f"a{number}", "created_at": 0.0}
                                              for number in (1, 2)])
        connection.execute(insert(hosts).values(id="h", address="x"))
        for number, (account, name) in enumerate((("1", "web"), ("2", "web"), ("2", "Web."), ("1", "--"))):
            connection.execute(insert(instances).values(
                id=f"i-{number}", account_id=account, region="us-east-1", zone="a", name=name, blueprint_id="b",
                blueprint_name="b", bundle_id="nano_3_0", username="u", key_pair_name="k", state="running",
                created_at=float(number)))
            connection.execute(insert(guests).values(
                id=f"g-{number}", instance_id=f"i-{number}", instance_name=name, account_id=account, host_id="h", role="run",
                vcpus=1, memory_mib=1, disk_gib=1, image="", mac=f"m{number}", private_ipv4=f"172.26.0.1{number}",
                public_ipv4=f"192.0.2.1{number}", personality={}))

        def compiled() -> dict[str, str] | None:
            made = entrance.compile(connection, connection.execute(select(hosts)).mappings().one())
            return {one.name: one.guest for one in made.names} if made else None

        assert compiled() is None
        config = Config(single_address=SHARED)
        for _ in range(2):
            addresses.number_ssh_ports(connection, config)
        assert connection.execute(select(instances.c.ssh_port).order_by(instances.c.id)).scalars().all() == [
            22000, 22001, 22002, 22003]
        entrance.configure(connection, "h", SHARED, "")
        assert compiled() == {}
        entrance.configure(connection, "h", SHARED, "example.net")
        # Of several that want a name the oldest has it; one that spells no label has none.
        assert compiled() == {"web.us-east-1.example.net": "g-0"}
        connection.execute(update(guests).where(guests.c.id == "g-0").values(role="gone"))
        assert compiled() == {"web.us-east-1.example.net": "g-1"}
        generation = connection.execute(select(hosts.c.generation)).scalar_one()
        entrance.configure(connection, "h", SHARED, "example.net")
        assert connection.execute(select(hosts.c.generation)).scalar_one() == generation, "nothing changed"
        entrance.configure(connection, "h", "", "")
        assert compiled() is None
        assert connection.execute(select(hosts.c.generation)).scalar_one() == generation + 1
    database.close()


def test_nobody_gets_below_the_operators_own_domain(shared: Cloud) -> None:
    client = shared.client()
    launch(client, "one", "two")
    client.create_domain(domainName="us-east-1.cloud.example.net")
    for name in ("one", "other"):
        client.create_domain_entry(domainName="us-east-1.cloud.example.net", domainEntry={
            "name": f"{name}.us-east-1.cloud.example.net", "type": "A", "target": "two", "isAlias": True})
    eventually(lambda: names(shared) == {f"{name}.us-east-1.cloud.example.net": name for name in ("one", "two")})


@pytest.mark.parametrize("line", [
    'single_address = "here"', 'instance_domain = "Example"', "ssh_ports = 60000", "jump_port = 0"])
def test_what_cannot_be_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "skysail.toml").write_text(line + "\n")
    with pytest.raises(SkysailError):
        load(str(tmp_path))


def test_no_port_is_left_at_the_end(shared: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database.of(shared.config)
    with database.transaction() as connection:
        monkeypatch.setattr(addresses, "SSH_PORTS", 0)
        with pytest.raises(SkysailError, match="no SSH port left"):
            addresses.free_ssh_port(connection, shared.config)
    database.close()


def test_the_port_is_no_part_of_what_clients_compare(shared: Cloud) -> None:
    client = shared.client()
    launch(client, "one")
    assert "sshPort" not in client.get_instance(instanceName="one")["instance"]
    with pytest.raises(ClientError):
        launch(client, "one")
