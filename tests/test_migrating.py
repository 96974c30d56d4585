"""The controller's side of a live migration: its rows, its workflow, its engine, with hosts of simulated guests that are
played here without processes. Each step is made by an engine that knows nothing but the rows, as after a restart.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select, update

from skysail.contract.document import HostDocument
from skysail.contract.facts import HostFacts
from skysail.contract.migration import Terms
from skysail.contract.qualification import Qualification, Trial
from skysail.contract.report import DiskReport, GuestReport, HostReport, Inventory, SnapshotReport
from skysail.contract.samples import GuestSample, Sample
from skysail.hosts import desired, outages, qualification, roster
from skysail.hosts.watch import write_facts, write_report
from skysail.hypervisor.sim import SimHypervisor
from skysail.inspect import blocks
from skysail.kit.errors import SkysailError
from skysail.operations import history
from skysail.operations.workflow import StepFailed, Workflow
from skysail.resources import disks as disk_rows
from skysail.resources import metering, migration, placing, snapshot_rows
from skysail.resources.migration import Migration
from skysail.serve import prometheus
from skysail.store.schema import disks, guests, host_zones, hosts, meters, moves, operations, snapshots
from test_workflows import IMAGE, Desk

ROUNDS = 100
FACTS = HostFacts(host="h", program="1", kernel="k", qemu="q", accelerator="sim", accelerator_seen="", cpu="c", cpu_flags=(),
                  cpu_models=("m",), machine_types=("pc",), guest_cpu="m", guest_machine="pc")


class Site:
    """A host whose guests are simulated: it does what its document says, and tells the rows."""

    def __init__(self, desk: Desk, host: str, pool: str) -> None:
        self.desk = desk
        self.host = host
        self.hypervisor = SimHypervisor(pool=pool)
        self.document: HostDocument | None = None
        self.answers = True
        self.qemu = ""
        self.went: dict[str, GuestReport] = {}

    async def tend(self) -> None:
        if not self.answers:
            return
        with self.desk.database.transaction(write=False) as connection:
            document = self.document
            # It is sent a document when its generation grew, and not because what would be in it is something else now.
            if document is None or document.generation < connection.execute(
                    select(hosts.c.generation).where(hosts.c.id == self.host)).scalar_one():
                self.document = document = desired.compile(connection, self.host, self.desk.vault)
        for guest in document.guests:
            report = await self.hypervisor.ensure(guest)
            if report.state == "gone":
                self.went[guest.id] = report
        for gone in self.went.keys() - {guest.id for guest in document.guests}:
            del self.went[gone]
        seen = (*(msgspec.structs.replace(one, qemu=self.qemu) for one in await self.hypervisor.observe()),
                *self.went.values())
        with self.desk.database.transaction() as connection:
            write_report(connection, self.host, HostReport(
                host=self.host, boot="b", sequence=1, generation=document.generation, vcpus=64, memory_mib=1 << 16,
                disk_gib=999, accelerator="sim", guests=seen, images=(IMAGE,),
                snapshots=tuple(SnapshotReport(id=one.id, state="available", progress=100) for one in document.snapshots),
                disks=tuple(DiskReport(id=one.id, state="gone" if one.role == "gone" else "available")
                            for one in document.disks)), self.desk.clock.now())

    async def running(self) -> set[str]:
        return {one.id for one in await self.hypervisor.observe() if one.state == "running"}

    def wanted(self, identifier: str) -> str:
        """The role of a guest in the document that was done last."""
        assert self.document is not None
        return next((one.role for one in self.document.guests if one.id == identifier), "")


class Hall:
    """A controller's desk, and its hosts, each with the pool that its disks are in."""

    def __init__(self, desk: Desk, count: int = 2, pools: Sequence[str] = ()) -> None:
        self.desk = desk
        pools = pools or [""] * count
        with desk.database.transaction() as connection:
            for number in range(2, count + 1):
                connection.execute(insert(hosts).values(id=f"host-{number}", address="nowhere:"))
                connection.execute(insert(host_zones).values(host_id=f"host-{number}", region="us-east-1", zone="a"))
            for number in range(1, count + 1):
                write_facts(connection, f"host-{number}", msgspec.structs.replace(FACTS, pool=pools[number - 1]),
                            desk.clock.now())
        self.config = desk.config
        flow = migration.workflow(self.config)
        desk.workflows |= {**disk_rows.WORKFLOWS, **snapshot_rows.WORKFLOWS, flow.name: flow}
        self.sites = {f"host-{number}": Site(desk, f"host-{number}", pools[number - 1]) for number in range(1, count + 1)}

    async def round(self) -> None:
        """Every host does what its document says, and the controller what follows."""
        for site in self.sites.values():
            await site.tend()
        self.drive()
        await asyncio.sleep(0.005)

    def drive(self) -> None:
        self.desk.drive()
        self.desk.follow()
        with self.desk.database.transaction() as connection:
            migration.sweep(connection)

    async def until(self, seen: Callable[[], Any], what: str = "") -> Any:
        for _ in range(ROUNDS):
            if answer := seen():
                return answer
            await self.round()
            await self.alone()
        raise AssertionError(f"did not happen: {what}: {self.desk.rows(moves)}")

    async def alone(self) -> None:
        """No instance runs twice, wherever its row is."""
        running: list[str] = []
        for row in self.desk.rows(guests):
            names = {row["id"], *(one for move in self.desk.rows(moves) if move["instance_id"] == row["instance_id"]
                                  for one in (move["id"], move["guest"]))}
            running = [f"{identifier} on {site.host}" for site in self.sites.values()
                       for identifier in await site.running() & names]
            assert len(running) <= 1, running

    async def launch(self, *names: str) -> None:
        for name in names:
            self.desk.create(name)
        await self.until(lambda: all(self.desk.state(name) == "running" for name in names), "they run")

    def begin(self, name: str = "one", to: str = "") -> str:
        with self.desk.database.transaction() as connection:
            found = migration.find_instance(connection, name, "us-east-1", "admin")
            return migration.begin(connection, found, self.desk.clock.now(), to, Terms())

    async def stop(self, name: str = "one") -> None:
        self.desk.ask("StopInstance", instanceName=name)
        await self.until(lambda: self.desk.state(name) == "stopped", "it is stopped")

    async def disk(self, name: str) -> None:
        made = self.desk.ask("CreateDisk", diskName=name, availabilityZone="us-east-1a", sizeInGb=8)
        await self.until(lambda: self.desk.operation(made)["done"], "the disk is made")

    def let_go(self, host: str) -> list[str]:
        """What is left on a host when others have what they see, too."""
        with self.desk.database.transaction() as connection:
            roster.cordon(connection, host, True)
            roster.let_go(connection, host)
            return roster.held(connection, host)

    def seen(self, operation: str) -> Migration:
        with self.desk.database.transaction(write=False) as connection:
            return migration.seen(connection, [operation])[0]

    async def over(self, operation: str) -> Migration:
        await self.until(lambda: self.seen(operation).state in ("succeeded", "failed"), "it is over")
        return self.seen(operation)

    async def clean(self) -> None:
        await self.until(lambda: not self.desk.rows(moves), "nothing of it is left")

    def guest(self, name: str = "one") -> dict[str, Any]:
        return next(row for row in self.desk.rows(guests) if row["instance_name"] == name)

    def phase(self) -> str:
        return next((row["phase"] for row in self.desk.rows(moves)), "")

    async def come_to(self, *phases: str) -> None:
        await self.until(lambda: self.phase() in phases, f"{phases}")


