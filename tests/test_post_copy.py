"""Guests that move by post-copy: they run at their target before all of their memory is there. Whatever breaks then, one of
the two has them, and never both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

import ticker
from clouds import older_qemu
from skysail.contract.migration import Receiving, Sending, Terms
from skysail.contract.report import GuestReport
from skysail.hypervisor import connections, departure, pull, trail, userfault
from skysail.hypervisor.departure import Departing
from skysail.hypervisor.qmp import Monitor
from test_migration import Fleet, as_, dies_before_each_step, running_fleet, until

pytestmark = pytest.mark.real
# For a guest that writes faster than it is sent.
AFTER = Terms(bytes_per_second=2_000_000, pause_ms=1, seconds=120, post_copy=True)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    # As in test_migration.
    monkeypatch.setattr(connections, "HANG_SECONDS", 45.0)
    with running_fleet() as made:
        yield made


async def begin(fleet: Fleet) -> None:
    """A guest that writes all the time is on its way."""
    fleet.blueprint(busy=True)
    await fleet.start()
    await fleet.here.engine.ensure(await fleet.meet(AFTER))


async def parts(fleet: Fleet) -> None:
    """It has been handed over, and its target does not know yet."""
    await begin(fleet)
    await fleet.phase("moving")
    fleet.strait.cut("word_port")
    await until(lambda: fleet.here.record("g-1").departure.parted, "it is handed over")  # type: ignore[union-attr]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests are handed over before any of their memory has gone, and what nobody asks for then takes some ten seconds."""
    async def slowly(monitor: Monitor, ways: connections.Connections) -> None:
        await monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 25_000})
        await trail.part(monitor, ways)
    monkeypatch.setattr(Departing, "_gone_through", staticmethod(lambda seen: True))
    monkeypatch.setattr(departure, "part", slowly)


async def half_there(fleet: Fleet) -> None:
    """It runs there, and not all of its memory is there."""
    await parts(fleet)
    fleet.strait.mend()
    await until(lambda: fleet.there.record("g-2").made, "it runs there")
    assert pulled(fleet) == "coming"


def pulled(fleet: Fleet) -> str:
    arrival = fleet.there.record("g-2").arrival
    return arrival.pull.state if arrival is not None and arrival.pull is not None else ""


async def whole(fleet: Fleet) -> GuestReport:
    """All of it came, and it went on where it stood."""
    report = await fleet.ends("sent")
    assert report.progress is not None and report.progress.post_copy and report.progress.cut == ""
    await fleet.arrived()
    await until(lambda: pulled(fleet) == "whole", "all of it is there")
    assert nobody_may_open_it()
    return report


async def begins_again(fleet: Fleet) -> None:
    """It is started from its disk at the target, as after a power cut, and runs nowhere else."""
    await until(lambda: pulled(fleet) == "cut", "the target gives its memory up")
    before = len(ticker.counts(fleet.there.serial("g-2")))
    assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))).state == "running"
    await fleet.counts_on(fleet.there, "g-2")
    booted = min(ticker.counts(fleet.there.serial("g-2"))[before:])
    assert booted < ticker.counts(fleet.here.serial("g-1"))[-1], "it booted"
    await fleet.stands(fleet.here, "g-1")
    assert nobody_may_open_it()


def nobody_may_open_it() -> bool:
    return not userfault.DEVICE.stat().st_mode & 0o077


def test_a_guest_that_writes_faster_than_it_is_sent_moves(fleet: Fleet) -> None:
    async def story() -> None:
        await begin(fleet)
        progress = (await whole(fleet)).progress
        print(progress)
        assert progress is not None and progress.gap_ms == progress.pause_ms > 0
        arrived = await fleet.there.engine.ensure(as_(fleet.awaited, role="run", receiving=None))
        assert arrived.state == "running" and arrived.pull is None
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="gone"))).state == "gone"
        await fleet.counts_on(fleet.there, "g-2")
    asyncio.run(story())


def test_an_idle_guest_may_have_gone_before(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(Terms(post_copy=True)))
        progress = (await fleet.ends("sent")).progress
        print(progress)
        await fleet.arrived()
        await until(lambda: pulled(fleet) == "whole", "all of it is there")
        assert nobody_may_open_it()
    asyncio.run(story())


# --- what cannot be


