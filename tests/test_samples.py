"""Samples: counted once whatever dies, rolled up, kept for as long as Lightsail keeps them, in a log of bounded size."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, func, insert, select

import stores
from skysail.agent import samples as sampling
from skysail.agent.samples import SampleLog, Sampler
from skysail.agent.traffic import Traffic
from skysail.contract.document import Guest, Personality, Port, Volume
from skysail.contract.samples import GuestSample, Sample, SamplePage
from skysail.hosts.client import AgentClient
from skysail.hosts.collector import Collector
from skysail.hosts.intake import Intake, TakeIn
from skysail.hypervisor.sim import SimHypervisor
from skysail.kit.clock import HandClock
from skysail.metadata import Tokenless
from skysail.network.sim import SimFabric
from skysail.resources import metering
from skysail.store.database import Database
from skysail.store.leases import LeaseLost, alone
from skysail.store.schema import accounts, guests, hosts, instances, measurements, meters, sample_cursors, transfers

NOW = 1_800_000_000.0  # a full five minutes


def guest(role: Any = "run", starts: int = 1, **more: Any) -> Guest:
    return Guest(id="g-1", instance="one", role=role, starts=starts, reboots=0, vcpus=2, memory_mib=512,
                 volume=Volume(id="g-1", image="0" * 64, size_gib=20),
                 port=Port(id="g-1", mac="52:54:00:00:00:0a", network=1, private_ipv4="172.26.0.10",
                           public_ipv4="192.0.2.10"),
                 personality=Personality(hostname="one", user="admin", user_data="#load cpu=0.5 rx=1000 tx=100"), **more)


def store(folder: Path) -> Database:
    """A database with one instance and its guest."""
    database = stores.fresh(folder)
    database.migrate()
    with database.transaction() as connection:
        connection.execute(insert(accounts).values(id="1", name="a", created_at=0.0))
        connection.execute(insert(hosts).values(id="h", address=""))
        connection.execute(insert(instances).values(
            id="i-1", account_id="1", region="us-east-1", zone="a", name="one", blueprint_id="debian_12",
            blueprint_name="Debian", bundle_id="nano_3_0", username="admin", key_pair_name="k", state="running",
            created_at=0.0))
        connection.execute(insert(guests).values(
            id="g-1", instance_id="i-1", instance_name="one", account_id="1", host_id="h", role="run", vcpus=2,
            memory_mib=512, disk_gib=20, image="", mac="m", private_ipv4="p", public_ipv4="q", personality={}))
    return database


class House:
    """A host whose guest outlives its agent, and a controller; either may be killed between any two steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, HandClock(NOW)
        self.hypervisor = SimHypervisor(now=self.clock.now)
        self.fabric = SimFabric(self.hypervisor.flow)
        self.database = store(folder)
        self.tokenless = Tokenless(life="first")
        self.wanted = {"g-1": guest()}
        asyncio.run(self.fabric.apply([guest().port]))
        asyncio.run(self.hypervisor.ensure(guest()))
        self.start_agent()
        self.answer_lost = False

    def start_agent(self) -> None:
        log, traffic = SampleLog(self.folder / "samples.jsonl"), Traffic(self.folder / "traffic.json")
        self.sampler = Sampler(log, self.hypervisor, self.fabric, traffic, lambda: self.wanted, self.asked,
                               interval_seconds=60, throttles=True)

    async def asked(self) -> Tokenless:
        return self.tokenless

    def sample(self) -> None:
        self.clock.advance(60)
        asyncio.run(self.sampler.take(self.clock.now()))

    def sample_dies_before_its_line(self) -> None:
        self.clock.advance(60)
        flow = asyncio.run(self.fabric.observe())
        Traffic(self.folder / "traffic.json").take(flow)
        self.start_agent()

    def sample_dies_within_its_line(self) -> None:
        self.sample()
        path = self.folder / "samples.jsonl"
        path.write_bytes(path.read_bytes()[:-7])
        self.start_agent()

    def collect(self) -> None:
        asyncio.run(self.collector(metering.take_in).collect())

    def collector(self, take_in: TakeIn) -> Collector:
        return Collector("h", Client(self), Intake(self.database, take_in, 0.0), 1)

    def collect_dies_before_its_commit(self) -> None:
        def die(*_: Any) -> None:
            metering.take_in(*_)
            raise KeyboardInterrupt
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(self.collector(die).collect())

    def collect_twice_at_once(self) -> None:
        """Two controllers ask, and both take in what they were told."""
        async def collect() -> list[int]:
            first, second = (Intake(self.database, metering.take_in, 0.0) for _ in range(2))
            page = self.sampler.page(*await first.cursor("h"))
            return [await intake.take("h", page, alone) for intake in (first, second)] if page.samples else []
        assert asyncio.run(collect())[1:] in ([0], [])

    def counted(self) -> tuple[float, int, int]:
        with self.database.transaction(write=False) as connection:
            row = connection.execute(select(meters)).mappings().first()
            moved = connection.execute(select(func.sum(transfers.c.rx_bytes), func.sum(transfers.c.tx_bytes))).one()
        if row is None:
            return 0.0, 0, 0
        assert (row["rx_bytes"], row["tx_bytes"]) == tuple(moved)
        return row["cpu_seconds"], row["rx_bytes"], row["tx_bytes"]


