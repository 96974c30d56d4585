"""Guests that move between two hosts of this machine: two engines, each with its own folder, namespace and user ids.

The guest is a boot sector that counts (ticker.py): it tells what of its memory or its disk is lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ticker
from clouds import real_settings, taken_slot
from skysail.contract.document import Attachment, Guest, Personality, Port, Volume
from skysail.contract.migration import Destination, Passport, Receiving, Sending, Terms
from skysail.contract.report import GuestReport
from skysail.hypervisor import accelerator, confinement, connections, departure, ferry, line, process, relay
from skysail.hypervisor.engine import Qemu
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.process import PROGRAM
from skysail.hypervisor.qmp import Gone, Monitor
from skysail.hypervisor.record import Record
from skysail.hypervisor.template import Image, Templates
from skysail.hypervisor.workshop import Workshop
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.kit.process import kill
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.serve.agent import cluster, storage, surroundings
from skysail.serve.up import end_guests

pytestmark = pytest.mark.real
PATIENCE_SECONDS = 90.0
IMAGE = "a" * 64
# What takes some seconds on any machine.
FREE, SLOW = Terms(), Terms(bytes_per_second=200_000)
# Slow enough for a test to do something meanwhile.
STEADY = Terms(bytes_per_second=2_000_000)
# For a busy guest: it never comes to an end by itself.
ENDLESS = Terms(bytes_per_second=500_000, pause_ms=1)


class Strait:
    """What lies between two hosts: everything that is said to the destination goes through here, and is held up where a way
    is closed."""

    def __init__(self, beyond: Destination) -> None:
        self.ways = {way: asyncio.Event() for way in ("memory_port", "disks_port", "word_port")}
        self._beyond = beyond
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[str, list[asyncio.StreamWriter]] = {way: [] for way in self.ways}
        self.mend()

    async def open(self) -> Destination:
        """The destination as it is seen from the other side."""
        ports = {}
        for way in self.ways:
            server = await asyncio.start_server(lambda *near, way=way: self._join(way, *near), "127.0.0.1", 0)
            self._servers.append(server)
            ports[way] = server.sockets[0].getsockname()[1]
        return msgspec.structs.replace(self._beyond, **ports)

    async def _join(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far = await asyncio.open_connection(self._beyond.address, getattr(self._beyond, way))
        except OSError:
            writer.close()
            return
        self._writers[way] += [writer, far[1]]
        for source, sink in ((reader, far[1]), (far[0], writer)):
            task = asyncio.create_task(self._carry(way, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self.ways[way].wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    def cut(self, *ways: str) -> None:
        for way in ways or self.ways:
            self.ways[way].clear()

    def sever(self, way: str) -> None:
        """Every connection that goes this way breaks."""
        for writer in self._writers[way]:
            writer.transport.abort()

    def mend(self) -> None:
        for way in self.ways.values():
            way.set()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()


class Host:
    """A host; each :meth:`open` is the engine of another agent."""

    def __init__(self, folder: Path, slot: int, images: dict[str, Path], more: str = "") -> None:
        folder.mkdir(mode=0o755)
        (folder / "skysail.toml").write_text(real_settings(slot) + more)
        self.config = load(str(folder))
        self.images = images
        self.fabric = LinuxFabric(Layout.of(self.config))
        for made in (self.config.volumes_dir, self.config.snapshots_dir):
            made.mkdir(parents=True)
        self.pool, self.shelf = storage(self.config)
        self.told: list[GuestReport] = []
        # The ports that were announced, each with whether its guest was noted as one that runs here.
        self.announced: list[tuple[str, bool]] = []
        self.program = PROGRAM

    def _image(self, digest: str) -> Image | None:
        path = self.images.get(digest)
        return None if path is None else Image(digest=digest, path=path, ours=False)

    def workshop(self) -> Workshop:
        return Workshop(
            guests=self.config.guests_dir, accelerator="tcg", make_volume=self.pool.ensure, drop_volume=self.pool.remove,
            volumes=self.pool.observe, find_image=self._image, open_port=self.fabric.open_port, give_volume=self.pool.give,
            templates=Templates(self.config.templates_dir, "tcg", self.config.guest_uid_base, program=self.program),
            shelf=self.shelf, around=lambda: surroundings(self.config), program=self.program, announce=self._announce,
            cluster=cluster(self.config), reclaim_volume=self.pool.reclaim)

    async def _announce(self, port: str) -> None:
        self.announced += [(port, guest.record.made) for guest in self.engine._guests.values()]

    async def open(self, *ports: Port) -> Qemu:
        await self.fabric.apply(ports)
        self.engine = Qemu(self.workshop(), self.config.guest_uid_base, self.config.relay_uid)
        self._following = asyncio.create_task(self._follow())
        return self.engine

    async def _follow(self) -> None:
        async for report in self.engine.changes():
            self.told.append(report)

    async def die(self) -> None:
        """The agent is gone: what it did at that moment is left as it is."""
        engine = self.engine
        tasks = [self._following, *(task for _, task in engine._departures.values())]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for arriving in engine._arrivals.values():
            if arriving._pulling is not None:
                arriving._pulling.leave()
            if arriving._ear is not None:
                arriving._ear.close()
                for talk in arriving._ear.talks:
                    talk.cancel()
        for guest in engine._guests.values():
            await guest._leave()
        self.told.clear()

    def port(self, number: int) -> Port:
        """A place in this host's network."""
        return Port(id=f"p-{number}", mac=f"52:54:00:00:00:{number:02x}", network=1,
                    private_ipv4=str(ipaddress.ip_network(self.config.private_network)[number]),
                    public_ipv4=self.config.public_pool.replace(".0/24", f".{number}"))

    def guest(self, name: str, **more: Any) -> Guest:
        plain = Guest(id=name, instance="one", role="run", starts=1, reboots=0, vcpus=1, memory_mib=64,
                      volume=Volume(id=name, image=IMAGE, size_gib=1), port=self.port(10),
                      personality=Personality(hostname="one", user="admin"))
        return msgspec.structs.replace(plain, **more)

    def record(self, name: str) -> Record:
        return msgspec.json.decode((self.config.guests_dir / name / "guest.json").read_bytes(), type=Record)

    def serial(self, name: str) -> Path:
        return self.config.guests_dir / name / "run" / "serial.log"

    def cut_off(self, name: str) -> None:
        """The guest's process dies by itself."""
        process = self.record(name).process
        assert process is not None
        kill(process.pid, process.started)

    def remove(self) -> None:
        end_guests(self.config)
        asyncio.run(self.fabric.teardown())