def test_a_target_with_an_older_qemu_says_what_it_lacks(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.there.program = older_qemu()
        await fleet.start()
        sending = as_(fleet.started, role="send", sending=Sending(guest="g-2", terms=AFTER))
        report = await fleet.here.engine.ensure(sending)
        assert report.passport is not None
        awaited = as_(fleet.awaited, receiving=Receiving(passport=report.passport, terms=AFTER))
        refused = await fleet.there.engine.ensure(awaited)
        assert refused.state == "failed" and refused.reason.startswith(userfault.NEEDS), refused
        assert fleet.there.record("g-2").process is None and nobody_may_open_it()
        assert (await fleet.there.engine.ensure(as_(awaited, role="gone"))).state == "gone"
        assert (await fleet.here.engine.ensure(fleet.started)).state == "running"
        await fleet.stayed()
    asyncio.run(story())


def test_an_attempt_that_fails_before_it_is_handed_over_leaves_the_guest_where_it_was(fleet: Fleet) -> None:
    async def story() -> None:
        await begin(fleet)
        await fleet.phase("moving")
        assert not nobody_may_open_it(), "the one that is awaited may open it"
        fleet.there.cut_off("g-2")
        await fleet.ends("failed")
        await fleet.stayed()
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target says that it does not come")
        # The next attempt is another one, and goes the usual way.
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))).state == "gone"
        assert nobody_may_open_it()
        await fleet.here.engine.ensure(as_(fleet.started, role="run"))
        fleet.here.told.clear()
        await fleet.here.engine.ensure(await fleet.meet())
        report = await fleet.ends("sent")
        assert report.progress is not None and not report.progress.post_copy
        await fleet.arrived()
    asyncio.run(story())


# --- what fails once it has been handed over


@pytest.mark.usefixtures("early")
def test_a_target_that_dies_before_it_runs_has_the_guest_start_where_it_was(fleet: Fleet) -> None:
    async def story() -> None:
        await parts(fleet)
        fleet.there.cut_off("g-2")
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target's agent saw it")
        fleet.strait.mend()
        report = await fleet.ends("failed")
        assert report.progress is not None and "starts from its disk" in report.progress.reason, report
        before = len(ticker.counts(fleet.here.serial("g-1")))
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "running"
        await fleet.counts_on(fleet.here, "g-1")
        assert min(ticker.counts(fleet.here.serial("g-1"))[before:]) < ticker.counts(fleet.here.serial("g-1"))[before - 1]
        await fleet.stands(fleet.there, "g-2")
        assert nobody_may_open_it()
    asyncio.run(story())


def test_a_target_that_dies_with_all_of_it_before_it_runs_has_the_guest_go_on_where_it_stood(fleet: Fleet) -> None:
    async def story() -> None:
        await parts(fleet)
        monitor = await fleet.here.engine._guests["g-1"].monitor()

        async def has_gone() -> bool:
            return (await monitor.execute("query-migrate"))["status"] == "completed"
        while not await has_gone():
            await asyncio.sleep(0.1)
        fleet.there.cut_off("g-2")
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target's agent saw it")
        fleet.strait.mend()
        report = await fleet.ends("failed")
        assert report.progress is not None and "did not run it" in report.progress.reason
        await fleet.stayed()
    asyncio.run(story())


@pytest.mark.usefixtures("early")
def test_a_source_that_dies_while_memory_comes_has_the_guest_start_where_it_is(fleet: Fleet) -> None:
    async def story() -> None:
        await half_there(fleet)
        fleet.here.cut_off("g-1")
        report = await fleet.ends("sent")
        assert report.progress is not None and report.progress.cut, report
        await begins_again(fleet)
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "sent"
    asyncio.run(story())


