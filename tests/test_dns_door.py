"""The DNS door: what every engine does alike, and what only a real PowerDNS shows: to dig, to strangers, after kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.query
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clouds import eventually
from name_servers import NameServer, free_port
from skysail.agent.zones import ZoneKeeper
from skysail.contract.document import SOA_TIMES, RecordSet, Zone
from skysail.dns import NameServerAway, Zones, listening
from skysail.dns.powerdns import PowerDns
from skysail.dns.sim import SimZones
from skysail.kit.config import Config
from skysail.kit.errors import ApiError
from skysail.resources import records, zone_keys


@pytest.fixture(scope="module")
def power() -> Iterator[NameServer]:
    if os.geteuid() != 0:
        pytest.skip("PowerDNS gets a user of its own, which needs root")
    folder = Path(tempfile.mkdtemp(prefix="skydns"))
    folder.chmod(0o755)
    made = NameServer(Config(data=str(folder), dns_port=free_port(), dns_api_port=free_port()))
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["sim", pytest.param("powerdns", marks=pytest.mark.real)])
def engine(request: pytest.FixtureRequest) -> Callable[[], Zones]:
    """What makes the engine: anew in each event loop, over the same server."""
    if request.param == "powerdns":
        power: NameServer = request.getfixturevalue("power")
        return power.zones
    one = SimZones()
    return lambda: one


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def zone(name: str, *sets: RecordSet, serial: int = 100, key: str = "") -> Zone:
    servers = RecordSet(name=name, type="NS", ttl=3600, records=("ns1.skysail.internal.", "ns2.skysail.internal."))
    return Zone(id="d-" + name, name=name, role="serve", serial=serial, primary="ns1.skysail.internal.",
                hostmaster=f"hostmaster.{name}", record_sets=(servers, *sets), signing_key=key)


def a(name: str, *addresses: str) -> RecordSet:
    return RecordSet(name=name, type="A", ttl=60, records=tuple(sorted(addresses)))


def test_a_zone_is_held_as_it_was_given_and_changes_raise_its_serial(engine: Callable[[], Zones]) -> None:
    async def look() -> None:
        zones = engine()
        first = await zones.apply(zone("door.test.", a("www.door.test.", "192.0.2.2", "192.0.2.1")))
        assert first.serial == 100
        again = await zones.apply(zone("door.test.", a("www.door.test.", "192.0.2.1", "192.0.2.2")))
        assert again.serial == 100, "nothing changed"
        moved = await zones.apply(zone("door.test.", a("www.door.test.", "192.0.2.9")))
        assert moved.serial == 101, "the records changed under the same serial, as an alias does"
        told = await zones.apply(zone("door.test.", a("www.door.test.", "192.0.2.9"), serial=200))
        assert told.serial == 200
        fewer = await zones.apply(zone("door.test.", serial=201))
        (held,) = [one for one in await zones.observe() if one.name == "door.test."]
        assert held == fewer and [one.type for one in held.record_sets] == ["NS"]
        assert (await zones.serials())["door.test."] == 201
        await zones.remove("door.test.")
        await zones.remove("door.test.")
        assert "door.test." not in await zones.serials()
        assert await zones.check() == []
    run(look())


def test_a_zone_is_signed_with_the_key_that_it_is_given_and_only_with_it(engine: Callable[[], Zones]) -> None:
    (first, one), (second, other) = zone_keys.make("signed.test"), zone_keys.make("signed.test")

    async def look() -> None:
        zones = engine()
        sim = isinstance(zones, SimZones)
        assert (await zones.apply(zone("signed.test."))).ds == ()
        signed = await zones.apply(zone("signed.test.", key=first))
        assert sim or one in signed.ds
        assert (await zones.apply(zone("signed.test.", key=first))).ds == signed.ds
        changed = await zones.apply(zone("signed.test.", key=second))
        assert sim or (other in changed.ds and one not in changed.ds)
        (held,) = [found for found in await zones.observe() if found.name == "signed.test."]
        assert held.ds == changed.ds
        assert (await zones.apply(zone("signed.test."))).ds == ()
        (held,) = [found for found in await zones.observe() if found.name == "signed.test."]
        assert held.ds == ()
        await zones.remove("signed.test.")
    run(look())


ENTRIES = [
    ("A", "host", "192.0.2.7"), ("AAAA", "host", "2001:DB8::1"), ("AAAA", "mapped", "::ffff:192.0.2.1"),
    ("AAAA", "compatible", "::192.0.2.1"), ("AAAA", "one-zero", "1:0:2:3:4:5:6:7"), ("AAAA", "nothing", "::"),
    ("CNAME", "www", "Host.Door.Test"), ("CNAME", "*.any", "host.door.test."),
    ("CNAME", "_acme-challenge", "_x._y.Validation.example"), ("MX", "@", "10 Mail.door.test"), ("MX", "nomail", "0 ."),
    ("NS", "child", "ns1.Example.net"), ("SRV", "_sip._tcp", "1 10 5060 sip.door.test"), ("SRV", "_no._udp", "0 0 0 ."),
    ("TXT", "@", '"v=spf1 a mx -all"'), ("TXT", "long", f'"{"x" * 255}" "{"y" * 255}"'), ("TXT", "empty", '""'),
    ("TXT", "hard", r'"a;b \"quoted\" back\\slash \007 \255" "é $ @ ( )"'), ("TXT", "_dmarc", '"v=DMARC1; p=none"'),
]


@pytest.mark.real
def test_every_kind_of_entry_reaches_the_server_unchanged_and_dig_sees_it(power: NameServer) -> None:
    entries = [records.read("door.test", "door.test" if name == "@" else f"{name}.door.test", kind, target)
               for kind, name, target in ENTRIES]
    sets = [RecordSet(name=entry.name + ".", type=entry.type, ttl=entry.ttl, records=(entry.record,)) for entry in entries]
    wanted = zone("door.test.", *sets)
    run(power.zones().apply(wanted))
    (held,) = [one for one in run(power.zones().observe()) if one.name == "door.test."]
    assert {(one.name, one.type): one for one in held.record_sets} == {
        (one.name, one.type): one for one in wanted.record_sets}
    assert run(power.zones().apply(wanted)).serial == 100, "what PowerDNS gives back is what it was given"
    assert power.dig("host.door.test", "AAAA") == "2001:db8::1\n"
    assert power.dig("HOST.door.test", "A") == "192.0.2.7\n"
    assert power.dig("deep.any.door.test", "A") == "host.door.test.\n192.0.2.7\n"
    assert power.dig("door.test", "MX") == "10 mail.door.test.\n"
    assert power.dig("_sip._tcp.door.test", "SRV") == "1 10 5060 sip.door.test.\n"
    assert power.dig("door.test", "TXT") == '"v=spf1 a mx -all"\n'
    assert "status: NXDOMAIN" in power.dig("none.door.test", "A", "+noall", "+comments")
    run(power.zones().remove("door.test."))


@pytest.mark.real
@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=60), min_size=1, max_size=3),
       st.ip_addresses(v=6), st.text("abz09_-.*", min_size=1, max_size=20))
def test_what_is_taken_from_a_customer_is_taken_by_the_server(power: NameServer, texts: list[str], address: Any,
                                                             host: str) -> None:
    made = []
    for name, kind, target in ((f"{host}.any.test", "AAAA", str(address)), ("t.any.test", "CNAME", host), (
            "u.any.test", "TXT", " ".join('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts))):
        with contextlib.suppress(ApiError):
            made.append(records.read("any.test", name, kind, target))
    wanted = zone("any.test.", *(RecordSet(name=one.name + ".", type=one.type, ttl=60, records=(one.record,))
                                 for one in made))
    run(power.zones().apply(wanted))
    (held,) = [one for one in run(power.zones().observe()) if one.name == "any.test."]
    assert sorted(held.record_sets, key=str) == sorted(wanted.record_sets, key=str)


@pytest.mark.real
def test_a_signed_zone_is_signed_to_the_last_answer(power: NameServer) -> None:
    private, _ = zone_keys.make("safe.test")
    run(power.zones().apply(zone("safe.test.", a("www.safe.test.", "192.0.2.1"), key=private)))
    run(power.zones().apply(zone("safe.test.", a("www.safe.test.", "192.0.2.1"), a("new.safe.test.", "192.0.2.2"),
                                 key=private, serial=101)))
    # delv validates by itself, from the key as its anchor.
    flags, protocol, algorithm, *key = power.dig("safe.test", "DNSKEY").split()
    anchors = Path(power.config.data) / "anchors"
    anchors.write_text(f'trust-anchors {{ "safe.test." static-key {flags} {protocol} {algorithm} "{"".join(key)}"; }};\n')
    for name, words in (("www", "192.0.2.1"), ("new", "192.0.2.2"), ("none", "negative response, fully validated")):
        said = subprocess.run(["delv", "@127.0.0.1", "-p", str(power.config.dns_port), "-a", str(anchors), "+root=safe.test",
                               f"{name}.safe.test", "A"], capture_output=True, text=True, check=False)
        assert "fully validated" in said.stdout + said.stderr, (name, said)
        assert words in said.stdout + said.stderr, (name, said)
    run(power.zones().remove("safe.test."))


@pytest.mark.real
def test_a_zone_that_was_changed_before_it_was_signed_is_signed_to_the_last_answer(power: NameServer) -> None:
    """Changes of unsigned zones leave out what only signed ones need: it has to be there as soon as the zone is signed, also
    the second time."""
    names = ["www.late.test.", "x.deep.late.test."]

    def sets() -> list[RecordSet]:
        return [a(name, "192.0.2.1") for name in names]

    def delv(name: str) -> str:
        flags, protocol, algorithm, *key = power.dig("late.test", "DNSKEY").split()
        anchors = Path(power.config.data) / "anchors"
        anchors.write_text(f'trust-anchors {{ "late.test." static-key {flags} {protocol} {algorithm} "{"".join(key)}"; }};\n')
        done = subprocess.run(["delv", "@127.0.0.1", "-p", str(power.config.dns_port), "-a", str(anchors), "+root=late.test",
                               name, "A"], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    for serial in (100, 200):
        for number in range(3):
            names.append(f"n{serial + number}.late.test.")
            run(power.zones().apply(zone("late.test.", *sets(), serial=serial + number)))
        private, _ = zone_keys.make("late.test")
        run(power.zones().apply(zone("late.test.", *sets(), serial=serial + 10, key=private)))
        for name in names:
            assert "192.0.2.1" in delv(name) and "fully validated" in delv(name), (name, delv(name))
        for absent in ("none.late.test.", "deep.late.test.", "y.deep.late.test."):
            assert "negative response, fully validated" in delv(absent), (absent, delv(absent))
        run(power.zones().apply(zone("late.test.", *sets(), serial=serial + 20)))
    run(power.zones().remove("late.test."))


PLACES = ("a", "b.a", "c.b.a", "d", "*.d", "e.f", "a.e.f")


@pytest.mark.real
@settings(max_examples=int(os.environ.get("SKYSAIL_ZONE_WALKS", "12")), deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(PLACES), st.sampled_from(("A", "NS"))), min_size=2, max_size=5))
def test_a_zone_that_was_changed_answers_as_one_that_was_made_so(power: NameServer, steps: list[dict[str, str]]) -> None:
    """Empty names between others, names below a delegation: PowerDNS is not told to look for them with every change."""
    def held(apex: str, step: dict[str, str], serial: int) -> Zone:
        return zone(apex, *(RecordSet(name=f"{place}.{apex}", type=kind, ttl=60, records=(
            "192.0.2.1" if kind == "A" else "ns.other.test.",)) for place, kind in sorted(step.items())), serial=serial)

    def answers(apex: str) -> dict[str, tuple[int, str]]:
        found = {}
        for place in (*PLACES, "f", "x", "x.a", "x.d", "x.f", "y.x.e.f"):
            said = dns.query.udp(dns.message.make_query(f"{place}.{apex}", "A"), "127.0.0.1", 5, power.config.dns_port)
            sections = [sorted(f"{one.name.to_text()} {one.rdtype}" for one in section)
                        for section in (said.answer, said.authority)]
            found[place] = int(said.rcode()), f"{sections} {said.flags & dns.flags.AA}".replace(apex, "zone.")
        return found

    async def walk() -> None:
        zones = power.zones()
        try:
            for number, step in enumerate(steps):
                await zones.apply(held("walk.test.", step, 100 + number), believing=True)
                await zones.remove("made.test.")
                await zones.apply(held("made.test.", step, 100 + number))
                assert answers("walk.test.") == answers("made.test."), steps[:number + 1]
        finally:
            for name in ("walk.test.", "made.test."):
                await zones.remove(name)
    run(walk())


@pytest.mark.parametrize("asked", [listening.listeners, listening.diagnosed, listening.tabled])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")])
def test_who_listens_is_known(family: socket.AddressFamily, address: str, asked: Callable[[int], set[int]]) -> None:
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.bind((address, 0))
        port = listener.getsockname()[1]
        assert asked(port) == set(), "bound, and not listening"
        listener.listen()
        client.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        assert asked(port) == {os.geteuid()}
        assert asked(client.getsockname()[1]) == set(), "connected, and not listening"
    assert asked(port) == set()


@pytest.mark.real
def test_strangers_get_nothing(power: NameServer) -> None:
    run(power.zones().apply(zone("closed.test.", a("secret.closed.test.", "192.0.2.1"))))
    assert "Transfer failed" in power.dig("closed.test", "AXFR", "+noall", "+answer", "+comments")
    assert "status: REFUSED" in power.dig("www.debian.org", "A", "+noall", "+comments")
    assert "PowerDNS" not in power.dig("version.bind", "TXT", "-c", "CH", "+noall", "+answer")
    api = f"http://127.0.0.1:{power.config.dns_api_port}/api/v1/servers/localhost/zones"
    assert httpx.get(api).status_code == 401
    assert httpx.get(api, headers={"X-API-Key": "wrong"}).status_code == 401
    assert power.process is not None
    status = Path(f"/proc/{power.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] != "0" and int(fields["CapEff"], 16) == 0 and int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    key = power.config.dns_key_file.read_text()
    assert key not in Path(f"/proc/{power.process.pid}/cmdline").read_text()
    assert power.config.dns_key_file.stat().st_mode & 0o777 == 0o600
    for path in ("pdns.conf", "database/zones.sqlite"):
        assert (power.config.dns_dir / path).stat().st_mode & 0o077 == 0, path
    run(power.zones().remove("closed.test."))


@pytest.mark.real
def test_a_zone_of_which_only_the_beginning_is_there_is_made_whole(power: NameServer) -> None:
    # What is left of a creation that ended between the zone's row and its records.
    httpx.post(f"http://127.0.0.1:{power.config.dns_api_port}/api/v1/servers/localhost/zones", timeout=30,
               headers={"X-API-Key": power.config.dns_key_file.read_text()},
               json={"name": "half.test.", "kind": "Native", "nameservers": [], "nsec3param": "1 0 0 -"})
    assert run(power.zones().serials())["half.test."] == 0
    whole = zone("half.test.", a("www.half.test.", "192.0.2.1"))
    run(power.zones().apply(whole))
    assert power.dig("www.half.test", "A") == "192.0.2.1\n"
    assert run(power.zones().apply(whole)).serial == 100
    run(power.zones().remove("half.test."))


@pytest.mark.real
def test_a_zone_with_the_serial_that_it_was_left_with_is_believed_when_asked_to(power: NameServer) -> None:
    def stranger(address: str, serial: int) -> None:
        soa = f"ns1.skysail.internal. hostmaster.believed.test. {serial} {SOA_TIMES}"
        httpx.patch(f"http://127.0.0.1:{power.config.dns_api_port}/api/v1/servers/localhost/zones/believed.test.", timeout=30,
                    headers={"X-API-Key": power.config.dns_key_file.read_text()}, json={"rrsets": [
                        {"name": name, "type": kind, "ttl": 60, "changetype": "REPLACE", "records": [
                            {"content": content, "disabled": False}]} for name, kind, content in (
                            ("www.believed.test.", "A", address), ("believed.test.", "SOA", soa))]}).raise_for_status()

    async def look() -> None:
        zones, mine = power.zones(), a("www.believed.test.", "192.0.2.1")
        for believing in (True, False, True):  # the first time there is nothing to believe
            assert (await zones.apply(zone("believed.test.", mine), believing)).serial == 100
        stranger("198.51.100.1", 100)
        more = zone("believed.test.", mine, a("more.believed.test.", "192.0.2.2"), serial=101)
        await zones.apply(more, True)
        assert power.dig("more.believed.test", "A") == "192.0.2.2\n"
        assert power.dig("www.believed.test", "A") == "198.51.100.1\n", "believed"
        await zones.apply(more)
        assert power.dig("www.believed.test", "A") == "192.0.2.1\n", "it was read"
        stranger("198.51.100.1", 500)
        assert (await zones.apply(more, True)).serial == 501
        assert power.dig("www.believed.test", "A") == "192.0.2.1\n", "another serial is not believed"
        await zones.apply(zone("believed.test.", mine, serial=600), True)
        assert power.dig("more.believed.test", "A") == ""
        await zones.remove("believed.test.")
        await zones.apply(zone("believed.test.", mine), True)
        assert power.dig("www.believed.test", "A") == "192.0.2.1\n"
        await zones.remove("believed.test.")
    run(look())


@pytest.mark.real
def test_kill_in_the_middle_leaves_the_zone_before_or_after(power: NameServer) -> None:
    """Every change moves forty names to the same number: an answer that mixes two numbers is a zone half-written."""
    names = [f"n{number}.whole.test." for number in range(40)]

    def numbered(number: int) -> Zone:
        return zone("whole.test.", *(a(name, f"10.0.{number // 250}.{number % 250 + 1}") for name in names), serial=number)

    keeper = ZoneKeeper(power.zones(), _nothing)
    stop = threading.Event()

    async def write() -> None:
        task = asyncio.create_task(keeper.run())
        number = 1000
        while not stop.is_set():
            number += 1
            keeper.take([numbered(number)])
            await asyncio.sleep(0.01)
        keeper.take([numbered(5000)])
        while [one.state for one in keeper.reports()] != ["served"]:
            await asyncio.sleep(0.05)
        task.cancel()

    def seen() -> set[tuple[str, ...]]:
        (held,) = [one for one in run(power.zones().observe()) if one.name == "whole.test."]
        sets = [one.records for one in held.record_sets if one.type == "A"]
        assert len(sets) == len(names)
        return set(sets)

    writer = threading.Thread(target=lambda: run(write()))
    writer.start()
    try:
        eventually(lambda: "whole.test." in run(power.zones().serials()), 30)
        for pause in (0.31, 0.07, 0.53, 0.19, 0.41):
            time.sleep(pause)
            power.kill()
            power.start()
            assert len(seen()) == 1
    finally:
        stop.set()
        writer.join(60)
    assert seen() == {("10.0.20.1",)}
    assert power.dig("n7.whole.test", "A") == "10.0.20.1\n"
    run(power.zones().remove("whole.test."))


async def _nothing() -> None:
    """No one listens to this keeper's news."""