class Fleet:
    """Two hosts, and a guest ``going`` on the first one, which is to become ``coming`` on the other."""

    def __init__(self, folder: Path, slots: tuple[int, int], more: str = "") -> None:
        self.folder = folder
        self.images: dict[str, Path] = {}
        self.here = Host(folder / "a", slots[0], self.images, more)
        self.there = Host(folder / "b", slots[1], dict(self.images), more)
        self.going, self.coming = "g-1", "g-2"
        self.started = self.here.guest("g-1")
        self.awaited = self.there.guest("g-2", role="receive")
        self.passport: Passport = None  # type: ignore[assignment]
        self.strait: Strait = None  # type: ignore[assignment]

    def blueprint(self, *, both: bool = True, **kind: Any) -> None:
        self.images[IMAGE] = ticker.image(self.folder / "ticker.qcow2", **kind)
        self.there.images = dict(self.images) if both else {}

    async def start(self, **more: Any) -> None:
        """The guest runs here, and has counted a little."""
        if not self.images:
            self.blueprint()
        self.started = msgspec.structs.replace(self.started, **more)
        await self.here.open(self.started.port)
        await self.there.open(self.awaited.port)
        report = await self.here.engine.ensure(self.started)
        assert report.state == "running" and report.refused == {}, report
        await until(lambda: len(ticker.counts(self.here.serial(self.going))) > 5, "it counts")

    async def meet(self, terms: Terms = FREE, change: Callable[[Passport], Passport] = lambda same: same) -> Guest:
        """Both sides know each other; the document by which the guest goes, through the strait."""
        sending = msgspec.structs.replace(self.started, role="stop" if terms.off else "send",
                                          sending=Sending(guest=self.coming, terms=terms))
        report = await self.here.engine.ensure(sending)
        assert report.passport is not None and report.progress is not None
        assert (report.state, report.progress.state) == ("stopped" if terms.off else "running", "ready")
        self.passport = change(report.passport)
        self.awaited = msgspec.structs.replace(self.awaited, receiving=Receiving(passport=self.passport, terms=terms))
        report = await self.there.engine.ensure(self.awaited)
        assert report.state == "listening" and report.destination is not None, report
        self.strait = Strait(report.destination)
        there = await self.strait.open()
        return msgspec.structs.replace(sending, sending=Sending(guest=self.coming, destination=there, terms=terms))

    async def ends(self, state: str) -> GuestReport:
        """The attempt ends so at its source."""
        def seen() -> GuestReport | None:
            told = [one for one in self.here.told if one.progress is not None and (one.progress.state == "failed" or (
                one.progress.state == "sent" and not one.progress.reason))]
            return told[-1] if told else None
        report: GuestReport = await until(seen, "the attempt ends")
        assert report.progress is not None and report.progress.state == state, report
        return report

    async def unheard(self) -> None:
        """The source has handed it over, and says that the target does not answer."""
        await until(lambda: any(one.progress is not None and one.progress.state == "sent" and one.progress.reason
                                for one in self.here.told), "the source gives it away for lost")

    def is_over(self) -> bool:
        """Whether the source knows that it has gone."""
        held = self.here.record(self.going).departure
        return held is not None and held.heard

    async def phase(self, *phases: str, seconds: float = PATIENCE_SECONDS) -> None:
        """The source has come so far."""
        def seen() -> bool:
            held = self.here.record(self.going).departure
            return held is not None and held.phase in phases
        await until(seen, f"{phases}", seconds)

    async def prepare(self, way: str) -> None:
        """The guest runs, with a disk that takes some time to go over, or a memory that always has something new."""
        memory = way == "memory_port"
        self.blueprint(both=memory, busy=memory, ballast_mib=0 if memory else 8)
        await self.start()

    async def flows(self, way: str) -> None:
        """Some of what goes this way has gone over."""
        def seen() -> Any:
            held = self.here.engine._guests[self.going].progress
            if way == "memory_port":
                return held is not None and held.rounds > 1
            return held is not None and held.disk_bytes
        await until(seen, f"something goes by the {way}")

    async def parts(self) -> None:
        """The guest stands still here, and is the target's; the word to run is still on its way."""
        await self.phase("moving")
        self.strait.cut("word_port")
        end = time.monotonic() + PATIENCE_SECONDS
        while await process.status(await self.here.engine._guests[self.going].monitor()) != "postmigrate":
            assert time.monotonic() < end
            await asyncio.sleep(0.02)

    async def arrived(self) -> None:
        """It runs there, with all that it had, and not here."""
        await self.counts_on(self.there, self.coming)
        await self.stands(self.here, self.going)
        assert self.continues(), "it went on where it stood"

    def continues(self) -> bool:
        last, first = ticker.counts(self.here.serial(self.going))[-1], ticker.counts(self.there.serial(self.coming))[0]
        # The line of the moment may be cut in two.
        return last <= first <= last + 2

    async def stayed(self) -> None:
        """It runs here, with all that it had, and not there; and the next attempt succeeds."""
        await self.counts_on(self.here, self.going)
        if self.there.serial(self.coming).exists():
            await self.stands(self.there, self.coming)
        counted = ticker.counts(self.here.serial(self.going))
        assert counted == sorted(counted), "it was not started again"

    async def counts_on(self, host: Host, name: str) -> None:
        """The guest runs there, and has lost nothing."""
        before = len(ticker.counts(host.serial(name)))
        await until(lambda: len(ticker.counts(host.serial(name))) > before + 5, f"{name} counts on")
        assert ticker.complaints(host.serial(name)) == []

    async def stands(self, host: Host, name: str) -> None:
        """The guest does not run there."""
        before = len(ticker.counts(host.serial(name)))
        await asyncio.sleep(1.0)
        assert len(ticker.counts(host.serial(name))) == before

    async def falls_silent(self, host: Host, name: str) -> None:
        """The guest stops there. Its QEMU may not answer who asks, while it waits for the network."""
        end, before = time.monotonic() + PATIENCE_SECONDS, -1
        while (now := len(ticker.counts(host.serial(name)))) != before:
            assert time.monotonic() < end
            before = now
            await asyncio.sleep(1.5)

    async def turn(self) -> None:
        """It has come: what was the source is to be the target next."""
        number = int(self.coming.removeprefix("g-")) + 1
        role = self.started.role
        self.started = msgspec.structs.replace(self.awaited, role=role, receiving=None)
        assert (await self.there.engine.ensure(self.started)).state == ("running" if role == "run" else "stopped")
        assert (await self.here.engine.ensure(self.here.guest(self.going, role="gone"))).state == "gone"
        for disk in self.started.disks:
            await self.here.pool.remove(disk.volume.id)
        self.strait.close()
        self.here, self.there = self.there, self.here
        self.going, self.coming = self.coming, f"g-{number}"
        self.awaited = self.there.guest(self.coming, role="receive", disks=self.started.disks)
        self.here.told.clear()
        self.there.told.clear()

    def remove(self) -> None:
        if self.strait is not None:
            self.strait.close()
        self.here.remove()
        self.there.remove()