class Client(AgentClient):
    """The agent in this process: what it answers is what the wire would carry."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def samples(self, ring: str, after: int) -> Any:
        page = self._house.sampler.page(ring, after)
        return msgspec.json.decode(msgspec.json.encode(page), type=type(page))


ACTS = ("sample", "sample_dies_before_its_line", "sample_dies_within_its_line", "start_agent", "collect",
        "collect_dies_before_its_commit", "collect_twice_at_once")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(ACTS), max_size=14))
def test_nothing_is_lost_and_nothing_counted_twice(acts: list[str]) -> None:
    """Whatever dies in whatever order: after one more sample and its collection all that the guest used is counted, once."""
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        for act in (*acts, "sample", "collect"):
            getattr(house, act)()
        spent = house.clock.now() - NOW
        cpu, rx, tx = house.counted()
        assert cpu == pytest.approx(0.5 * spent, abs=1e-3) and (rx, tx) == (1000 * spent, 100 * spent)
        house.database.close()


def test_a_guest_bursts_until_its_credits_are_spent_and_earns_them_back(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.wanted = {"g-1": guest(baseline_percent=5.0)}  # a tenth of a processor of its two
    life = house.hypervisor._lives["g-1"]
    life.cpu = 2.0

    def burnt() -> float:
        """Processors that it used in the next minute."""
        house.sample()
        return newest().cpu_seconds / 60

    def newest() -> GuestSample:
        log = house.sampler._log
        return log.page(log.ring, log.last - 1).samples[0].guests[0]

    def balance() -> float:
        return newest().balance_seconds

    minutes = 0
    while burnt() > 1.9:
        minutes += 1
        assert minutes < 60
    # 30 minutes of each of its two processors, spent at 1.9 of them.
    assert minutes == pytest.approx(3600 / 1.9 / 60, abs=1) and balance() == 0
    for _ in range(5):
        assert burnt() == pytest.approx(0.1, abs=0.01)
    # An agent that is killed neither forgets the debt nor lets it burst; one that finds it unbound binds it again.
    house.start_agent()
    life.processors = float("inf")
    house.sample()
    assert burnt() == pytest.approx(0.1, abs=0.01)
    # The operator who does not want that any more has it undone.
    house.sampler._throttles = False
    house.sample()
    assert burnt() == pytest.approx(2.0)
    house.sampler._throttles = True
    # It rests: a tenth of a processor second each second, kept for 24 hours at most.
    life.cpu = 0.0
    held = []
    for _ in range(26 * 60):
        house.sample()
        held.append(balance())
    assert held == sorted(held) and held[0] == 0 and held[-1] == 0.1 * 86400
    life.cpu = 2.0
    house.sample()
    assert burnt() == pytest.approx(2.0)
    house.database.close()


def test_requests_without_a_token_are_counted_once(tmp_path: Path) -> None:
    """Over samples, over an agent that is killed, and over a process that answers and begins to count anew."""
    house = House(tmp_path)
    for life, count in (("first", 3), ("first", 3), ("first", 10), ("second", 0), ("second", 4)):
        house.tokenless = Tokenless(life=life, counts={"g-1": count, "g-stranger": 99})
        house.sample()
        house.start_agent()
        house.sample()
    house.collect()
    with house.database.transaction(write=False) as connection:
        fives = metering.read(connection, "i-1", "MetadataNoToken", 300, NOW, NOW + 3600)
    assert sum(stats.sum for _, stats in fives) == 14
    assert sum(stats.count for _, stats in fives) == 10, "none is a count too"
    house.database.close()


def test_conditions(tmp_path: Path) -> None:
    house = House(tmp_path)

    def told() -> str:
        house.sample()
        log = house.sampler._log
        found = [one.condition for one in log.page(log.ring, log.last - 1).samples[0].guests]
        return found[0] if found else "off"

    assert told() == "up"
    house.hypervisor.crash("g-1")
    # What it moved since its last sample is counted; it stays down until it runs again, also for another agent.
    assert told() == told() == "down"
    house.start_agent()
    assert told() == "down"
    house.wanted = {"g-1": guest(role="stop")}
    assert told() == "off"
    house.wanted = {"g-1": guest(starts=2)}
    assert told() == "off"  # on its way
    asyncio.run(house.hypervisor.ensure(guest(starts=2)))
    assert told() == "up"

    # An agent that has answered and does not any more; one that never did is none.
    plain = house.hypervisor.usage
    said: list[bool | None] = []

    async def usage() -> Any:
        return {name: msgspec.structs.replace(one, answers=said[-1], process=str(len(said) > 3))
                for name, one in (await plain()).items()}
    house.hypervisor.usage = usage  # type: ignore[method-assign]
    seen = []
    for answer in (False, True, False, False, True, False):
        said.append(answer)
        if len(said) == 3:
            house.start_agent()
        seen.append(told())
    assert seen == ["up", "up", "silent", "up", "up", "silent"]
    house.database.close()


def test_the_log_is_bounded_and_its_numbering_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SEGMENT_BYTES", 3000)
    log = SampleLog(tmp_path / "samples.jsonl")
    for number in range(1, 201):
        log.append(Sample(sequence=number, at=float(number), guests=(GuestSample(id="g-1", condition="up"),)), {})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 3500
    again = SampleLog(tmp_path / "samples.jsonl")
    assert again.last == 200 and again.ring == log.ring
    held = [sample.sequence for sample in again.page(log.ring, 0).samples]
    assert held == list(range(held[0], 201)) == [sample.sequence for sample in log.page(log.ring, 0).samples]
    assert [sample.sequence for sample in again.page(log.ring, 198).samples] == [199, 200]
    assert again.page("another", 198).samples == again.page(log.ring, 0).samples
    assert not again.page(log.ring, 200).samples and not again.page(log.ring, 10**9).samples


def test_a_log_on_a_full_disk_takes_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SampleLog(tmp_path / "samples.jsonl")
    log.append(Sample(sequence=1, at=1.0), {})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context, pytest.raises(OSError):
        context.setattr(sampling.os, "fsync", full)
        log.append(Sample(sequence=2, at=2.0), {})
    assert log.last == 1
    log.append(Sample(sequence=2, at=3.0), {})
    again = SampleLog(tmp_path / "samples.jsonl").page("", 0)
    assert [(one.sequence, one.at) for one in again.samples] == [(1, 1.0), (2, 3.0)]


def test_a_sample_is_rolled_up_into_its_minute_and_its_five(tmp_path: Path) -> None:
    database = store(tmp_path)
    with database.transaction() as connection:
        for number, cpu in enumerate((12.0, 60.0, 120.0, 0.0, 30.0, 60.0)):
            metering.take_in(connection, {"h": [Sample(sequence=number + 1, at=NOW + 60 * number, guests=(GuestSample(
                id="g-1", condition="up", seconds=60, vcpus=2, cpu_seconds=cpu, rx_bytes=10),))]})
        minutes = metering.read(connection, "i-1", "CPUUtilization", 60, NOW, NOW + 3600)
        fives = metering.read(connection, "i-1", "CPUUtilization", 300, NOW, NOW + 3600)
        network = metering.read(connection, "i-1", "NetworkIn", 300, NOW, NOW + 3600)
    assert [stats.sum for _, stats in minutes] == [10, 50, 100, 0, 25, 50]
    assert [(at - NOW, stats.count, stats.sum, stats.minimum, stats.maximum) for at, stats in fives] == [
        (0, 5, 185, 0, 100), (300, 1, 50, 50, 50)]
    assert [stats.sum for _, stats in network] == [50, 10]
    database.close()


def test_what_is_too_old_goes_in_small_portions(tmp_path: Path) -> None:
    database = store(tmp_path)
    with database.transaction() as connection:
        metering.take_in(connection, {"h": [Sample(sequence=number, at=NOW - 1800 * number, guests=(
            GuestSample(id="g-1", condition="up", seconds=60, cpu_seconds=1.0),)) for number in range(1, 2001)]})
    days = {60: 15, 300: 455}
    for later, left in ((0, {60: 15 * 48, 300: 2000}), (440 * 86400, {300: 15 * 48}), (456 * 86400, {})):
        while True:
            with database.transaction() as connection:
                deleted = metering.sweep(connection, NOW + later, limit=100)
            assert deleted <= 100
            if not deleted:
                break
        with database.transaction(write=False) as connection:
            rows = connection.execute(select(measurements.c.seconds, func.count(), func.min(measurements.c.at))
                                      .group_by(measurements.c.seconds)).all()
        assert {row[0]: row[1] for row in rows} == left
        assert all(row[2] >= NOW + later - days[row[0]] * 86400 for row in rows)
    # With its instance, everything of it goes.
    with database.transaction() as connection:
        metering.take_in(connection, {"h": [Sample(sequence=1, at=NOW, guests=(
            GuestSample(id="g-1", condition="up", seconds=60, rx_bytes=7),))]})
        connection.execute(instances.delete())
        while metering.sweep(connection, NOW):
            continue
        assert not connection.execute(select(measurements)).all() and not connection.execute(select(meters)).all()
        # What it sent and received is still this month's.
        metering.take_in(connection, {"h": [Sample(sequence=2, at=NOW, guests=(
            GuestSample(id="g-1", condition="off", tx_bytes=5),))]})
        assert not connection.execute(select(meters)).all()
        assert connection.execute(select(transfers.c.rx_bytes, transfers.c.tx_bytes, transfers.c.bundle_id)).all() == [
            (7, 5, "nano_3_0")]
    database.close()


def test_hosts_are_written_together_and_each_for_itself(tmp_path: Path) -> None:
    """Of three hosts whose samples are written in one transaction one is another controller's by now; and none can say
    anything of a guest that is another host's."""
    database = store(tmp_path)
    with database.transaction() as connection:
        for host in ("other", "lost"):
            connection.execute(insert(hosts).values(id=host, address=""))
    transactions: list[set[str]] = []

    def take_in(connection: Connection, samples: Mapping[str, Sequence[Sample]]) -> None:
        transactions.append(set(samples))
        metering.take_in(connection, samples)

    def lost(connection: Connection) -> None:
        raise LeaseLost("hosts:1 is done by another controller")

    def page(rx: int) -> SamplePage:
        return SamplePage(ring="r", samples=(Sample(sequence=1, at=NOW, guests=(
            GuestSample(id="g-1", condition="up", seconds=60, rx_bytes=rx),)),))

    async def tell(losing: bool) -> list[int | BaseException]:
        intake = Intake(database, take_in, 0.05)
        told = [intake.take("h", page(7), alone), intake.take("other", page(1000), alone)]
        if losing:
            told.append(intake.take("lost", page(1000), lost))
        return await asyncio.gather(*told, return_exceptions=True)

    first = asyncio.run(tell(losing=True))
    assert first[:2] == [1, 1] and isinstance(first[2], LeaseLost)
    assert transactions == [{"h"}, {"other"}]  # by themselves, after the three together were refused
    assert asyncio.run(tell(losing=False)) == [0, 0]  # they were taken in
    with database.transaction() as connection:
        assert connection.execute(select(transfers.c.rx_bytes)).scalars().all() == [7]
        connection.execute(sample_cursors.delete())
    assert asyncio.run(tell(losing=False)) == [1, 1]
    assert transactions[2:] == [{"h", "other"}]
    database.close()