def test_a_keeper_heals_a_lost_zone_and_never_removes_what_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skysail.agent.zones.LOOK_SECONDS", 0.05)

    async def look() -> None:
        engine = SimZones()
        keeper = ZoneKeeper(engine, _nothing)
        task = asyncio.create_task(keeper.run())
        one, two = zone("one.test."), zone("two.test.")
        keeper.take([one, two])
        await _until(lambda: [report.state for report in keeper.reports()] == ["served", "served"])
        keeper.take([two])
        await engine.remove("two.test.")
        await _until_zone(engine, "two.test.")
        assert "one.test." in await engine.serials(), "missing from a document is not gone"
        keeper.take([Zone(id=one.id, name=one.name, role="gone", serial=101, primary="x.", hostmaster="x."), two])
        await _until(lambda: [report.state for report in keeper.reports() if report.name == one.name] == ["gone"])
        assert "one.test." not in await engine.serials()
        keeper.take([two])
        assert [report.name for report in keeper.reports()] == ["two.test."]
        keeper.take([zone("two.test.", a("www.two.test.", "192.0.2.1"))])
        keeper.take([two])
        await _until(lambda: [report.state for report in keeper.reports()] == ["served"])
        many = [zone(f"z{number}.test.") for number in range(120)]
        keeper.take(many)
        await _until(lambda: {report.state for report in keeper.reports()} == {"served"} and len(keeper.reports()) == 121)
        task.cancel()
    run(look())