async def until(seen: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    end = time.monotonic() + seconds
    while not (answer := seen()):
        assert time.monotonic() < end, f"did not happen within {seconds} s: {what}"
        await asyncio.sleep(0.02)
    return answer


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    # A machine that is busy with other tests keeps QEMU from answering for seconds, which is no network that went away.
    monkeypatch.setattr(connections, "HANG_SECONDS", 45.0)
    with running_fleet() as made:
        yield made


@contextlib.contextmanager
def running_fleet(more: str = "") -> Iterator[Fleet]:
    """Two hosts without guests; ``more`` is in the configuration of both."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))  # a short path: it holds sockets
    folder.chmod(0o755)
    with taken_slot() as first, taken_slot() as second:
        made = Fleet(folder, (first, second), more)
        try:
            yield made
        finally:
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)


def as_(guest: Guest, **changes: Any) -> Guest:
    return msgspec.structs.replace(guest, **changes)


def test_a_guest_moves_while_it_counts(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet()
        await fleet.stands(fleet.there, "g-2")
        await fleet.here.engine.ensure(going)
        report = await fleet.ends("sent")
        assert report.state == "sent" and report.progress is not None and report.progress.pause_ms > 0
        await until(lambda: any(one.id == "g-2" and one.state == "running" for one in fleet.there.told), "it came")
        await fleet.arrived()
        arrived = await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))
        assert arrived.state == "running" and arrived.alone and arrived.destination is None
        assert fleet.there.announced == [("p-10", False)], "first of all, by itself, and once"
        assert fleet.here.announced == []
        assert arrived.host_keys == (fleet.here.record("g-1").identity.host_public,)
        assert fleet.there.record("g-2").identity.generation_id == fleet.here.record("g-1").identity.generation_id
        seed = Path("guests/g-1/seed.iso"), Path("guests/g-2/seed.iso")
        assert (fleet.here.config.root / seed[0]).read_bytes() == (fleet.there.config.root / seed[1]).read_bytes()
        # Asked again, the source says the same; only "gone" ends it.
        assert (await fleet.here.engine.ensure(going)).state == "sent"
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "sent"
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="gone"))).state == "gone"
        await fleet.counts_on(fleet.there, "g-2")
        # It is a guest like any other: it starts from its own disk.
        again = as_(fleet.awaited, role="run", starts=2)
        assert (await fleet.there.engine.ensure(as_(again, role="stop", force=True))).state == "stopped"
        assert (await fleet.there.engine.ensure(again)).state == "running"
        await fleet.counts_on(fleet.there, "g-2")
    asyncio.run(story())


def test_a_guest_moves_to_a_host_without_its_image_and_back(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(both=False, ballast_mib=8)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet())
        report = await fleet.ends("sent")
        assert report.progress is not None and 8 << 20 < report.progress.disk_bytes < 64 << 20, "what goes, not what it says"
        await fleet.arrived()
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))).state == "running"
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="gone"))).state == "gone"

        fleet.here, fleet.there = fleet.there, fleet.here
        held = as_(fleet.awaited, role="send", sending=Sending(guest="g-3"))
        report = await fleet.here.engine.ensure(held)
        assert report.passport is not None and report.passport.base == "" and report.passport.starts == 1
        coming = fleet.there.guest("g-3", role="receive", receiving=Receiving(passport=report.passport))
        report = await fleet.there.engine.ensure(coming)
        await fleet.here.engine.ensure(as_(held, sending=Sending(guest="g-3", destination=report.destination)))
        await fleet.ends("sent")
        await fleet.counts_on(fleet.there, "g-3")
        await fleet.stands(fleet.here, "g-2")
    asyncio.run(story())


def test_every_disk_comes_at_its_place(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint()
        # The first one to be plugged in is not the first by name.
        second, first = (Attachment(volume=Volume(id=f"d-{name}", image="", size_gib=1), name=name)
                         for name in ("xvdg", "xvdf"))
        for one in (second, first):
            path = await fleet.here.pool.ensure(one.volume, None, 1 << 30, 0)
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {ord(one.name[-1])} 1M 4M", str(path)], check=True)
        await fleet.start(disks=(second,))
        await fleet.here.engine.ensure(as_(fleet.started, disks=(first, second)))
        fleet.started = as_(fleet.started, disks=(first, second))
        fleet.awaited = as_(fleet.awaited, disks=(first, second))
        going = await fleet.meet()
        assert {one.name: one.address for one in fleet.passport.disks} == {"disk": 0, "xvdg": 0, "xvdf": 1}
        await fleet.here.engine.ensure(going)
        await fleet.ends("sent")
        await fleet.arrived()
        await fleet.there.engine.ensure(as_(fleet.awaited, role="stop", force=True))
        for one in (second, first):
            path = (await fleet.there.pool.observe())[one.volume.id]
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"read -P {ord(one.name[-1])} 1M 4M", str(path)], check=True)
    asyncio.run(story())


# --- what fails


def test_a_target_that_dies_leaves_the_guest_where_it_was(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(SLOW))
        await fleet.phase("moving")
        fleet.there.cut_off("g-2")
        await fleet.ends("failed")
        await fleet.stayed()
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target says that it does not come")
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))).state == "gone"
        assert await fleet.there.pool.observe() == {}, "nothing of an attempt is left"
        # The next attempt is another one.
        await fleet.here.engine.ensure(as_(fleet.started, role="run"))
        assert fleet.here.record("g-1").departure is None
        fleet.here.told.clear()
        await fleet.here.engine.ensure(await fleet.meet())
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_a_target_that_cannot_load_the_state_leaves_the_guest_where_it_was(fleet: Fleet) -> None:
    def other(passport: Passport) -> Passport:
        return msgspec.structs.replace(passport, shape=msgspec.structs.replace(passport.shape, type="pc-q35-6.2"))

    async def story() -> None:
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(change=other))
        report = await fleet.ends("failed")
        assert report.reason == "" and report.progress is not None and report.progress.reason
        await fleet.stayed()
    asyncio.run(story())


def test_a_target_that_could_not_build_the_guest_says_so(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        await fleet.meet()
        shape = msgspec.structs.replace(fleet.passport.shape, accelerator="kvm")
        stranger = as_(fleet.there.guest("g-9", role="receive"), receiving=Receiving(
            passport=msgspec.structs.replace(fleet.passport, shape=shape)))
        report = await fleet.there.engine.ensure(stranger)
        assert report.state == "failed" and "kvm" in report.reason
        with pytest.raises(SkysailError, match="did not come"):
            await fleet.there.engine.ensure(as_(stranger, role="run"))
    asyncio.run(story())


def test_a_full_disk_at_the_target_ends_the_attempt(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(both=False, ballast_mib=24)
        volumes = fleet.there.config.volumes_dir
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", str(volumes)], check=True)
        try:
            await fleet.start()
            await fleet.here.engine.ensure(await fleet.meet())
            report = await fleet.ends("failed")
            assert report.progress is not None and "No space left" in report.progress.reason
            await fleet.stayed()
            await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))
        finally:
            subprocess.run(["umount", str(volumes)], check=True)
    asyncio.run(story())


@pytest.mark.parametrize("way", ["disks_port", "word_port"])
def test_a_network_that_is_away_for_some_seconds_is_waited_for(fleet: Fleet, way: str) -> None:
    async def story() -> None:
        await fleet.prepare(way)
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.flows(way)
        fleet.strait.cut(way)
        await asyncio.sleep(5)
        assert not fleet.is_over()
        await fleet.counts_on(fleet.here, "g-1")
        fleet.strait.mend()
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_memory_that_does_not_get_through_for_some_seconds_is_waited_for(fleet: Fleet) -> None:
    def moved() -> int:
        held = fleet.here.engine._guests[fleet.going].progress
        # Held back by auto-converge, it may come to its end all the same.
        return 1 << 62 if held is not None and held.state == "sent" else held.memory_bytes if held is not None else 0

    async def story() -> None:
        await fleet.prepare("memory_port")
        await fleet.here.engine.ensure(await fleet.meet(ENDLESS))
        await fleet.flows("memory_port")
        fleet.strait.cut("memory_port")
        await asyncio.sleep(5)
        before = moved()
        fleet.strait.mend()
        await until(lambda: moved() > before + 100_000, "it goes on")
        called_off = await fleet.here.engine.ensure(as_(fleet.started, role="run"))
        await (fleet.arrived() if called_off.state == "sent" else fleet.stayed())
    asyncio.run(story())


@pytest.mark.parametrize("way", ["disks_port", "memory_port"])
def test_a_network_that_stays_away_ends_the_attempt(fleet: Fleet, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "STALL_SECONDS", 2.0)

    async def story() -> None:
        await fleet.prepare(way)
        going = await fleet.meet(ENDLESS if way == "memory_port" else STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.flows(way)
        fleet.strait.cut(way)
        # If it went away while the guest stood still, QEMU itself says that the connection broke.
        report = await fleet.ends("failed")
        assert report.progress is not None and report.progress.reason
        await fleet.stayed()
    asyncio.run(story())


@pytest.mark.parametrize("way", ["disks_port", "memory_port"])
def test_a_network_that_goes_away_in_the_greeting_ends_the_attempt_and_not_the_guest(
        fleet: Fleet, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANG_SECONDS", 5.0)

    async def story() -> None:
        await fleet.start()
        going = await fleet.meet()
        fleet.strait.cut(way)
        await fleet.here.engine.ensure(going)
        await fleet.ends("failed")
        await fleet.stayed()
    asyncio.run(story())


def test_a_guest_that_writes_faster_than_it_is_sent_stays_and_is_unharmed(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(Terms(bytes_per_second=2_000_000, pause_ms=1, seconds=10)))
        report = await fleet.ends("failed")
        assert report.progress is not None and report.progress.memory_bytes > 0
        assert report.progress.slowed_percent > 0, "it was held back, and still wrote faster"
        await fleet.stayed()
    asyncio.run(story())


def test_memory_whose_connections_break_in_the_first_round_ends_the_attempt(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        # A first round of a second; yet faster than the guest writes to its disk, which goes at the same speed.
        await fleet.here.engine.ensure(await fleet.meet(Terms(bytes_per_second=1_000_000)))
        await fleet.phase("moving")

        def first() -> bool:
            held = fleet.here.engine._guests[fleet.going].progress
            return held is not None and held.memory_bytes > 0
        await until(first, "the first bytes of its memory go")
        held = fleet.here.engine._guests[fleet.going].progress
        assert held is not None and held.rounds <= 1
        fleet.strait.sever("memory_port")
        await fleet.ends("failed")
        await fleet.stayed()
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))).state == "gone"
        assert await fleet.there.pool.observe() == {}
        await fleet.here.engine.ensure(as_(fleet.started, role="run"))
        fleet.here.told.clear()
        await fleet.here.engine.ensure(await fleet.meet())
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_an_attempt_is_called_off(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(SLOW))
        await fleet.phase("moving")
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "running"
        assert fleet.here.record("g-1").departure is None
        await fleet.stayed()
    asyncio.run(story())


def test_a_target_that_dies_in_the_last_moment_has_the_guest_go_on_where_it_stood(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.parts()
        fleet.there.cut_off("g-2")
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target's agent saw it")
        fleet.strait.mend()
        report = await fleet.ends("failed")
        assert report.progress is not None and "did not run it" in report.progress.reason
        await fleet.stayed()
    asyncio.run(story())


def test_the_document_says_what_the_line_does_not(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.parts()
        await fleet.unheard()
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "sent", "it is not its own any more"
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))).state == "running"
        await fleet.arrived()
    asyncio.run(story())


def test_a_guest_whose_target_is_lost_goes_on_where_it_stood(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.parts()
        await fleet.unheard()
        await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run", lost="g-2"))).state == "running"
        await fleet.stayed()
    asyncio.run(story())


def test_a_guest_that_dies_on_its_way_is_started_where_it_was(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        going = await fleet.meet(SLOW)
        await fleet.here.engine.ensure(going)
        await fleet.phase("moving")
        fleet.here.cut_off("g-1")
        await fleet.ends("failed")
        assert fleet.there.record("g-2").arrival.never, "the target has promised never to run it"  # type: ignore[union-attr]
        assert (await fleet.here.engine.ensure(going)).state == "running"
        await fleet.counts_on(fleet.here, "g-1")
        await fleet.stands(fleet.there, "g-2")
        with pytest.raises(SkysailError, match="did not come"):
            await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))
    asyncio.run(story())


# --- guests that are off


OFF = Terms(off=True)


async def rest(fleet: Fleet) -> Attachment:
    """Its guest is stopped, and has a disk with something on it."""
    disk = Attachment(volume=Volume(id="d-1", image="", size_gib=1), name="xvdf")
    path = await fleet.here.pool.ensure(disk.volume, None, 1 << 30, 0)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 4M", str(path)], check=True)
    await fleet.start(disks=(disk,))
    fleet.started = as_(fleet.started, role="stop", force=True)
    fleet.awaited = as_(fleet.awaited, disks=(disk,))
    assert (await fleet.here.engine.ensure(fleet.started)).state == "stopped"
    return disk


async def starts(host: Host, guest: Guest) -> None:
    """It boots there, from all that it had."""
    assert (await host.engine.ensure(as_(guest, role="run", starts=guest.starts + 1))).state == "running"
    await until(lambda: len(ticker.counts(host.serial(guest.id))) > 3, "it counts")
    assert ticker.complaints(host.serial(guest.id)) == []
    assert (await host.engine.ensure(as_(guest, role="stop", force=True, starts=guest.starts + 1))).state == "stopped"
    path = (await host.pool.observe())["d-1"]
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 4M", str(path)], check=True)


def test_a_stopped_guest_goes_with_its_disks(fleet: Fleet) -> None:
    async def story() -> None:
        await rest(fleet)
        going = await fleet.meet(OFF)
        assert [one.state for one in await fleet.here.engine.observe()] == ["stopped"], "what reads its disks does not run"
        assert fleet.passport.disks[0].name == "disk" and {one.name for one in fleet.passport.disks} == {"disk", "xvdf"}
        await fleet.here.engine.ensure(going)
        report = await fleet.ends("sent")
        assert report.progress is not None and report.progress.disk_bytes > 4 << 20 and not report.progress.memory_bytes
        come = as_(fleet.awaited, role="stop")
        assert (await fleet.there.engine.ensure(come)).state == "stopped"
        assert fleet.there.record("g-2").process is None and fleet.there.announced == []
        assert (await fleet.here.engine.ensure(going)).state == "sent"
        # Whoever says "run" to the one that it left has it refused.
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "sent"
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="gone"))).state == "gone"
        await starts(fleet.there, as_(come, receiving=None))
        seed = (fleet.there.config.guests_dir / "g-2" / "seed.iso")
        assert seed.stat().st_size == fleet.passport.seed_bytes
    asyncio.run(story())


def test_a_stopped_guest_whose_owner_starts_it_stays(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(both=False, ballast_mib=8)
        await rest(fleet)
        await fleet.here.engine.ensure(await fleet.meet(msgspec.structs.replace(STEADY, off=True)))
        await fleet.flows("disks_port")
        started = as_(fleet.started, role="run", force=False, starts=2)
        assert (await fleet.here.engine.ensure(started)).state == "running"
        assert fleet.here.record("g-1").departure is None
        await fleet.counts_on(fleet.here, "g-1")
        assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="gone"))).state == "gone"
        assert await fleet.there.pool.observe() == {}, "nothing of an attempt is left"
    asyncio.run(story())


def test_more_connections_than_it_carries_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens many and says nothing does not end who carries them."""
    most = 3
    with socket.create_server(("127.0.0.1", 0)) as target, socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        carrier = subprocess.Popen(
            [sys.executable, "-c", f"import sys; from skysail.hypervisor import ferry; ferry.MOST = {most}; ferry.main()",
             "mark", str(listener.fileno()), f"127.0.0.1:{target.getsockname()[1]}"], pass_fds=[listener.fileno()])
        try:
            idle = [(socket.create_connection(place), target.accept()[0]) for _ in range(most)]
            target.settimeout(1.0)
            late = socket.create_connection(place)
            with pytest.raises(TimeoutError):
                target.accept()
            for one in idle.pop():
                one.close()
            target.settimeout(60.0)
            carried, _ = target.accept()
            late.sendall(b"x")
            assert carried.recv(1) == b"x"
            assert carrier.poll() is None
            for one in (*itertools.chain.from_iterable(idle), late, carried):
                one.close()
        finally:
            carrier.kill()
            carrier.wait()


def test_a_target_whose_qemu_does_not_answer_is_awaited_all_the_same(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to run, what it came from would be cleared away."""
    async def silent(self: QemuGuest) -> Any:
        raise Gone("QEMU does not answer")

    async def story() -> None:
        await fleet.start()
        going = await fleet.meet()
        with monkeypatch.context() as patch:
            patch.setattr(QemuGuest, "look", silent)
            assert [one.state for one in await fleet.there.engine.observe()] == ["listening"]
            assert [one.state for one in await fleet.here.engine.observe()] == ["running"]
        await fleet.here.engine.ensure(going)
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_a_source_with_a_disk_that_is_larger_than_its_own_is_refused(fleet: Fleet) -> None:
    """It would fill the target's, which others need."""
    def larger(same: Passport) -> Passport:
        return msgspec.structs.replace(same, disks=tuple(
            msgspec.structs.replace(disk, size_bytes=(1 << 30) + 1) for disk in same.disks))

    async def story() -> None:
        await fleet.start()
        with pytest.raises(SkysailError, match="1073741825 bytes in a disk of 1 GiB"):
            await fleet.meet(change=larger)
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(fleet.passport, seed_bytes=1 << 40)),
                                type=Passport)
        await fleet.counts_on(fleet.here, "g-1")
    asyncio.run(story())


