"""Large zones on their way to the host's ledger: in parts, of which only new ones are sent and written, and none is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from botocore.exceptions import BotoCoreError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from clouds import Cloud, eventually, running_cloud
from skysail.agent import ledger as ledgers
from skysail.agent.app import application
from skysail.agent.keeper import Keeper
from skysail.agent.ledger import Ledger, MissingParts
from skysail.agent.samples import Sampler
from skysail.contract.document import Delivery, HostDocument, RecordSet, Zone
from skysail.contract.report import Inventory
from skysail.hosts.client import AgentClient
from skysail.hosts.parts import PART_SETS, Parting
from skysail.hosts.zones import ZoneCompiler
from skysail.inspect.verify import verify
from skysail.resources import accounts, domains
from skysail.resources.records import Entry
from skysail.store.database import Database
from skysail.store.schema import hosts
from skysail.store.vault import Vault
from test_keeper import Host


def zone(entries: int, name: str = "large.test.", **more: int) -> Zone:
    """With so many entries, of which ``n<number>=last`` gives one another address."""
    return Zone(id=name, name=name, role="serve", serial=1, primary="ns1.test.", hostmaster="h.test.", record_sets=tuple(
        RecordSet(name=f"n{number}.{name}", type="A", ttl=60, records=(f"192.0.2.{more.get(f'n{number}', 1)}",))
        for number in range(entries)))


def document(generation: int, *zones: Zone) -> HostDocument:
    return HostDocument(host="h", generation=generation, zones=zones)


def by_name(held: Zone) -> dict[str, list[RecordSet]]:
    sets = held.record_sets[1:]  # behind its name servers
    return {name: [one for one in sets if one.name == name] for name in {one.name for one in sets}}


def sent(delivery: Delivery) -> dict[str, bytes]:
    return {digest: bytes(part) for digest, part in delivery.parts.items()}


def content(held: HostDocument | None) -> dict[str, list[RecordSet]]:
    assert held is not None and held.outlines == ()
    return {one.name: sorted(one.record_sets, key=str) for one in held.zones}


@pytest.mark.parametrize("entries", [0, 1, PART_SETS - 1, PART_SETS, 2 * PART_SETS, 1000])
def test_a_zone_arrives_as_it_was_sent_and_is_there_after_a_restart(tmp_path: Path, entries: int) -> None:
    wanted = document(1, zone(entries), zone(3, "small.test."))
    delivery = msgspec.json.decode(msgspec.json.encode(Parting().delivery(wanted)), type=Delivery)
    taken = Ledger(tmp_path / "document.json").write(delivery.document, sent(delivery))
    assert content(taken) == content(wanted) == content(Ledger(tmp_path / "document.json").read())


def test_a_change_in_a_large_zone_sends_and_writes_little(tmp_path: Path) -> None:
    parting, ledger = Parting(), Ledger(tmp_path / "document.json")
    first = parting.delivery(document(1, zone(9500), zone(9500, "other.test.")))
    kept = ledger.write(first.document, sent(first))
    second = parting.delivery(document(2, zone(9500, n77=2), zone(9500, "other.test.")), parting.digests())
    assert len(second.parts) == 1
    assert len(msgspec.json.encode(second)) < len(msgspec.json.encode(first)) / 50
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "zones").iterdir()}
    again = ledger.write(second.document, sent(second))
    (pack,) = [path for path in (tmp_path / "zones").iterdir() if path not in before]
    assert pack.stat().st_size < 20_000
    assert again.zones[0] != kept.zones[0] and again.zones[1] is kept.zones[1], "who holds it need not look through it"
    assert content(Ledger(tmp_path / "document.json").read()) == content(document(2, zone(9500, n77=2),
                                                                                  zone(9500, "other.test.")))


def test_a_document_whose_parts_are_missing_changes_nothing(tmp_path: Path) -> None:
    parting, ledger = Parting(), Ledger(tmp_path / "document.json")
    first = parting.delivery(document(1, zone(500)))
    ledger.write(first.document, sent(first))
    second = parting.delivery(document(2, zone(500, n1=2)), parting.digests())
    with pytest.raises(MissingParts) as missing:
        ledger.write(second.document)
    assert set(missing.value.digests) == second.parts.keys()
    with pytest.raises(ValueError, match="digest"):
        ledger.write(second.document, {digest: part + b" " for digest, part in sent(second).items()})
    assert content(ledger.read()) == content(document(1, zone(500)))


def test_an_end_between_the_parts_and_the_document_leaves_the_former_one(tmp_path: Path) -> None:
    parting, ledger = Parting(), Ledger(tmp_path / "document.json")
    first = parting.delivery(document(1, zone(500)))
    ledger.write(first.document, sent(first))
    second = parting.delivery(document(2, zone(500, n1=2)), parting.digests())
    (tmp_path / "document.json.new").mkdir()  # in the way of the document, not of the parts
    with pytest.raises(OSError, match=r"document\.json\.new"):
        ledger.write(second.document, sent(second))
    assert content(Ledger(tmp_path / "document.json").read()) == content(document(1, zone(500)))
    (tmp_path / "document.json.new").rmdir()
    # Whoever starts over it knows the part: it need not be sent again.
    assert content(Ledger(tmp_path / "document.json").write(second.document)) == content(document(2, zone(500, n1=2)))


def test_a_zone_of_which_a_part_is_damaged_is_left_out_and_sent_again(tmp_path: Path) -> None:
    parting = Parting()
    first = parting.delivery(document(1, zone(500), zone(3, "small.test.")))
    Ledger(tmp_path / "document.json").write(first.document, sent(first))
    (pack,) = (tmp_path / "zones").iterdir()
    pack.write_bytes(pack.read_bytes().replace(b"192.0.2.1", b"192.0.2.7", 1))
    restarted = Ledger(tmp_path / "document.json")
    assert content(restarted.read()) == content(document(1, zone(3, "small.test.")))
    with pytest.raises(MissingParts) as missing:
        restarted.again(first.document)
    again = parting.delivery(document(1, zone(500), zone(3, "small.test.")), parting.digests() - {*missing.value.digests})
    assert content(restarted.again(again.document, sent(again))) == content(document(1, zone(500), zone(3, "small.test.")))
    assert content(Ledger(tmp_path / "document.json").read()).keys() == {"large.test.", "small.test."}
    later = msgspec.structs.replace(first.document, generation=2)
    restarted.write(later)
    assert pack not in (tmp_path / "zones").iterdir(), "it is of no use any more"
    assert content(Ledger(tmp_path / "document.json").read()).keys() == {"large.test.", "small.test."}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
@example(2660)  # begins with zones too small for a pack
def test_packs_stay_few_and_lose_nothing(seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.json"
        parting, ledger = Parting(), Ledger(path)
        held: frozenset[str] = frozenset()
        sizes, changed = [chance.randrange(400), chance.randrange(400)], [dict[str, int](), dict[str, int]()]
        for generation in range(1, ledgers.MAX_PACKS * 2 + 5):
            which = chance.randrange(2)
            sizes[which] = max(0, sizes[which] + chance.choice((0, 0, 1, -1, 70, -70)))
            changed[which][f"n{chance.randrange(400)}"] = chance.randrange(250)
            wanted = document(generation, *(zone(size, f"z{number}.test.", **changed[number])
                                            for number, size in enumerate(sizes)))
            delivery = parting.delivery(wanted, held)
            if not generation % 40:
                ledger = Ledger(path)
            assert content(ledger.write(delivery.document, sent(delivery))) == content(wanted)
            held = parting.digests()
            assert len([*path.parent.glob("zones/*")]) <= ledgers.MAX_PACKS + 1
        assert content(Ledger(path).read()) == content(wanted)


def test_an_agent_that_lost_its_ledger_is_sent_what_it_has_not(tmp_path: Path) -> None:
    """Over the real application of the agent: the controller believes that the parts are there."""
    def agent(folder: str) -> tuple[Keeper, httpx.ASGITransport]:
        (tmp_path / folder).mkdir()
        keeper = Host(tmp_path / folder).keeper
        unasked: Any = Sampler
        return keeper, httpx.ASGITransport(application(keeper, unasked, tmp_path / folder, unasked))

    async def scenario() -> None:
        first, transport = agent("first")
        await first.start()
        client = AgentClient("unix:", transport=transport)
        assert await client.put(document(1, zone(500)))
        second, transport = agent("second")
        await second.start()
        client._transport = transport
        assert await client.put(document(2, zone(500, n3=9)))
        assert content(second.document()) == content(document(2, zone(500, n3=9)))
        assert not await client.put(document(1, zone(500))), "an older one"
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as other:
            refused = await other.put("/document", content=b'{"document": {"host": "h", "generation": 9, "version": 1}}')
        assert refused.status_code == 400 and "contract" in refused.text
    asyncio.run(scenario())


def test_a_zone_that_was_changed_bit_by_bit_is_the_zone_that_is_made_at_once(tmp_path: Path) -> None:
    database, vault, compiler = Database(tmp_path / "skysail.sqlite"), Vault(bytes(32)), ZoneCompiler()
    database.migrate()
    chance = random.Random(1)
    with database.transaction() as connection:
        account = accounts.create_account(connection, "first", 0.0)
        connection.execute(insert(hosts).values(id="one", address="x"))
        row = domains.create(connection, account, "a.example", ["ns1.example.net"], 100.0)
        former: dict[str, list[RecordSet]] = {}
        for step in range(60):
            domains.replace_entries(connection, row, [
                Entry(f"n{number}.a.example", kind, target, target, ttl=60) for number in range(12)
                for kind, target in (("A", "192.0.2.1"), ("A", "192.0.2.2"), ("TXT", '"x"')) if chance.random() < 0.6],
                200.0 + step)
            row = connection.execute(domains._FIND, {"account": account, "name": "a.example"}).mappings().one()
            made = [*compiler.zones(connection, vault)]
            assert made == [*ZoneCompiler().zones(connection, vault)]
            now = by_name(made[0])
            assert all(one is other for name, sets in now.items() if former.get(name) == sets
                       for one, other in zip(sets, former[name], strict=True)), "what stayed is not made again"
            former = now
    database.close()


@pytest.mark.parametrize("killed", ["controller", "agent"])
def test_kill_in_the_middle_of_many_changes_loses_none_that_was_answered(killed: str) -> None:
    """Four clients at once, in a zone large enough for parts; then the name server has what the API says, and all of it."""
    answered: list[str] = []
    name = "many.example.com"

    def change(client: Any, worker: int) -> None:
        number = 0
        with contextlib.suppress(BotoCoreError):  # the controller is away: nothing was answered
            while not over.is_set():
                owner = f"n{worker}-{number}.{name}"
                client.create_domain_entry(domainName=name, domainEntry={"name": owner, "type": "A", "target": "192.0.2.1"})
                answered.append(owner)
                number += 1

    def served(cloud: Cloud) -> set[str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket)), timeout=30) as agent:
            there = msgspec.json.decode(agent.get("http://agent/inventory").content, type=Inventory)
        return {one.name.removesuffix(".") for held in there.zones for one in held.record_sets if one.type == "A"}

    over = threading.Event()
    with running_cloud() as cloud:
        client = cloud.client()
        client.create_domain(domainName=name)
        with ThreadPoolExecutor(4) as pool:
            working = [pool.submit(change, cloud.client(), worker) for worker in range(4)]
            eventually(lambda: len(answered) > 3 * PART_SETS, 120, "changes are answered")
            cloud.kill(killed)
            if killed == "agent":
                cloud.start("agent")
                count = len(answered)
                eventually(lambda: len(answered) > count + PART_SETS, 120, "changes go on")
            over.set()
            for one in working:
                one.result()
        if killed == "controller":
            cloud.start("controller")
        entries = {one["name"] for one in cloud.client().get_domain(domainName=name)["domain"]["domainEntries"]} - {name}
        assert {*answered} <= entries and len(entries) <= len(answered) + 4, "at most one of each client was not answered"
        eventually(lambda: served(cloud) == entries, 60, "the name server has what the API says")
        assert verify(cloud.config) == []
        # The same from the disk alone.
        cloud.kill("controller")
        cloud.kill("agent")
        cloud.start("agent")
        eventually(lambda: served(cloud) == entries, 60, "the ledger has it")