@pytest.mark.usefixtures("early")
def test_a_target_that_dies_while_memory_comes_starts_where_it_is(fleet: Fleet) -> None:
    async def story() -> None:
        await half_there(fleet)
        fleet.there.cut_off("g-2")
        report = await fleet.ends("sent")
        assert report.progress is not None and report.progress.cut, report
        await begins_again(fleet)
    asyncio.run(story())


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a guest and what is left of its memory were joined again."""
    seen, former = list[str](), pull.Pulling.reconnect

    async def noting(self: pull.Pulling, listen: Callable[[], socket.socket]) -> None:
        await former(self, listen)
        seen.append("joined")
    monkeypatch.setattr(pull.Pulling, "reconnect", noting)
    return seen


@pytest.mark.usefixtures("early")
def test_connections_that_break_while_memory_comes_are_made_again(fleet: Fleet, joined: list[str]) -> None:
    async def story() -> None:
        await half_there(fleet)
        fleet.strait.sever("memory_port")
        await until(lambda: joined, "they are joined again")
        fleet.strait.sever("memory_port")
        await whole(fleet)
        print(joined)
    asyncio.run(story())


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("breaks", [False, True])
def test_a_network_that_is_away_while_memory_comes_is_waited_for(fleet: Fleet, joined: list[str], breaks: bool) -> None:
    async def story() -> None:
        await half_there(fleet)
        fleet.strait.cut()
        if breaks:
            fleet.strait.sever("memory_port")
        await asyncio.sleep(5.0)
        assert pulled(fleet) == "coming" and not joined
        fleet.strait.mend()
        await whole(fleet)
        assert bool(joined) == breaks
    asyncio.run(story())


@pytest.mark.usefixtures("early")
def test_a_source_that_never_comes_back_is_not_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "FORSAKEN_SECONDS", 4.0)

    async def story() -> None:
        await half_there(fleet)
        fleet.strait.cut()
        fleet.strait.sever("memory_port")
        await begins_again(fleet)
        fleet.strait.mend()
        report = await fleet.ends("sent")
        assert report.progress is not None and "nothing came" in report.progress.cut
    asyncio.run(story())


@pytest.mark.usefixtures("early")
def test_an_owner_who_stops_it_while_memory_comes_has_it_stopped(fleet: Fleet) -> None:
    async def story() -> None:
        await half_there(fleet)
        stopped = as_(fleet.awaited, role="stop", force=True)
        assert (await fleet.there.engine.ensure(stopped)).state == "stopped"
        report = await fleet.ends("sent")
        assert report.progress is not None and report.progress.cut == ""
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run", starts=2))).state == "running"
        await fleet.counts_on(fleet.there, "g-2")
    asyncio.run(story())


# --- agents that die


@pytest.mark.parametrize("sides", ["source", "target", "both"])
@pytest.mark.usefixtures("early")
def test_the_next_agents_go_on_with_it(fleet: Fleet, sides: str) -> None:
    async def story() -> None:
        await half_there(fleet)
        going = as_(fleet.started, role="send", sending=fleet.here.record("g-1").departure.sending)  # type: ignore[union-attr]
        dead = {"source": [fleet.here], "target": [fleet.there], "both": [fleet.here, fleet.there]}[sides]
        for host in dead:
            await host.die()
        if fleet.there not in dead:
            # A QEMU that waits for a page of a connection that broke does not greet another agent: see the decision.
            fleet.strait.sever("memory_port")
        await asyncio.sleep(1.0)
        for host in dead:
            await host.open((fleet.started if host is fleet.here else fleet.awaited).port)
        if fleet.there in dead:
            assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))).state == "running"
        if fleet.here in dead:
            assert (await fleet.here.engine.ensure(going)).state in ("running", "sent")
        await whole(fleet)
    asyncio.run(story())


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_agent_that_dies_before_any_of_its_steps_loses_nothing(fleet: Fleet, side: str) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await dies_before_each_step(fleet, side, 14 if side == "source" else 3, AFTER)
    asyncio.run(story())


# --- who may open the device


def test_only_those_that_are_awaited_may_open_the_device() -> None:
    def listed() -> set[int]:
        with userfault.DEVICE.open("rb") as device:
            return {one[2] for one in userfault._read(device.fileno()) if one[0] == userfault._USER}
    former = listed()
    try:
        userfault.admit(61_001)
        userfault.admit(61_002)
        userfault.admit(61_001)
        assert listed() - former == {61_001, 61_002}
        userfault.dismiss(61_001)
        assert listed() - former == {61_002}
        userfault.keep(lambda uid: not 61_000 <= uid < 61_100)
        assert listed() == former
    finally:
        userfault.keep(lambda uid: uid in former)
    assert userfault.hindrance("10.0.2 (Debian 1:10.0.2)") == "" and "7.2.22" in userfault.hindrance("7.2.22 (Debian)")
