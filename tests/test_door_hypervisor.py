"""The hypervisor door: one suite for every engine. QEMU's guests are clones of the tests' template."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from clouds import ensure_image, real_settings, taken_slot
from skysail.contract.document import Guest, Personality, Port, Volume
from skysail.contract.report import GuestReport
from skysail.hypervisor import Hypervisor, confinement
from skysail.hypervisor.accelerator import probe
from skysail.hypervisor.confinement import kill
from skysail.hypervisor.engine import Qemu
from skysail.hypervisor.record import Record
from skysail.hypervisor.sim import SimHypervisor
from skysail.hypervisor.template import Image, Templates
from skysail.hypervisor.workshop import Workshop
from skysail.images.library import Library
from skysail.kit.config import load
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.resources.catalog import BUNDLES
from skysail.serve import processes
from skysail.serve.agent import surroundings
from skysail.storage.files import FilePool
from skysail.storage.shelf import FileShelf


class SimHouse:
    """A host without guests. Its table is all that there is: another agent's engine is the same one."""

    def __init__(self) -> None:
        self.engine = SimHypervisor()

    async def open(self) -> Hypervisor:
        return self.engine

    def guest(self) -> Guest:
        return Guest(
            id="g-1", instance="one", role="run", starts=1, reboots=0,
            vcpus=BUNDLES["nano_3_0"]["cpuCount"], memory_mib=512,  # one template for all tests
            volume=Volume(id="g-1", image="0" * 64, size_gib=20), personality=Personality(hostname="one", user="admin"),
            port=Port(id="g-1", mac="52:54:00:00:00:0a", network=1, private_ipv4="172.26.0.10", public_ipv4="192.0.2.10"))

    def cut_off(self, identifier: str) -> None:
        """The guest dies by itself."""
        self.engine.crash(identifier)

    def traces(self, identifier: str) -> list[object]:
        """What there is of a guest on this machine."""
        return []


class QemuHouse(SimHouse):
    """A host with QEMU; each :meth:`open` is the engine of another agent."""

    def __init__(self, folder: Path, slot: int) -> None:
        (folder / "skysail.toml").write_text(real_settings(slot))
        self.config = load(str(folder))
        self.image = ensure_image("debian_12")
        self.fabric = LinuxFabric(Layout.of(self.config))

    async def open(self) -> Hypervisor:
        library = Library(self.config.images_dir)
        accelerator = probe(self.config.accelerator_file).accelerator
        pool = FilePool(self.config.volumes_dir)
        await self.fabric.apply([self.guest().port])
        return Qemu(Workshop(
            guests=self.config.guests_dir, accelerator=accelerator, make_volume=pool.ensure, drop_volume=pool.remove,
            volumes=pool.observe,
            templates=Templates(self.config.templates_dir, accelerator, self.config.guest_uid_base),
            find_image=lambda digest: Image(digest=digest, path=library.path(digest), ours=True),
            open_port=self.fabric.open_port, give_volume=pool.give,
            shelf=FileShelf(self.config.snapshots_dir),
            around=lambda: surroundings(self.config)), self.config.guest_uid_base, self.config.relay_uid)

    def guest(self) -> Guest:
        plain = super().guest()
        public = self.config.public_pool.replace(".0/24", ".10")
        private = str(ipaddress.ip_network(self.config.private_network)[10])
        return msgspec.structs.replace(
            plain, volume=msgspec.structs.replace(plain.volume, image=self.image),
            port=msgspec.structs.replace(plain.port, public_ipv4=public, private_ipv4=private))

    def cut_off(self, identifier: str) -> None:
        record = msgspec.json.decode((self.config.guests_dir / identifier / "guest.json").read_bytes(), type=Record)
        assert record.process is not None
        kill(record.process.pid, record.process.started)

    def traces(self, identifier: str) -> list[object]:
        return [*processes.guests(self.config), *self.config.guests_dir.glob(identifier)]

    def remove(self) -> None:
        for record in processes.guests(self.config):
            processes.end(record, 0.1)
        asyncio.run(self.fabric.teardown())


@pytest.fixture(params=["sim", pytest.param("qemu", marks=pytest.mark.real)])
def house(request: pytest.FixtureRequest) -> Iterator[SimHouse]:
    if request.param == "sim":
        yield SimHouse()
        return
    folder = Path(tempfile.mkdtemp(prefix="sky"))  # a short path: it holds sockets
    folder.chmod(0o755)
    with taken_slot() as slot:
        made = QemuHouse(folder, slot)
        try:
            yield made
        finally:
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)


Body = Callable[[Hypervisor, Guest], Awaitable[None]]


def runs(house: SimHouse, *lives: Body) -> None:
    """Each body is the life of an agent of its own: the next one finds what it left."""
    for body in lives:
        async def whole(body: Body = body) -> None:
            await body(await house.open(), house.guest())
        asyncio.run(whole())
        gc.collect()  # an agent's connections end with it


def as_(guest: Guest, **changes: object) -> Guest:
    return msgspec.structs.replace(guest, **changes)