@pytest.fixture
def hall(desk: Desk) -> Hall:
    return Hall(desk)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.database.close()


def test_an_instance_goes_to_another_host(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        before = hall.guest()
        assert before["host_id"] == "host-1"
        told = await hall.over(hall.begin())
        assert (told.state, told.source, told.target, told.percent) == ("succeeded", "host-1", "host-2", 100), told
        assert told.why == "there is no other one" and told.report.seconds >= 0
        await hall.clean()
        after = hall.guest()
        assert after["host_id"] == "host-2" and after["id"] != before["id"]
        kept = ("mac", "private_ipv4", "public_ipv4", "public_ipv6", "host_keys", "starts", "reboots", "instance_id")
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert await hall.sites["host-2"].running() == {after["id"]}
        assert await hall.sites["host-1"].hypervisor.observe() == []
        assert hall.desk.state() == "running"
        # And back again, as another one.
        assert (await hall.over(hall.begin(to="host-1"))).why == "its operator wants it there"
        await hall.clean()
        assert hall.guest()["host_id"] == "host-1" and hall.guest()["id"] not in (before["id"], after["id"])
    asyncio.run(story())


def test_its_firewall_is_there_before_it_is(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        opened = {"protocol": "tcp", "fromPort": 8080, "toPort": 8080}
        hall.desk.ask("OpenInstancePublicPorts", instanceName="one", portInfo=opened)
        hall.begin()
        await hall.come_to("going")
        with hall.desk.database.transaction() as connection:
            here, there = ({port.from_port for guest in desired.compile(connection, host, hall.desk.vault).guests
                            for port in guest.port.firewall} for host in ("host-1", "host-2"))
        assert here == there >= {22, 8080}
    asyncio.run(story())


def test_what_makes_no_sense_is_refused(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        for words, arguments in (("no host host-9", {"to": "host-9"}), ("is on host-1 already", {"to": "host-1"}),
                                 ("no instance two", {"name": "two"})):
            with pytest.raises(SkysailError, match=words):
                hall.begin(**arguments)
        hall.begin()
        with pytest.raises(SkysailError, match="moves already"):
            hall.begin()
        await hall.until(lambda: hall.guest()["host_id"] == "host-2")
        hall.desk.ask("StopInstance", instanceName="one")
        assert hall.desk.state() == "stopping"
        with pytest.raises(SkysailError, match="is stopping"):
            hall.begin()
    asyncio.run(story())


def test_no_customer_hears_of_it(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.over(identifier)
        with hall.desk.database.transaction() as connection:
            for action, params in (("GetOperations", {}), ("GetOperationsForResource", {"resourceName": "one"})):
                found = hall.desk.actions[action](connection, hall.desk.request(action, params))
                assert [one["operationType"] for one in found["operations"]] == ["CreateInstance"]
    asyncio.run(story())


def test_a_target_is_chosen_as_a_placement_is(desk: Desk) -> None:
    hall = Hall(desk, 4)

    async def story() -> None:
        await hall.launch("one")
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-2", True)
            connection.execute(insert(guests).values(
                id="g-x", instance_id="i-x", instance_name="x", account_id=desk.account, host_id="host-3", role="stop",
                vcpus=1, memory_mib=512, disk_gib=20, image="", mac="52:54:00:00:00:99", private_ipv4="172.26.9.9",
                personality={"hostname": "x", "user": "x"}, network=1))
            connection.execute(update(hosts).where(hosts.c.id == hall.guest()["host_id"]).values(cordoned=False))
        source = hall.guest()["host_id"]
        told = await hall.over(hall.begin())
        wanted = "host-4" if source != "host-4" else "host-1"
        assert told.target == wanted and "host-2 is cordoned" in told.why and "would have come after it" in told.why
    asyncio.run(story())


def test_where_no_host_takes_it_in_it_stays(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        with hall.desk.database.transaction() as connection:
            roster.cordon(connection, "host-2", True)
        told = await hall.over(hall.begin())
        assert told.state == "failed" and told.error == "no host can take it in: host-2 is cordoned"
        assert hall.guest()["host_id"] == "host-1" and hall.desk.rows(moves) == []
    asyncio.run(story())


def test_agents_that_are_too_old_take_no_part_in_it(hall: Hall) -> None:
    """A document with a guest that moves would be one that they cannot read."""
    async def story() -> None:
        await hall.launch("one")
        for host, words in (("host-2", "no host can take it in: host-2 has an agent that is too old to take it in"),
                            ("host-1", "the agent of host-1 is too old to let it go")):
            with hall.desk.database.transaction() as connection:
                for one in ("host-1", "host-2"):
                    old = msgspec.structs.replace(FACTS, contract=2) if one == host else FACTS
                    write_facts(connection, one, old, hall.desk.clock.now())
            told = await hall.over(hall.begin())
            assert (told.state, told.error) == ("failed", words)
    asyncio.run(story())


def tried(hall: Hall, sender: str, receiver: str, *lost: str, quick: bool = False, at: float = 1.8e9) -> None:
    """Somebody tried this pair, in this direction."""
    with hall.desk.database.transaction() as connection:
        qualification.note(connection, [Qualification(
            sender=sender, receiver=receiver, machine="pc", accelerator="sim", kernel="k", at=at, quick=quick,
            trials=(Trial(shape="2 x m", condition="idle", way="live", differences=lost),))])


def upgraded(hall: Hall, host: str, version: str) -> None:
    with hall.desk.database.transaction() as connection:
        write_facts(connection, host, msgspec.structs.replace(FACTS, qemu=version), hall.desk.clock.now())


def test_between_versions_of_qemu_it_goes_where_that_was_tried(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        upgraded(hall, "host-2", "10 (new)")
        told = await hall.over(hall.begin())
        assert told.state == "failed" and "from QEMU q was never tried" in told.error, told
        tried(hall, "10 (new)", "q")
        assert (await hall.over(hall.begin())).state == "failed", "the other direction says nothing of this one"
        tried(hall, "q", "10 (new)", "CPU 0 CS.flags: 00af9b00 became 008f9300")
        told = await hall.over(hall.begin())
        assert "guests from QEMU q do not arrive whole: 1 of 1 trials failed on 2027-01-15" in told.error, told
        assert hall.guest()["host_id"] == "host-1" and hall.desk.rows(moves) == []
        tried(hall, "q", "10 (new)")
        assert (await hall.over(hall.begin())).state == "succeeded"
        await hall.clean()
        assert hall.guest()["host_id"] == "host-2"
    asyncio.run(story())


def test_its_operator_may_insist_on_a_version_that_was_not_tried(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        upgraded(hall, "host-2", "10 (new)")
        with hall.desk.database.transaction() as connection:
            found = migration.find_instance(connection, "one", "us-east-1", "admin")
            identifier = migration.begin(connection, found, hall.desk.clock.now(), "", Terms(), force=True)
        assert (await hall.over(identifier)).state == "succeeded"
    asyncio.run(story())


def test_what_counts_is_the_version_that_it_runs_under(hall: Hall) -> None:
    """Its host's packages were upgraded under it; its process is the former one."""
    async def story() -> None:
        await hall.launch("one")
        upgraded(hall, "host-1", "10 (new)")
        hall.sites["host-1"].qemu = "q"
        await hall.until(lambda: hall.guest()["observed_qemu"] == "q")
        assert (await hall.over(hall.begin())).state == "succeeded"
        await hall.clean()
        assert hall.guest()["host_id"] == "host-2" and hall.guest()["observed_qemu"] == ""
    asyncio.run(story())


def test_an_upgrade_is_refused_until_its_pair_was_tried_both_ways(hall: Hall) -> None:
    def against(version: str = "10") -> list[str]:
        with hall.desk.database.transaction() as connection:
            full, found = qualification.against_upgrade(connection, "host-1", version)
        assert full == "10 (new)"
        return found

    with pytest.raises(SkysailError, match="which QEMU 10 is meant is not known"):
        against()
    tried(hall, "q", "10 (new)")
    assert against() == ["from 10 (new) to q guests were never tried"]
    tried(hall, "10 (new)", "q", "lost")
    assert against() == ["from 10 (new) to q guests do not arrive whole"]
    tried(hall, "10 (new)", "q")
    assert against() == [] == against("10 (new)")
    # Whatever else is in the fleet counts, too.
    upgraded(hall, "host-2", "9 (other)")
    assert against() == ["from 9 (other) to 10 (new) guests were never tried",
                         "from 10 (new) to 9 (other) guests were never tried"]
    with hall.desk.database.transaction() as connection, pytest.raises(SkysailError, match="a host host-9 nothing is known"):
        qualification.against_upgrade(connection, "host-9", "10")


def test_a_quick_trial_does_not_hide_a_whole_one(hall: Hall) -> None:
    def known() -> tuple[bool, bool]:
        with hall.desk.database.transaction() as connection:
            (one,) = qualification.listed(connection)
        return one.quick, one.good

    tried(hall, "q", "r", quick=True)
    assert known() == (True, True)
    tried(hall, "q", "r", "lost")
    assert known() == (False, False)
    tried(hall, "q", "r", quick=True)
    assert known() == (False, False), "it saw less"
    tried(hall, "q", "r")
    tried(hall, "q", "r", "lost", quick=True)
    assert known() == (True, False), "what it saw is seen"


def test_no_more_go_at_a_time_than_a_host_bears(hall: Hall) -> None:
    async def story() -> None:
        names = ("one", "two", "three", "four", "five")
        await hall.launch(*names)
        with hall.desk.database.transaction() as connection:
            connection.execute(update(hosts).where(hosts.c.id == "host-2").values(cordoned=False))
        here = [name for name in names if hall.guest(name)["host_id"] == "host-1"]
        there = [name for name in names if name not in here]
        waiting = [hall.begin(name, "host-2" if name in here else "host-1") for name in (*here, *there)]
        most = 0
        while any(hall.seen(one).state in ("waiting", "under way") for one in waiting):
            await hall.round()
            await hall.alone()
            busy = [row for row in hall.desk.rows(moves) if row["phase"] not in ("landed", "clearing", "failed")]
            for host in ("host-1", "host-2"):
                count = sum(host in (row["source"], row["target"]) for row in busy)
                most = max(most, count)
        assert most == hall.config.migrations_per_host == 2
        assert all(hall.seen(one).state == "succeeded" for one in waiting)
    asyncio.run(story())


def test_a_copy_that_breaks_off_leaves_it_where_it_was(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        before = hall.guest()
        identifier = hall.begin()
        await hall.come_to("going")
        source = hall.sites["host-1"]
        await hall.until(lambda: source.wanted(before["id"]) == "send")
        await source.tend()
        source.hypervisor.break_off(before["id"], "the disk of the copy is full")
        told = await hall.over(identifier)
        assert told.state == "failed" and told.error == "the disk of the copy is full"
        await hall.clean()
        assert hall.guest() == before | {"observed_state": "running"}
        assert await source.running() == {before["id"]} and source.wanted(before["id"]) == "run"
        assert await hall.sites["host-2"].hypervisor.observe() == []
        # The next attempt is another one.
        assert (await hall.over(hall.begin())).state == "succeeded"
    asyncio.run(story())


@pytest.mark.parametrize("phase", ["meeting", "building", "going"])
def test_one_that_is_called_off_stays(hall: Hall, phase: str) -> None:
    async def story() -> None:
        await hall.launch("one")
        before = hall.guest()
        identifier = hall.begin()
        await hall.come_to(phase)
        with hall.desk.database.transaction() as connection:
            migration.call_off(connection, migration.find_instance(connection, "one", "us-east-1", "admin"), "enough")
        told = await hall.over(identifier)
        assert told.state == "failed" and told.error == "enough"
        await hall.clean()
        assert hall.guest()["id"] == before["id"] and await hall.sites["host-1"].running() == {before["id"]}
    asyncio.run(story())


@pytest.mark.parametrize("phase", ["meeting", "building", "going", "clearing"])
def test_an_owner_who_stops_it_has_it_stopped(hall: Hall, phase: str) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.come_to(phase)
        stopping = hall.desk.ask("StopInstance", instanceName="one")
        await hall.until(lambda: hall.desk.state() == "stopped", "it stops")
        assert hall.desk.operation(stopping)["status"] == "Succeeded"
        told = await hall.over(identifier)
        assert (told.state, told.error) in (("failed", "its owner stops it"), ("succeeded", ""))
        assert (told.state == "succeeded") == (phase == "clearing")
        await hall.clean()
        site = hall.sites[hall.guest()["host_id"]]
        assert [one.state for one in await site.hypervisor.observe()] == ["stopped"]
        hall.desk.ask("StartInstance", instanceName="one")
        await hall.until(lambda: hall.desk.state() == "running", "it starts where it is")
    asyncio.run(story())


@pytest.mark.parametrize("phase", ["meeting", "building", "going", "clearing"])
def test_an_owner_who_deletes_it_has_its_addresses_free_when_neither_host_has_it(hall: Hall, phase: str) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.come_to(phase)
        hall.desk.ask("DeleteInstance", instanceName="one")
        while hall.desk.rows(guests):
            await hall.round()
            if not hall.desk.rows(guests):
                break
        for site in hall.sites.values():
            assert await site.hypervisor.observe() == [], "its row stood for its addresses, which are free now"
        assert hall.seen(identifier).state in ("failed", "succeeded") and hall.desk.rows(moves) == []
    asyncio.run(story())


def test_a_reboot_that_is_asked_for_on_the_way_is_made_at_the_end_of_it(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.come_to("going")
        await hall.sites["host-1"].tend()  # it is on its way
        rebooting = hall.desk.ask("RebootInstance", instanceName="one")
        assert (await hall.over(identifier)).state == "succeeded"
        await hall.until(lambda: hall.desk.operation(rebooting)["done"], "the reboot is through")
        assert hall.guest()["observed_reboots"] == 1 and hall.guest()["host_id"] == "host-2"
        assert hall.desk.operation(rebooting)["arguments"]["guest"] == hall.guest()["id"]
    asyncio.run(story())


def test_its_disks_go_along(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        made = hall.desk.ask("CreateDisk", diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
        await hall.until(lambda: hall.desk.operation(made)["done"])
        assert hall.desk.rows(disks)[0]["host_id"] == "host-1"
        hall.desk.ask("AttachDisk", diskName="data", instanceName="one", diskPath="/dev/xvdf")
        await hall.until(lambda: hall.desk.rows(disks)[0]["attachment"] == "attached")
        identifier = hall.begin()
        await hall.come_to("going")
        source, target = hall.sites["host-1"], hall.sites["host-2"]
        await target.tend()
        assert target.document is not None and [one.name for one in target.document.guests[0].disks] == ["xvdf"]
        assert target.document.disks == (), "it is nothing that the target makes by itself"
        assert target.document.guests[0].port.awaited, "its addresses are at the source"
        await hall.come_to("clearing")
        removed = False
        while hall.desk.rows(moves):
            await hall.round()
            assert source.document is not None
            going = [one.id for one in source.document.disks if one.role == "gone"]
            assert not going or not await source.hypervisor.observe(), "nobody has it open"
            removed = removed or bool(going)
        assert removed, "its copy at the source is removed"
        assert (await hall.over(identifier)).state == "succeeded"
        row = hall.desk.rows(disks)[0]
        assert (row["host_id"], row["attachment"], row["role"]) == ("host-2", "attached", "keep")
        await target.tend()
        await source.tend()
        assert not target.document.guests[0].port.awaited
        assert [one.role for one in target.document.disks] == ["keep"]
        assert hall.desk.rows(disks)[0]["observed_state"] == "available", "what its source let go is not what it is"
    asyncio.run(story())


def test_a_disk_that_is_attached_meanwhile_calls_it_off(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        made = hall.desk.ask("CreateDisk", diskName="data", availabilityZone="us-east-1a", sizeInGb=8)
        await hall.until(lambda: hall.desk.operation(made)["done"])
        identifier = hall.begin()
        await hall.come_to("going")
        attaching = hall.desk.ask("AttachDisk", diskName="data", instanceName="one", diskPath="/dev/xvdf")
        told = await hall.over(identifier)
        assert told.state == "failed" and told.error == "its owner attached a disk, or detached one"
        await hall.until(lambda: hall.desk.operation(attaching)["done"])
        assert hall.desk.operation(attaching)["status"] == "Succeeded" and hall.guest()["host_id"] == "host-1"
    asyncio.run(story())


def test_a_snapshot_that_is_asked_for_on_the_way_is_taken_where_it_is_then(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.come_to("going")
        hall.desk.ask("CreateInstanceSnapshot", instanceName="one", instanceSnapshotName="kept")
        await hall.sites["host-1"].tend()
        assert hall.sites["host-1"].document is not None and hall.sites["host-1"].document.snapshots == ()
        assert (await hall.over(identifier)).state == "succeeded"
        await hall.until(lambda: hall.desk.rows(snapshots)[0]["state"] == "available")
        row = hall.desk.rows(snapshots)[0]
        assert (row["host_id"], row["guest_id"]) == ("host-2", hall.guest()["id"])
        assert [volume["id"] for volume in row["volumes"]] == [hall.guest()["id"]]
    asyncio.run(story())


def test_a_stopped_instance_goes_and_starts_where_it_is_then(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        await hall.disk("data")
        hall.desk.ask("AttachDisk", diskName="data", instanceName="one", diskPath="/dev/xvdf")
        await hall.until(lambda: hall.desk.rows(disks)[0]["attachment"] == "attached")
        await hall.stop()
        identifier = hall.begin()
        await hall.come_to("going")
        assert hall.desk.state() == "stopped" and hall.sites["host-1"].wanted(hall.guest()["id"]) == "stop"
        told = await hall.over(identifier)
        assert (told.state, told.target, told.off) == ("succeeded", "host-2", True), told
        await hall.clean()
        assert (hall.guest()["host_id"], hall.guest()["role"], hall.guest()["volume"]) == ("host-2", "stop", "")
        assert hall.desk.rows(disks)[0]["host_id"] == "host-2"
        assert await hall.sites["host-1"].hypervisor.observe() == []
        hall.desk.ask("StartInstance", instanceName="one")
        await hall.until(lambda: hall.desk.state() == "running", "it starts")
        assert await hall.sites["host-2"].running() == {hall.guest()["id"]}
    asyncio.run(story())


@pytest.mark.parametrize("phase", ["meeting", "building", "going", "clearing"])
def test_an_owner_who_starts_it_has_it_started(hall: Hall, phase: str) -> None:
    async def story() -> None:
        await hall.launch("one")
        await hall.stop()
        identifier = hall.begin()
        await hall.come_to(phase)
        hall.desk.ask("StartInstance", instanceName="one")
        await hall.until(lambda: hall.desk.state() == "running", "it starts")
        told = await hall.over(identifier)
        assert (told.state, told.error) == (("succeeded", "") if phase == "clearing" else ("failed", "its owner starts it"))
        await hall.clean()
        assert await hall.sites[hall.guest()["host_id"]].running() == {hall.guest()["id"]}
    asyncio.run(story())


# --- hosts whose disks are in one pool


def test_in_a_pool_an_instance_goes_without_its_disks(desk: Desk) -> None:
    hall = Hall(desk, pools=("ceph:a/p", "ceph:a/p"))

    def told_to_let_go(host: str) -> list[tuple[str, bool]]:
        document = hall.sites[host].document
        assert document is not None
        return [(guest.volume.id, guest.leaves_disks) for guest in document.guests if guest.role == "gone"]

    async def story() -> None:
        await hall.launch("one")
        await hall.disk("data")
        hall.desk.ask("AttachDisk", diskName="data", instanceName="one", diskPath="/dev/xvdf")
        await hall.until(lambda: hall.desk.rows(disks)[0]["attachment"] == "attached")
        first = hall.guest()
        volume = first["id"]
        for _ in range(2):
            source = hall.guest()["host_id"]
            identifier = hall.begin()
            await hall.come_to("going")
            await hall.come_to("clearing")
            await hall.sites[source].tend()
            assert told_to_let_go(source) == [(volume, True)], "what its guest was has no disks any more"
            assert (await hall.over(identifier)).state == "succeeded"
            while desk.rows(moves):
                await hall.round()
                document = hall.sites[source].document
                assert document is not None and all(one.role == "keep" for one in document.disks)
            assert hall.guest()["volume"] == volume != hall.guest()["id"] and hall.guest()["host_id"] != source
            assert desk.rows(disks)[0]["host_id"] == hall.guest()["host_id"]
        # A snapshot is of the volumes as they are called.
        desk.ask("CreateInstanceSnapshot", instanceName="one", instanceSnapshotName="kept")
        await hall.until(lambda: desk.rows(snapshots)[0]["state"] == "available")
        assert desk.rows(snapshots)[0]["volumes"][0]["id"] == volume
        # An attempt that fails takes nothing along.
        identifier = hall.begin()
        await hall.come_to("going")
        target = hall.seen(identifier).target
        with desk.database.transaction() as connection:
            migration.call_off(connection, migration.find_instance(connection, "one", "us-east-1", "admin"), "enough")
        await hall.come_to("failed")
        await hall.sites[target].tend()
        assert told_to_let_go(target) == [(volume, True)]
        await hall.clean()
        # Where it is at last, they go with it.
        desk.ask("DeleteInstance", instanceName="one")
        last = hall.guest()["host_id"]
        await hall.sites[last].tend()
        assert told_to_let_go(last) == [(volume, False)]
    asyncio.run(story())


def test_disks_go_where_they_are_seen_and_nowhere_else(desk: Desk) -> None:
    hall = Hall(desk, 4, pools=("ceph:a/p", "", "ceph:b/p", "ceph:a/p"))

    async def story() -> None:
        with desk.database.transaction() as connection:
            for other in ("host-2", "host-3", "host-4"):
                roster.cordon(connection, other, True)
        await hall.launch("one")
        with desk.database.transaction() as connection:
            for other in ("host-2", "host-3"):
                roster.cordon(connection, other, False)
        told = await hall.over(hall.begin())
        assert told.state == "failed", told
        assert "host-2 has disks in files of its own, and these are in ceph:a/p" in told.error
        assert "host-3 has disks in ceph:b/p, and these are in ceph:a/p" in told.error
        assert "host-4 is cordoned" in told.error and "host-4 is cordoned, has disks" not in told.error
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-4", False)
        assert (await hall.over(hall.begin())).target == "host-4"
        # And the other way round.
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-3", True)
            roster.cordon(connection, "host-4", True)
            roster.cordon(connection, "host-1", True)
        await hall.launch("two")
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-4", False)
        told = await hall.over(hall.begin("two"))
        assert "host-4 has disks in ceph:a/p, and these are in files of its own" in told.error
    asyncio.run(story())


def test_a_host_of_a_pool_is_emptied_of_everything(desk: Desk) -> None:
    hall = Hall(desk, pools=("ceph:a/p", "ceph:a/p"))

    async def story() -> None:
        await hall.launch("one")
        await hall.disk("data")
        desk.ask("CreateDiskSnapshot", diskName="data", diskSnapshotName="kept")
        await hall.until(lambda: desk.rows(snapshots)[0]["state"] == "completed")
        assert {row["host_id"] for row in (*desk.rows(disks), *desk.rows(snapshots))} == {"host-1"}
        await hall.stop()
        assert (await hall.over(hall.begin())).state == "succeeded"
        await hall.clean()
        assert hall.let_go("host-1") == []
        assert {row["host_id"] for row in (*desk.rows(disks), *desk.rows(snapshots))} == {"host-2"}
        for _ in range(3):
            await hall.round()
        assert desk.rows(disks)[0]["observed_state"] == desk.rows(snapshots)[0]["observed_state"] == "available"
        with desk.database.transaction() as connection:
            roster.remove(connection, "host-1")
    asyncio.run(story())


def test_what_is_in_files_or_being_made_stays_and_is_named(desk: Desk) -> None:
    hall = Hall(desk, 3, pools=("ceph:a/p", "ceph:a/p", ""))

    async def story() -> None:
        await hall.disk("made")
        desk.ask("CreateDisk", diskName="half", availabilityZone="us-east-1a", sizeInGb=8)
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-1", True)
            roster.cordon(connection, "host-2", True)
        await hall.disk("filed")
        assert hall.let_go("host-1") == ["disk half", "disk made"], "there is no host that takes it"
        with desk.database.transaction() as connection:
            roster.cordon(connection, "host-2", False)
        with desk.database.transaction() as connection:
            connection.execute(update(disks).where(disks.c.name == "half").values(made=False))
        assert hall.let_go("host-1") == ["disk half"]
        assert hall.let_go("host-3") == ["disk filed"]
    asyncio.run(story())


def test_a_disk_of_the_pool_is_attached_on_any_of_its_hosts(desk: Desk) -> None:
    hall = Hall(desk, pools=("ceph:a/p", "ceph:a/p"))

    async def story() -> None:
        await hall.launch("one")
        await hall.disk("data")
        assert (await hall.over(hall.begin(to="host-2"))).state == "succeeded"
        assert desk.rows(disks)[0]["host_id"] == "host-1"
        desk.ask("AttachDisk", diskName="data", instanceName="one", diskPath="/dev/xvdf")
        await hall.until(lambda: desk.rows(disks)[0]["attachment"] == "attached")
        assert desk.rows(disks)[0]["host_id"] == "host-2"
    asyncio.run(story())


def test_what_another_host_of_the_pool_has_there_is_not_lost_and_not_strange(desk: Desk) -> None:
    hall = Hall(desk, pools=("ceph:a/p", "ceph:a/p"))

    async def story() -> None:
        await hall.launch("one", "two")
        await hall.disk("data")
        assert (await hall.over(hall.begin("one"))).state == "succeeded"
        await hall.clean()
        with desk.database.transaction(write=False) as connection:
            first, second = (desired.compile(connection, host, desk.vault) for host in ("host-1", "host-2"))
        assert {one.instance for document in (first, second) for one in document.guests} == {"one", "two"}
        there = Inventory(guests=(), running=(), ports=(), snapshots=(),
                          volumes=(hall.guest("one")["volume"], hall.guest("two")["id"], desk.rows(disks)[0]["id"]))
        for document, other in ((first, second), (second, first)):
            assert list(blocks.host(document, there, set(), [other])) == []
            assert len(list(blocks.host(document, there, set(), []))) > 0, "without the other one's document it is strange"
            strange = msgspec.structs.replace(there, volumes=(*there.volumes, "g-left"))
            found = list(blocks.host(document, strange, set(), [other]))
            assert [one.subject for one in found] == ["volume g-left"]
    asyncio.run(story())


def test_a_pool_is_promised_once_whatever_hosts_see_it(desk: Desk) -> None:
    hall = Hall(desk, 3, pools=("ceph:a/p", "ceph:a/p", ""))

    async def story() -> None:
        await hall.launch("one")
        await hall.disk("data")
        with desk.database.transaction(write=False) as connection:
            promised = {one.id: one.promised_gib for one in placing.candidates(
                connection, hall.config, desk.account, desk.clock.now())}
        assert promised == {"host-1": 28, "host-2": 28, "host-3": 0}
    asyncio.run(story())


def test_a_target_that_falls_silent_before_it_begins_is_given_up(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        hall.sites["host-2"].answers = False
        await hall.come_to("building")
        with hall.desk.database.transaction() as connection:
            connection.execute(update(hosts).where(hosts.c.id == "host-2").values(away_since=hall.desk.clock.now()))
        for _ in range(5):
            await hall.round()
        assert hall.phase() == "building", "it may be an agent that is just being upgraded"
        hall.desk.clock.advance(migration.SILENT_SECONDS + 1)
        told = await hall.over(identifier)
        assert told.state == "failed" and told.error.startswith("host-2 has not answered for 6")
        assert hall.phase() == "failed", "what the target may have is not forgotten"
        hall.sites["host-2"].answers = True
        await hall.clean()
    asyncio.run(story())


def test_what_a_host_left_that_is_off_for_certain_ends_with_its_removal(hall: Hall) -> None:
    """Nobody waits any longer to hear from it that something is gone."""
    async def story() -> None:
        await hall.launch("one", "two")
        done = hall.begin("one")
        await hall.come_to("going")
        move = hall.desk.rows(moves)[0]
        lost = hall.sites[move["target"]]
        lost.answers = False
        with hall.desk.database.transaction() as connection:
            migration.call_off(connection, migration.find_instance(connection, "one", "us-east-1", "admin"), "enough")
        assert (await hall.over(done)).state == "failed" and hall.phase() == "failed"
        for name in ("one", "two"):
            if hall.guest(name)["host_id"] == lost.host:
                hall.desk.ask("DeleteInstance", instanceName=name)
        deleted = hall.desk.ask("DeleteInstance", instanceName="one")
        for _ in range(5):
            await hall.round()
        assert not hall.desk.operation(deleted)["done"], "it has its addresses there, too"
        with hall.desk.database.transaction() as connection:
            connection.execute(update(hosts).where(hosts.c.id == lost.host).values(away_since=hall.desk.clock.now()))
            with pytest.raises(SkysailError, match="still holds"):
                roster.remove(connection, lost.host)
            connection.execute(update(hosts).where(hosts.c.id == lost.host).values(address="https://x@192.0.2.9:8703"))
            outages.vouch(connection, lost.host, hall.desk.clock.now())
            roster.remove(connection, lost.host)
        del hall.sites[lost.host]
        await hall.until(lambda: hall.desk.operation(deleted)["done"], "it is let go")
        await hall.clean()
    asyncio.run(story())


def test_room_is_taken_at_both_ends(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        begun = hall.begin()
        await hall.come_to("going")

        def promised() -> dict[str, int]:
            with hall.desk.database.transaction(write=False) as connection:
                return {one.id: one.promised_mib for one in placing.candidates(
                    connection, hall.config, hall.desk.account, hall.desk.clock.now())}
        assert promised() == {"host-1": 512, "host-2": 512}
        with hall.desk.database.transaction(write=False) as connection:
            assert roster.held(connection, "host-2") == ["instance one on its way"]
        await hall.over(begun)
        await hall.clean()
        assert promised() == {"host-1": 0, "host-2": 512}
    asyncio.run(story())


def test_a_step_that_fails_is_undone_and_one_that_is_repeated_does_nothing_more(hall: Hall) -> None:
    """Each step of the workflow is failed once, as by an engine that finds it impossible."""
    flow = hall.desk.workflows[migration.WORKFLOW]

    async def story() -> None:
        await hall.launch("one")
        for number, step in enumerate(flow.steps[:-1]):
            def fails(*_: Any) -> bool:
                raise StepFailed("Planted", "as the test says")

            steps = list(flow.steps)
            steps[number] = dataclasses.replace(step, do=fails)
            hall.desk.workflows[migration.WORKFLOW] = Workflow(flow.name, tuple(steps))
            if number == len(flow.steps) - 2:
                break  # "go over" cannot fail by itself once it goes: only its source's word ends it
            told = await hall.over(hall.begin())
            assert (told.state, told.error) == ("failed", "as the test says")
            await hall.clean()
            assert hall.guest()["host_id"] == "host-1" and await hall.sites["host-1"].running() == {hall.guest()["id"]}
        hall.desk.workflows[migration.WORKFLOW] = flow
        identifier = hall.begin()
        while hall.seen(identifier).state != "succeeded":
            await hall.round()
            # The same again, as by another engine that took over in this moment: it commits what is new, or nothing.
            for _ in range(2):
                hall.desk.drive()
        await hall.clean()
        assert hall.guest()["host_id"] == "host-2"
    asyncio.run(story())


def test_a_controller_that_dies_at_any_commit_leaves_the_next_one_to_go_on(hall: Hall) -> None:
    """The transaction of each commit is lost once, and made again by an engine that starts from the rows."""
    class Killed(BaseException):
        pass

    async def story() -> None:
        await hall.launch("one")
        here, there = "host-1", "host-2"
        for number in range(1, 100):
            identifier = hall.begin()
            committed = 0
            flow = hall.desk.workflows[migration.WORKFLOW]

            def mortal(do: Callable[..., bool], last: int) -> Callable[..., bool]:
                def step(*told: Any) -> bool:
                    nonlocal committed
                    done = do(*told)
                    committed += 1
                    if committed == last:
                        raise Killed  # all that it wrote is rolled back
                    return done
                return step

            hall.desk.workflows[migration.WORKFLOW] = Workflow(flow.name, tuple(
                dataclasses.replace(one, do=mortal(one.do, number)) for one in flow.steps))
            struck = False
            while hall.seen(identifier).state not in ("succeeded", "failed"):
                try:
                    await hall.round()
                except Killed:
                    struck = True
                    hall.desk.workflows[migration.WORKFLOW] = flow
                await hall.alone()
            hall.desk.workflows[migration.WORKFLOW] = flow
            assert hall.seen(identifier).state == "succeeded", hall.seen(identifier)
            await hall.clean()
            assert hall.guest()["host_id"] == there and hall.desk.state() == "running"
            here, there = there, here
            if not struck:
                assert number > 5
                return
    asyncio.run(story())


def test_metrics_tell_of_it(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        identifier = hall.begin()
        await hall.come_to("going")
        with hall.desk.database.transaction(write=False) as connection:
            assert 'skysail_migrations{state="under_way"} 1' in prometheus.page(connection, hall.desk.clock.now())
        await hall.over(identifier)
        with hall.desk.database.transaction() as connection:
            told = history.find(connection, identifier)["arguments"]["report"] | {"pause_ms": 43.0, "memory_bytes": 7}
            connection.execute(update(operations).where(operations.c.id == identifier).values(
                arguments=history.find(connection, identifier)["arguments"] | {"report": told}))
            migration.note_outside(connection, identifier, 210.0, False)
            page = prometheus.page(connection, hall.desk.clock.now())
        for line in ('skysail_migrations_total{outcome="succeeded"} 1', 'skysail_migrations_total{outcome="failed"} 0',
                     'skysail_migration_bytes_total{of="memory"} 7', "skysail_migration_pause_seconds_sum 0.043",
                     "skysail_migration_pause_seconds_count 1", "skysail_migration_outside_seconds_max 0.21"):
            assert line in page.splitlines(), page
        report = hall.seen(identifier).report
        assert (report.outside_ms, report.broken, report.pause_ms) == (210.0, False, 43.0)
        assert msgspec.json.encode(report)
    asyncio.run(story())


def test_samples_of_both_ends_are_counted(hall: Hall) -> None:
    def sample(guest: str) -> Sample:
        return Sample(sequence=1, at=hall.desk.clock.now(), guests=(
            GuestSample(id=guest, condition="up", seconds=60.0, cpu_seconds=1.0, rx_bytes=10, tx_bytes=1),))

    async def story() -> None:
        await hall.launch("one")
        former = hall.guest()["id"]
        hall.begin()
        await hall.come_to("landed", "clearing")
        with hall.desk.database.transaction() as connection:
            metering.take_in(connection, {"host-1": [sample(former)]})
            metering.take_in(connection, {"host-2": [sample(hall.desk.rows(moves)[0]["id"])]})
            assert connection.execute(select(meters.c.rx_bytes)).scalar_one() == 20
    asyncio.run(story())