def test_a_stopped_guest_stays_when_its_target_dies(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(both=False, ballast_mib=8)
        await rest(fleet)
        await fleet.here.engine.ensure(await fleet.meet(msgspec.structs.replace(STEADY, off=True)))
        await fleet.flows("disks_port")
        fleet.there.cut_off("g-2")
        await fleet.ends("failed")
        assert (await fleet.here.engine.ensure(as_(fleet.started, sending=None))).state == "stopped"
        assert fleet.here.record("g-1").process is None
        await starts(fleet.here, fleet.started)
    asyncio.run(story())


def test_little_is_on_its_way_where_nobody_takes_it_in() -> None:
    """All of it would have to arrive while the guest stands still."""
    with socket.socket() as target:
        ferry.narrow(target)
        target.bind(("127.0.0.1", 0))
        target.listen()
        near, guest = socket.socketpair()
        carrying = threading.Thread(target=ferry.join, args=(near, f"127.0.0.1:{target.getsockname()[1]}"))
        carrying.start()
        there, _ = target.accept()
        with there, guest:
            guest.settimeout(1.0)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 16 << 20:
                    sent += guest.send(bytes(1 << 16))
            assert 0 < sent < 2 << 20
            guest.shutdown(socket.SHUT_WR)
            arrived = 0
            while data := there.recv(1 << 20):
                arrived += len(data)
            assert arrived == sent
            there.shutdown(socket.SHUT_WR)
        carrying.join()


# --- a QEMU that loses track of what its guest writes


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "follows_writes", lambda *_: False)


