"""What documents say of the other hosts: from the facts that hosts told, to what each is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, insert, select

import stores
from skysail.contract.document import Network, Overlay
from skysail.contract.facts import HostFacts
from skysail.hosts import desired, overlay, roster
from skysail.hosts.watch import write_facts
from skysail.store.schema import accounts, guests, hosts, networks
from skysail.store.vault import Vault

FACTS = HostFacts(
    host="", program="0", kernel="6", qemu="10", accelerator="tcg", accelerator_seen="", cpu="c", cpu_flags=(),
    cpu_models=("qemu64",), machine_types=("pc-q35-7.2",), guest_cpu="qemu64", guest_machine="pc-q35-7.2")


def told(host: str, underlay: str) -> HostFacts:
    return msgspec.structs.replace(FACTS, host=host, underlay=underlay)


def generations(connection: Connection) -> dict[str, int]:
    return {row.id: row.generation for row in connection.execute(select(hosts.c.id, hosts.c.generation))}


@pytest.fixture
def database(tmp_path: Path) -> Any:
    made = stores.fresh(tmp_path)
    made.migrate()
    with made.transaction() as connection:
        for host in ("a", "b", "c"):
            connection.execute(insert(hosts).values(id=host, address=host, vcpus=4, memory_mib=8192, disk_gib=100,
                                                    accelerator="tcg"))
        connection.execute(insert(accounts).values(id="1", name="1", created_at=0.0))
        for number, peered in ((1, True), (2, True), (3, False), (4, False)):
            connection.execute(insert(networks).values(number=number, account_id="1", region=f"r{number}", peered=peered))
        for number, (host, network) in enumerate((("a", 1), ("a", 3), ("b", 3), ("b", 4))):
            connection.execute(insert(guests).values(
                id=f"g-{number}", instance_id=f"i-{number}", instance_name="x", account_id="1", host_id=host, role="run",
                vcpus=2, memory_mib=512, disk_gib=20, image="", mac=str(number), private_ipv4=str(number), network=network,
                personality={"hostname": "x", "user": "admin"}))
    return made


def test_hosts_are_told_of_each_other_once_they_have_an_underlay(database: Any, tmp_path: Path) -> None:
    vault = Vault(bytes(32))
    with database.transaction() as connection:
        alone = desired.compile(connection, "a", vault)
        write_facts(connection, "a", told("a", "192.0.2.1"), 1.0)
        write_facts(connection, "c", told("c", "127.0.0.1"), 1.0)
        assert (alone.overlay, {one.vni for one in alone.networks}) == (None, {0})
        first = desired.compile(connection, "a", vault)
        assert first.overlay is None and first.networks == alone.networks, "there is nobody else"
        write_facts(connection, "b", told("b", "192.0.2.2"), 1.0)
        a, b, c = (desired.compile(connection, host, vault) for host in ("a", "b", "c"))
    assert a.overlay == Overlay(hosts=("192.0.2.2",)) and b.overlay == Overlay(hosts=("192.0.2.1",))
    assert c.overlay is None, "others do not reach it"
    peered = (Network(number=1, peers=(2,), routed=True, vni=1), Network(number=2, peers=(1,), routed=True, vni=2))
    assert a.networks == (*peered, Network(number=3, vni=3))
    assert b.networks == (*peered, Network(number=3, vni=3), Network(number=4, vni=4))


def test_every_document_is_another_one_when_a_host_comes_moves_or_goes(database: Any) -> None:
    with database.transaction() as connection:
        before = generations(connection)
        write_facts(connection, "a", told("a", "192.0.2.1"), 1.0)
        came = generations(connection)
        assert all(came[host] > before[host] for host in before)
        write_facts(connection, "a", told("a", "192.0.2.1"), 2.0)
        assert generations(connection) == came, "it said the same again"
        write_facts(connection, "a", told("a", "192.0.2.7"), 3.0)
        moved = generations(connection)
        assert all(moved[host] > came[host] for host in came)
        write_facts(connection, "c", None, 4.0)
        assert generations(connection) == moved
        roster.remove(connection, "c")
        gone = generations(connection)
        assert all(gone[host] > moved[host] for host in gone)


def test_a_number_that_is_no_identifier_stays_on_its_host() -> None:
    assert overlay.spanning([5, overlay.MAX_NUMBER + 1], ()) == (
        Network(number=5, vni=5), Network(number=overlay.MAX_NUMBER + 1))
