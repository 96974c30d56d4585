"""The keeper over simulated engines: adoption, back-off, documents in the wrong order, engines that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skysail.agent import keeper as keeping
from skysail.agent.keeper import Keeper, StaleGeneration
from skysail.agent.ledger import Ledger
from skysail.agent.traffic import Traffic
from skysail.contract.document import Guest, HostDocument, Personality, Port, Volume
from skysail.contract.migration import Destination, Receiving, Sending
from skysail.contract.report import GuestReport, HostReport
from skysail.dns.sim import SimZones
from skysail.hypervisor.sim import SimHypervisor
from skysail.kit.errors import SkysailError
from skysail.metadata.sim import SimResponder
from skysail.network.sim import SimFabric
from skysail.storage.sim import SimPool, SimShelf

CAPACITY = HostReport(host="h", boot="", sequence=0, generation=0, vcpus=4, memory_mib=4096, disk_gib=10, accelerator="sim")


class Watched(SimHypervisor):
    """Remembers when it started guests, and refuses to while ``broken`` says why."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[float] = []
        self.broken = ""

    async def ensure(self, guest: Guest) -> GuestReport:
        held = next((one for one in await self.observe() if one.id == guest.id), None)
        off = held is not None and held.state == "halted" and held.starts >= guest.starts
        if guest.role == "run" and not off and (held is None or held.state != "running"):
            if self.broken:
                raise SkysailError(self.broken)
            self.starts.append(time.monotonic())
        return await super().ensure(guest)


class Fabric(SimFabric):
    """A network that cannot be set while ``broken``."""

    broken = False

    async def apply(self, ports: Any, networks: Any = (), overlay: Any = None) -> None:
        if self.broken:
            raise SkysailError("no network")
        await super().apply(ports, networks, overlay)


class Host:
    """A keeper with its engines, over a folder that outlives it."""

    def __init__(self, folder: Path, hypervisor: Watched | None = None, boot: str = "") -> None:
        self.hypervisor = hypervisor or Watched()
        self.fabric = Fabric()
        self.keeper = Keeper(CAPACITY, self.hypervisor, SimPool(), SimShelf(), self.fabric, lambda: [],
                             Ledger(folder / "document.json"), Traffic(folder / "traffic.json"), SimZones(), SimResponder(),
                             boot=boot)

    def seen(self, name: str = "g-1") -> GuestReport | None:
        return next((guest for guest in self.keeper.report().guests if guest.id == name), None)

    def state(self, name: str = "g-1") -> str:
        found = self.seen(name)
        return found.state if found else ""

    async def until(self, true: Callable[[], Any], what: str = "") -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.005)


def guest(name: str = "g-1", role: Any = "run", starts: int = 1, address: int = 10, **more: Any) -> Guest:
    return Guest(id=name, instance=name, role=role, starts=starts, reboots=0, vcpus=1, memory_mib=512,
                 volume=Volume(id=name, image="0" * 64, size_gib=20),
                 port=Port(id=name, mac=f"52:54:00:00:00:{address:02x}", network=1, private_ipv4=f"172.26.0.{address}",
                           public_ipv4=f"100.115.93.{address}"),
                 personality=Personality(hostname=name, user="admin"), **more)


def document(generation: int, *guests: Guest) -> HostDocument:
    return HostDocument(host="h", generation=generation, guests=guests)