@pytest.mark.usefixtures("forgetful")
def test_a_guest_that_is_not_followed_stands_still_and_goes(fleet: Fleet) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet())
        progress = (await fleet.ends("sent")).progress
        assert progress is not None and progress.gap_ms == progress.pause_ms > 0
        await fleet.arrived()
    asyncio.run(story())


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("by", ["network", "owner", "next agent", "target"])
def test_a_guest_that_stands_still_for_nothing_goes_on(fleet: Fleet, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would give up by itself before a busy machine has come to what is tried here.
    monkeypatch.setattr(departure, "STILL_SECONDS", 60.0)

    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        going, usual = await fleet.meet(), weights("g-1")
        fleet.strait.cut("memory_port")
        await fleet.here.engine.ensure(going)
        await until(lambda: fleet.here.record("g-1").departure.stood, "it is about to be stopped")  # type: ignore[union-attr]
        await fleet.falls_silent(fleet.here, "g-1")
        assert weights("g-1") != usual, "it goes before others"
        if by == "network":
            fleet.strait.sever("memory_port")
            await fleet.ends("failed")
        if by == "target":
            fleet.there.cut_off("g-2")
            fleet.strait.mend()
            await fleet.ends("failed")
        if by == "next agent":
            await fleet.here.die()
            await fleet.here.open(fleet.started.port)
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="run"))).state == "running"
        await fleet.stayed()
        assert weights("g-1") == usual
    asyncio.run(story())