def test_a_name_server_that_is_away_is_said_and_tried_again(tmp_path: Path) -> None:
    async def look() -> None:
        keeper = ZoneKeeper(PowerDns(free_port(), tmp_path / "api.key"), _nothing)
        task = asyncio.create_task(keeper.run())
        keeper.take([zone("away.test.")])
        await _until(lambda: [report.state for report in keeper.reports()] == ["failed"])
        assert "API key" in keeper.reports()[0].reason
        (tmp_path / "pdns.conf").touch()
        (tmp_path / "api.key").write_text("key")
        await _until(lambda: "nothing listens" in keeper.reports()[0].reason)
        assert await keeper.inventory() == ()
        task.cancel()
    run(look())


@pytest.mark.real
def test_the_key_is_not_said_to_a_stranger_who_has_the_port(tmp_path: Path) -> None:
    (tmp_path / "api.key").write_text("key")
    (tmp_path / "pdns.conf").touch()
    os.chown(tmp_path / "pdns.conf", 65_534, 65_534)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        stranger.setblocking(False)
        zones = PowerDns(stranger.getsockname()[1], tmp_path / "api.key")
        with pytest.raises(NameServerAway, match="another user"):
            run(zones.serials())
        with pytest.raises(BlockingIOError):
            stranger.accept()


async def _until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not seen():
            await asyncio.sleep(0.02)


async def _until_zone(engine: Zones, name: str) -> None:
    async with asyncio.timeout(30):
        while name not in await engine.serials():
            await asyncio.sleep(0.02)