def live(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario with whatever the keepers in it follow."""
    asyncio.run(scenario())  # type: ignore[arg-type]


async def started(host: Host) -> Host:
    await host.keeper.start()
    host.following = asyncio.create_task(host.keeper.follow())  # type: ignore[attr-defined]
    return host


def test_a_guest_that_keeps_dying_is_started_later_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = (0.05, 0.3, 0.6, 1.2)
    monkeypatch.setattr(keeping, "BACK_OFF_SECONDS", pauses)

    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "running")
        fallen = []
        for fall in range(5):
            fallen.append(time.monotonic())
            host.hypervisor.crash("g-1")
            if fall:
                await host.until(lambda: host.state() == "crashed", "it says so")
            await host.until(lambda fall=fall: len(host.hypervisor.starts) == fall + 2 and host.state() == "running")
        rests = [start - fall for start, fall in zip(host.hypervisor.starts[1:], fallen, strict=True)]
        # The first fall is forgiven; then each rest is at least as long as its turn says.
        assert all(rest >= pause for rest, pause in zip(rests[1:], (0.3, 0.6, 1.2, 1.2), strict=True)), rests

        monkeypatch.setattr(keeping, "BACK_OFF_SECONDS", (600.0,))
        host.hypervisor.crash("g-1")
        await host.until(lambda: host.state() == "crashed")
        await host.keeper.accept(document(2, guest(starts=2)))
        await host.until(lambda: host.state() == "running", "its owner does not wait")
    live(scenario)


def test_a_guest_that_powers_itself_off_stays_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "running")
        host.hypervisor.halt("g-1")
        await host.until(lambda: host.state() == "halted")
        await asyncio.sleep(0.2)
        assert len(host.hypervisor.starts) == 1 and host.state() == "halted"
        await host.keeper.accept(document(2, guest(starts=2)))
        await host.until(lambda: host.state() == "running")
    live(scenario)


def test_a_restarted_keeper_adopts_and_goes_on_without_its_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = await started(Host(tmp_path))
        await first.keeper.accept(document(7, guest(), guest("g-2", address=11)))
        await first.until(lambda: first.state() == first.state("g-2") == "running")
        second = await started(Host(tmp_path, first.hypervisor))
        assert second.state() == second.state("g-2") == "running"
        second.hypervisor.crash("g-2")
        await second.until(lambda: len(second.hypervisor.starts) == 3 and second.state("g-2") == "running")
        assert second.keeper.report().generation == 7
        with pytest.raises(StaleGeneration):
            await second.keeper.accept(document(6))
        # Missing is not gone.
        await second.keeper.accept(document(8))
        await asyncio.sleep(0.1)
        assert {one.id for one in await second.hypervisor.observe()} == {"g-1", "g-2"}
    live(scenario)


def test_a_damaged_ledger_stops_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = await started(Host(tmp_path))
        await first.keeper.accept(document(7, guest()))
        await first.until(lambda: first.state() == "running")
        (tmp_path / "document.json").write_bytes(b'{"host": "h", "gen')
        second = await started(Host(tmp_path, first.hypervisor))
        assert second.state() == "running"
        await second.keeper.accept(document(7, guest()))
        assert Ledger(tmp_path / "document.json").read() == document(7, guest())
    live(scenario)


def test_of_two_documents_at_once_the_newer_one_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await asyncio.gather(*(host.keeper.accept(document(number, guest(starts=number))) for number in (5, 9, 7)),
                             return_exceptions=True)
        kept = Ledger(tmp_path / "document.json").read()
        assert kept is not None and kept.generation == host.keeper.report().generation == 9
    live(scenario)


def test_a_start_that_cannot_be_is_said_to_have_failed_after_some_tries(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "BACK_OFF_SECONDS", (0.02,))

    async def scenario() -> None:
        host = await started(Host(tmp_path))
        host.hypervisor.broken = "no such image"
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "failed")
        assert (host.seen().reason, host.seen().starts) == ("no such image", 1)  # type: ignore[union-attr]
        host.hypervisor.broken = ""
        await host.until(lambda: host.state() == "running")
        # A later start that cannot be fails too; that is not a guest that died.
        await host.keeper.accept(document(2, guest(role="stop")))
        await host.until(lambda: host.state() == "stopped")
        host.hypervisor.broken = "no such image"
        await host.keeper.accept(document(3, guest(starts=2)))
        await host.until(lambda: host.state() == "failed")
        assert host.seen().starts == 2  # type: ignore[union-attr]
    live(scenario)


def test_a_guest_that_dies_and_cannot_come_back_has_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "BACK_OFF_SECONDS", (0.02,))

    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "running")
        host.hypervisor.broken = "no such image"
        host.hypervisor.crash("g-1")
        await host.until(lambda: host.seen() is not None and host.seen().reason == "no such image")  # type: ignore[union-attr]
        await asyncio.sleep(0.2)
        assert host.state() == "crashed"
    live(scenario)


def test_a_guest_that_runs_is_not_called_dead_because_the_network_cannot_be_set(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "running")
        host.fabric.broken = True
        changed = msgspec.structs.replace(guest(), port=msgspec.structs.replace(guest().port, private_ipv4="172.26.0.99"))
        await host.keeper.accept(document(2, changed))
        await host.until(lambda: host.seen().reason == "no network")  # type: ignore[union-attr]
        assert host.state() == "running"
    live(scenario)


def test_a_guest_that_went_before_a_crash_gives_its_addresses_free(tmp_path: Path) -> None:
    async def scenario() -> None:
        Ledger(tmp_path / "document.json").write(document(4, guest(role="gone")))
        host = Host(tmp_path)
        applied: list[list[str]] = []
        plain = host.fabric.apply

        async def apply(ports: Any, networks: Any = (), overlay: Any = None) -> None:
            applied.append([port.public_ipv4 for port in ports])
            await plain(ports, networks, overlay)
        host.fabric.apply = apply  # type: ignore[method-assign]
        await started(host)
        await host.keeper.accept(document(5, guest("g-2")))  # the same addresses
        await host.until(lambda: host.state("g-2") == "running")
        assert applied and all(len(set(addresses)) == len(addresses) for addresses in applied)
    live(scenario)


@pytest.mark.parametrize("name", ["", "../../etc", "a/b", "g-1\n", "x" * 80])
def test_a_document_cannot_name_a_guest_by_a_path(name: str) -> None:
    honest = msgspec.json.encode(document(1, guest()))
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(honest.replace(b'"id":"g-1"', b'"id":' + msgspec.json.encode(name)), type=HostDocument)


def test_a_network_that_another_program_took_away_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "NETWORK_SECONDS", 0.02)

    async def play() -> None:
        host = Host(tmp_path)
        await host.keeper.start()
        await host.keeper.accept(document(1, guest()))
        await host.until(lambda: host.state() == "running")
        tending = asyncio.create_task(host.keeper.tend_network())
        for broken in (False, True):
            await host.fabric.apply([])
            host.fabric.broken = broken  # it may fail for a while, too
            await asyncio.sleep(0.1)
            host.fabric.broken = False
            async with asyncio.timeout(30):
                while "g-1" not in await host.fabric.observe():
                    await asyncio.sleep(0.01)
        tending.cancel()

    asyncio.run(play())


def test_a_guest_moves_from_host_to_host_by_documents(tmp_path: Path) -> None:
    async def scenario() -> None:
        here, there = [await started(Host(tmp_path / name)) for name in ("here", "there")]
        await here.keeper.accept(document(1, guest()))
        await here.until(lambda: here.state() == "running")
        key = here.seen().host_keys  # type: ignore[union-attr]

        await here.keeper.accept(document(2, guest(role="send", sending=Sending(guest="g-2"))))
        await here.until(lambda: here.seen().passport is not None)  # type: ignore[union-attr]
        passport = here.seen().passport  # type: ignore[union-attr]
        coming = Receiving(passport=passport)
        await there.keeper.accept(document(1, guest("g-2", role="receive", receiving=coming)))
        await there.until(lambda: there.state("g-2") == "listening")
        assert here.state() == "running" and "g-2" in await there.fabric.observe(), "its port is there before it is"
        destination = there.seen("g-2").destination  # type: ignore[union-attr]

        going = guest(role="send", sending=Sending(guest="g-2", destination=destination))
        await here.keeper.accept(document(3, going))
        await here.until(lambda: here.state() == "sent")
        assert there.state("g-2") == "listening", "nobody told it yet"
        await there.keeper.accept(document(2, guest("g-2", receiving=coming)))
        await there.until(lambda: there.state("g-2") == "running")
        assert there.seen("g-2").host_keys == key  # type: ignore[union-attr]
        await here.keeper.accept(document(4, guest()))
        await asyncio.sleep(0.1)
        assert here.state() == "sent", "it went, and does not come back by being wanted"
        await here.keeper.accept(document(5, guest(role="gone")))
        await here.until(lambda: here.state() == "gone")
        assert there.state("g-2") == "running"
    live(scenario)


@pytest.mark.parametrize("lost", [False, True])
def test_a_guest_that_could_not_move_runs_on(tmp_path: Path, lost: bool) -> None:
    async def scenario() -> None:
        host = await started(Host(tmp_path))
        await host.keeper.accept(document(1, guest()))
        nowhere = Destination(address="sim", memory_port=1, disks_port=2, word_port=3, authority="")
        await host.keeper.accept(document(2, guest(role="send", sending=Sending(guest="g-2", destination=nowhere))))
        await host.until(lambda: host.seen() is not None and host.seen().progress is not None)  # type: ignore[union-attr]
        if lost:
            await host.until(lambda: host.state() == "sent")
            await host.keeper.accept(document(3, guest(lost="g-2")))
        else:
            host.hypervisor.break_off("g-1", "the other host is away")
            await host.until(lambda: host.seen().progress.state == "failed")  # type: ignore[union-attr]
            assert host.state() == "running"
            await host.keeper.accept(document(3, guest()))
        await host.until(lambda: host.state() == "running" and host.seen().progress is None)  # type: ignore[union-attr]
    live(scenario)


def test_a_machine_that_booted_starts_nothing_before_its_controller_has_spoken(tmp_path: Path) -> None:
    """It may have been taken for lost: whoever wrote before this boot does not know."""
    async def scenario() -> None:
        first = await started(Host(tmp_path, boot="monday"))
        assert first.keeper.report().waits
        await first.keeper.accept(document(3, guest()))  # by a controller that does not know of lives yet
        await first.until(lambda: first.state() == "running")
        assert not first.keeper.report().waits

        again = await started(Host(tmp_path, boot="monday"))  # its agent was replaced: nothing is waited for
        await again.until(lambda: again.state() == "running")

        booted = await started(Host(tmp_path, boot="tuesday"))
        report = booted.keeper.report()
        assert report.waits and report.generation == 3
        with pytest.raises(StaleGeneration, match="has booted since"):
            await booted.keeper.accept(msgspec.structs.replace(document(4, guest()), life=again.keeper.report().boot))
        with pytest.raises(StaleGeneration, match="is older"):
            await booted.keeper.accept(msgspec.structs.replace(document(2, guest()), life=report.boot))
        await asyncio.sleep(0.2)
        assert booted.hypervisor.starts == [] and await booted.fabric.observe() == {}
        await booted.keeper.accept(msgspec.structs.replace(document(4, guest(), guest("g-2", address=11)), life=report.boot))
        await booted.until(lambda: booted.state() == booted.state("g-2") == "running")
        await booted.keeper.accept(document(5, guest()))  # from here on it is a host like any other
    live(scenario)