def weights(name: str) -> list[str]:
    """What the guest's process has of the processors, where others want them, too."""
    return [(folder / file).read_text().strip() for folder in confinement._folders(name) for file, _ in confinement.WEIGHTS
            if (folder / file).exists()]


# --- agents that die


def test_what_could_not_be_written_down_is_when_there_is_room_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        await fleet.start()
        going, save, full = await fleet.meet(), QemuGuest.save, [OSError(errno.ENOSPC, "full")]

        def failing(self: QemuGuest, **changes: Any) -> None:
            if full and changes.get("departure") is not None and changes["departure"].phase == "sent":
                raise full.pop()
            save(self, **changes)
        monkeypatch.setattr(QemuGuest, "save", failing)
        await fleet.here.engine.ensure(going)
        progress = (await fleet.ends("sent")).progress
        assert not full and progress is not None and progress.reason == "" and progress.disk_bytes > 0
        await fleet.arrived()
    asyncio.run(story())


@pytest.mark.parametrize("way", ["disks_port", "word_port"])
def test_the_next_agent_of_the_source_goes_on_with_it(fleet: Fleet, way: str) -> None:
    async def story() -> None:
        await fleet.prepare(way)
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.flows(way)
        fleet.strait.cut(way)
        await asyncio.sleep(1.0)
        await fleet.here.die()
        await fleet.counts_on(fleet.here, "g-1")
        fleet.strait.mend()
        await asyncio.sleep(1.0)
        await fleet.here.open(fleet.started.port)
        assert (await fleet.here.engine.ensure(going)).state in ("running", "sent")
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_a_source_whose_agent_died_while_it_stood_still_is_not_forgotten(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet(STEADY)
        await fleet.here.engine.ensure(going)
        await fleet.parts()
        await fleet.here.die()
        await fleet.here.open(fleet.started.port)
        assert [one.state for one in await fleet.here.engine.observe()] == ["sent"]
        assert (await fleet.here.engine.ensure(as_(fleet.started, role="send", sending=going.sending))).state == "running"
        fleet.strait.mend()
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_the_next_agent_of_the_target_waits_at_the_same_place(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        going = await fleet.meet()
        await fleet.there.die()
        await fleet.there.open(fleet.awaited.port)
        report = await fleet.there.engine.ensure(fleet.awaited)
        assert report.state == "listening"
        await fleet.here.engine.ensure(going)
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_the_next_agent_of_the_target_is_waited_for(fleet: Fleet) -> None:
    """The disks have gone over, and nobody is there who could say that they are on the target's disk."""
    async def story() -> None:
        await fleet.prepare("disks_port")
        await fleet.here.engine.ensure(await fleet.meet(STEADY))
        await fleet.flows("disks_port")
        await fleet.there.die()

        async def are_ready() -> bool:
            seen = await (await fleet.here.engine._guests["g-1"].monitor()).execute("query-jobs")
            return bool(seen) and all(one["status"] == "ready" for one in seen)
        end = time.monotonic() + PATIENCE_SECONDS
        while not await are_ready():
            assert time.monotonic() < end
            await asyncio.sleep(0.2)
        await asyncio.sleep(2)
        assert fleet.here.record("g-1").departure.phase == "mirroring"  # type: ignore[union-attr]
        await fleet.there.open(fleet.awaited.port)
        assert (await fleet.there.engine.ensure(fleet.awaited)).state == "listening"
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


class Doom:
    """Ends what an agent does before its n-th effect from now on, and whatever it would do after that."""

    def __init__(self, host: Host, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self._host = host
        self._number = number
        for owner, name in ((QemuGuest, "save"), (Monitor, "execute"), (line.Line, "ask"), (relay, "spawn"), (relay, "end")):
            self._wrap(owner, name, monkeypatch)

    def _wrap(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        former = getattr(owner, name)

        def stepping(*args: Any, **more: Any) -> Any:
            if any(map(self._is_ours, args)) and not str(args[1:2]).startswith("('query-"):
                self.steps.append(f"{name} {args[1] if name == 'execute' else ' '.join(more) or args[1:2]}")
                if len(self.steps) >= self._number:
                    raise asyncio.CancelledError
            return former(*args, **more)
        monkeypatch.setattr(owner, name, stepping)

    def _is_ours(self, subject: Any) -> bool:
        guests = list(self._host.engine._guests.values())
        lines = [departing._line for departing, _ in self._host.engine._departures.values()]
        folders = [one.folder for one in guests]
        return any(subject is one for one in (*guests, *lines, *(one._monitor for one in guests))) or subject in folders

    @property
    def struck(self) -> bool:
        return len(self.steps) >= self._number


async def dies_before_each_step(fleet: Fleet, side: str, more_than: int, terms: Terms = FREE) -> None:
    """The agent of one ``side`` dies before each of its steps, which are ``more_than`` so many, each time in another
    migration: the next agent brings that to its end."""
    for number in itertools.count(1):
        going = await fleet.meet(terms)
        host = fleet.here if side == "source" else fleet.there
        with pytest.MonkeyPatch.context() as patch:
            doom = Doom(host, number, patch)
            with contextlib.suppress(asyncio.CancelledError):
                await fleet.here.engine.ensure(going)
            await until(lambda doom=doom: doom.struck or fleet.is_over(), f"step {number} of {doom.steps}")
            await host.die()
        if not doom.struck:
            assert number > more_than, doom.steps
            print(doom.steps)
            return
        await host.open((fleet.started if side == "source" else fleet.awaited).port)
        await host.engine.ensure(going if side == "source" else fleet.awaited)
        await until(fleet.is_over, f"after a death at {doom.steps[-1]}")
        await fleet.counts_on(fleet.there, fleet.coming)
        await fleet.stands(fleet.here, fleet.going)
        assert fleet.continues(), doom.steps
        await fleet.turn()


@pytest.mark.parametrize(("side", "follows"), [("source", True), ("target", True), ("source", False)])
def test_an_agent_that_dies_before_any_of_its_steps_loses_nothing(fleet: Fleet, side: str, follows: bool,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "follows_writes", lambda *_: follows)

    async def story() -> None:
        await fleet.start()
        await dies_before_each_step(fleet, side, more_than=12 if side == "source" else 4)
    asyncio.run(story())


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_agent_that_dies_before_any_of_its_steps_loses_no_stopped_guest(fleet: Fleet, side: str) -> None:
    async def story() -> None:
        await rest(fleet)
        for number in itertools.count(1):
            going = await fleet.meet(OFF)
            host = fleet.here if side == "source" else fleet.there
            with pytest.MonkeyPatch.context() as patch:
                doom = Doom(host, number, patch)
                with contextlib.suppress(asyncio.CancelledError):
                    await fleet.here.engine.ensure(going)
                await until(lambda doom=doom: doom.struck or fleet.is_over(), f"step {number} of {doom.steps}")
                await host.die()
            if not doom.struck:
                assert number > (8 if side == "source" else 2), doom.steps
                print(doom.steps)
                await starts(fleet.there, as_(fleet.awaited, receiving=None))
                return
            await host.open((fleet.started if side == "source" else fleet.awaited).port)
            await host.engine.ensure(going if side == "source" else fleet.awaited)
            await until(fleet.is_over, f"after a death at {doom.steps[-1]}")
            assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="stop"))).state == "stopped", doom.steps
            await fleet.turn()
    asyncio.run(story())