def seen(reports: list[GuestReport]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {report.id: (report.state, report.host_keys) for report in reports}


def test_a_healthy_machine_has_no_problems(house: SimHouse) -> None:
    async def body(hypervisor: Hypervisor, guest: Guest) -> None:
        assert await hypervisor.check() == []
    runs(house, body)


def test_a_guest_that_never_was_is_gone(house: SimHouse) -> None:
    async def body(hypervisor: Hypervisor, guest: Guest) -> None:
        for _ in range(2):
            assert (await hypervisor.ensure(as_(guest, role="gone"))).state == "gone"
        assert await hypervisor.observe() == []
        assert house.traces(guest.id) == []
    runs(house, body)


def test_what_a_guest_uses_is_counted_as_long_as_its_process_lives(house: SimHouse) -> None:
    processes: list[str] = []

    async def first(hypervisor: Hypervisor, guest: Guest) -> None:
        assert await hypervisor.usage() == {}
        await hypervisor.ensure(guest)
        used = (await hypervisor.usage())[guest.id]
        await hypervisor.bound(guest.id, guest.vcpus / 2)
        await hypervisor.bound(guest.id, guest.vcpus)
        again = (await hypervisor.usage())[guest.id]
        assert again.process == used.process and again.cpu_seconds >= used.cpu_seconds >= 0
        assert again.age_seconds >= used.age_seconds >= 0 and not again.busy
        processes.append(used.process)

    async def second(hypervisor: Hypervisor, guest: Guest) -> None:
        # Another agent goes on counting where the process stands, not where it began.
        assert (await hypervisor.usage())[guest.id].process == processes[0]
        await hypervisor.ensure(as_(guest, role="stop", force=True))
        assert await hypervisor.usage() == {}
        await hypervisor.bound(guest.id, 1.0)  # nothing to bind
        await hypervisor.ensure(as_(guest, starts=2))
        assert (await hypervisor.usage())[guest.id].process != processes[0]
    runs(house, first, second)


def test_a_guest_runs_once_however_often_it_is_asked_for(house: SimHouse) -> None:
    async def body(hypervisor: Hypervisor, guest: Guest) -> None:
        first = await hypervisor.ensure(guest)
        assert (first.state, first.starts, first.reboots) == ("running", 1, 0)
        assert len(first.host_keys) == 1 and first.host_keys[0].startswith("ssh-ed25519 ")
        held = house.traces(guest.id)
        both = await asyncio.gather(hypervisor.ensure(guest), hypervisor.ensure(guest))
        assert all(seen([again]) == seen([first]) for again in both)
        for _ in range(2):
            assert seen(await hypervisor.observe()) == seen([first])
        assert house.traces(guest.id) == held, "neither asking again nor looking changes anything"
    runs(house, body)


def test_another_agent_finds_the_guest_running(house: SimHouse) -> None:
    reports: list[GuestReport] = []
    held: list[object] = []

    async def first(hypervisor: Hypervisor, guest: Guest) -> None:
        reports.append(await hypervisor.ensure(guest))
        held.extend(house.traces(guest.id))

    async def second(hypervisor: Hypervisor, guest: Guest) -> None:
        assert seen(await hypervisor.observe()) == seen(reports)
        assert seen([await hypervisor.ensure(guest)]) == seen(reports)
        assert house.traces(guest.id) == held, "it is the same process"

    async def third(hypervisor: Hypervisor, guest: Guest) -> None:
        assert (await hypervisor.ensure(as_(guest, role="gone"))).state == "gone"
        assert await hypervisor.observe() == []
        assert house.traces(guest.id) == []

    runs(house, first, second, third)


def test_a_launch_that_was_called_off_is_made_anew(house: SimHouse) -> None:
    def called_off_after(seconds: float) -> Body:
        async def body(hypervisor: Hypervisor, guest: Guest) -> None:
            launch = asyncio.create_task(hypervisor.ensure(guest))
            await asyncio.wait((launch,), timeout=seconds)
            launch.cancel()
            await asyncio.wait((launch,))
        return body

    async def last(hypervisor: Hypervisor, guest: Guest) -> None:
        assert (await hypervisor.ensure(guest)).state == "running"
        assert (await hypervisor.ensure(as_(guest, role="gone"))).state == "gone"
        assert house.traces(guest.id) == []

    runs(house, *map(called_off_after, (0.05, 0.3, 0.8)), last)


def test_a_stopped_guest_keeps_its_identity(house: SimHouse) -> None:
    async def body(hypervisor: Hypervisor, guest: Guest) -> None:
        first = await hypervisor.ensure(guest)
        for _ in range(2):
            stopped = await hypervisor.ensure(as_(guest, role="stop", force=True))
            assert seen([stopped]) == {guest.id: ("stopped", first.host_keys)}
        again = await hypervisor.ensure(as_(guest, starts=2))
        assert seen([again]) == seen([first]) and again.starts == 2
    runs(house, body)


def test_a_guest_that_dies_is_told_of(house: SimHouse) -> None:
    async def body(hypervisor: Hypervisor, guest: Guest) -> None:
        first = await hypervisor.ensure(guest)
        news = hypervisor.changes()
        house.cut_off(guest.id)
        report = await asyncio.wait_for(anext(news), 60)
        assert seen([report]) == {guest.id: ("crashed", first.host_keys)}
        assert seen(await hypervisor.observe()) == {guest.id: ("crashed", first.host_keys)}
    runs(house, body)


@pytest.mark.real
def test_a_guest_that_is_not_to_be_held_up_is_bound_again_as_it_was() -> None:
    name = f"g-{secrets.token_hex(5)}"

    def bound() -> list[str]:
        return [file.read_text() for folder in confinement._folders(name)
                for file in (folder / "cpu.max", folder / "cpu.cfs_quota_us") if file.exists()]

    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            confinement.limit(name, process.pid, vcpus=1, memory_mib=64)
            confinement.bound(name, 0.1)
            before = bound()
            former = confinement.unbound(name)
            assert before and all(text.split()[0] in ("max", "-1") for text in bound())
            confinement.rebind(former)
            assert bound() == before
        finally:
            process.kill()
    confinement.release(name)
    assert confinement.unbound(name) == {}
