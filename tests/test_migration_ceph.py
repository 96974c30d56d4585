"""Guests that move between two hosts of this machine while their disks stay where they are: in a tiny Ceph cluster.

The hosts, the guest, and what is told to them are those of test_migration.py.
"""

from __future__ import annotations

import asyncio
import os
from asyncio import to_thread
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ticker
from ceph_clusters import CephCluster
from skysail.contract.document import Attachment, Guest, Origin, Snapshot, Volume
from skysail.contract.migration import Terms
from skysail.contract.report import SnapshotReport
from skysail.hypervisor import connections, departure, trail
from skysail.hypervisor.departure import Departing
from skysail.hypervisor.qmp import Monitor
from skysail.kit.errors import SkysailError
from skysail.storage.ceph import Cluster
from test_ceph import Store
from test_ceph_guests import settings
from test_migration import SLOW, STEADY, Fleet, as_, running_fleet, until

pytestmark = pytest.mark.real


@pytest.fixture
def cluster(ceph: CephCluster) -> Cluster:
    return ceph.namespace()


@pytest.fixture
def store(cluster: Cluster, tmp_path: Path) -> Store:
    return Store(cluster, tmp_path)


@pytest.fixture
def fleet(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Two hosts of one pool."""
    if os.geteuid() != 0:
        pytest.skip("real guests need root")
    monkeypatch.setattr(connections, "HANG_SECONDS", 45.0)
    with running_fleet(settings(cluster)) as made:
        made.awaited = as_(made.awaited, volume=made.started.volume)
        yield made


def left(guest: Guest) -> Guest:
    """What is told of it where it is not any more."""
    return as_(guest, role="gone", force=True, sending=None, receiving=None, leaves_disks=True)


async def turn(fleet: Fleet) -> None:
    """It has come: what was the source is to be the target next."""
    volume, disks = fleet.started.volume, fleet.started.disks
    fleet.started = as_(fleet.awaited, role=fleet.started.role, receiving=None)
    state = "running" if fleet.started.role == "run" else "stopped"
    assert (await fleet.there.engine.ensure(fleet.started)).state == state
    gone = as_(fleet.here.guest(fleet.going), volume=volume, disks=disks)
    assert (await fleet.here.engine.ensure(left(gone))).state == "gone"
    fleet.strait.close()
    fleet.here, fleet.there = fleet.there, fleet.here
    number = int(fleet.coming.removeprefix("g-")) + 1
    fleet.going, fleet.coming = fleet.coming, f"g-{number}"
    fleet.awaited = as_(fleet.there.guest(fleet.coming, role="receive"), volume=volume, disks=disks)
    fleet.here.told.clear()
    fleet.there.told.clear()


async def writer(store: Store, volume: str) -> str:
    """Who holds the exclusive lock of an image."""
    locks = await to_thread(store.ask, "lock", "ls", store.cluster.image(volume).spec)
    return str(locks[0]["locker"]) if locks else ""


async def volumes(store: Store) -> list[str]:
    return sorted(await store.pool.observe())


def test_a_guest_moves_without_its_disks_and_back(fleet: Fleet, store: Store) -> None:
    async def story() -> None:
        disk = Attachment(volume=Volume(id="d-1", image="", size_gib=1), name="xvdf")
        await fleet.here.pool.ensure(disk.volume, None, 1 << 30, 0)
        await to_thread(store.pattern, store.cluster.file("d-1"), 0x5A, write=True)
        await fleet.start(disks=(disk,))
        fleet.awaited = as_(fleet.awaited, disks=(disk,))
        for _ in range(2):
            before = await writer(store, "g-1")
            going = await fleet.meet()
            assert fleet.passport.pool == await to_thread(store.cluster.home) and "/disks/" in fleet.passport.pool
            assert [one.volume for one in fleet.passport.disks] == ["g-1", "d-1"]
            assert going.sending is not None and going.sending.destination is not None
            assert await writer(store, "g-1") == before, "who waits for it has the image open, and writes nothing"
            await fleet.here.engine.ensure(going)
            report = await fleet.ends("sent")
            assert report.progress is not None and report.progress.disk_bytes == 0 < report.progress.memory_bytes
            print(f"pause {report.progress.pause_ms:.0f} ms, gap {report.progress.gap_ms:.0f} ms")
            await fleet.arrived()
            assert await writer(store, "g-1") not in ("", before), "its lock went along"
            await turn(fleet)
            await fleet.counts_on(fleet.here, fleet.going)
            assert await volumes(store) == ["d-1", "g-1"]
        # It is a guest like any other: snapshots are taken of it, and it starts from its disk.
        taken = await fleet.here.engine.snapshot(Snapshot(
            id="s-1", role="keep", guest=fleet.going, volumes=(fleet.started.volume, disk.volume)), silent)
        assert taken.state == "available"
        for host in (fleet.here, fleet.there):
            assert [one.id for one in await host.engine.snapshots()] == ["s-1"], "every host of the pool has it"
        await to_thread(lambda: store.pattern(store.chain(Origin(snapshot="s-1", volume="d-1")), 0x5A))
        fleet.here.cut_off(fleet.going)
        report = await fleet.here.engine.ensure(fleet.started)
        assert report.state == "running"
        await fleet.counts_on(fleet.here, fleet.going)
        gone = await fleet.here.engine.ensure(as_(fleet.started, role="gone"))
        assert gone.state == "gone"
        await fleet.here.pool.remove("g-1")
        assert "g-1" not in await volumes(store)
    asyncio.run(story())


async def silent(report: SnapshotReport) -> None:
    pass


def test_a_target_that_dies_leaves_the_guest_where_it_was_with_its_disk(fleet: Fleet, store: Store) -> None:
    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(SLOW))
        await fleet.phase("moving")
        fleet.there.cut_off("g-2")
        await fleet.ends("failed")
        await fleet.stayed()
        assert (await fleet.there.engine.ensure(left(fleet.awaited))).state == "gone"
        assert await volumes(store) == ["g-1"], "what did not come takes nothing along"
        await fleet.counts_on(fleet.here, "g-1")
        await fleet.here.engine.ensure(as_(fleet.started, role="run"))
        fleet.here.told.clear()
        await fleet.here.engine.ensure(await fleet.meet())
        await fleet.ends("sent")
        await fleet.arrived()
    asyncio.run(story())


def test_a_target_that_dies_in_the_last_moment_has_the_guest_go_on_with_its_disk(fleet: Fleet) -> None:
    """Its source's process wrote last, and writes on: nobody had taken the image from it."""
    async def story() -> None:
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(STEADY))
        await fleet.parts()
        fleet.there.cut_off("g-2")
        await until(lambda: any(one.state == "failed" for one in fleet.there.told), "the target's agent saw it")
        fleet.strait.mend()
        report = await fleet.ends("failed")
        assert report.progress is not None and "did not run it" in report.progress.reason
        await fleet.stayed()
    asyncio.run(story())


def test_a_guest_whose_target_is_lost_starts_from_the_disk_that_it_may_have_written(fleet: Fleet) -> None:
    """It did run there, for a while: what the source remembers of its disk is not true any more."""
    async def story() -> None:
        await fleet.start()
        await fleet.here.engine.ensure(await fleet.meet(STEADY))
        await fleet.parts()
        await fleet.unheard()
        await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))
        await fleet.counts_on(fleet.there, "g-2")
        lost = fleet.there.record("g-2").process
        assert lost is not None
        await fleet.there.die()
        # Its host goes on unseen, as one does that is only cut off.
        report = await fleet.here.engine.ensure(as_(fleet.started, role="run", lost="g-2"))
        assert report.state == "running"
        await fleet.counts_on(fleet.here, "g-1")
        counted = ticker.counts(fleet.here.serial("g-1"))
        assert counted != sorted(counted), "it was started again"
        assert lost.alive()
        await until(lambda: set(ticker.complaints(fleet.there.serial("g-2"))), "the lost one writes nothing any more")
        await fleet.counts_on(fleet.here, "g-1")
    asyncio.run(story())


def test_files_do_not_go_to_a_pool(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        await fleet.meet()
        for other in ("", "ceph:another/disks"):
            passport = as_(fleet.passport, pool=other)
            assert fleet.awaited.receiving is not None
            stranger = as_(fleet.there.guest(f"g-9{len(other)}", role="receive"),
                           receiving=as_(fleet.awaited.receiving, passport=passport))
            report = await fleet.there.engine.ensure(stranger)
            assert report.state == "failed" and "its disks are " in report.reason, report
            with pytest.raises(SkysailError, match="did not come"):
                await fleet.there.engine.ensure(as_(stranger, role="run"))
            assert (await fleet.there.engine.ensure(left(stranger))).state == "gone"
        await fleet.counts_on(fleet.here, "g-1")
    asyncio.run(story())


@pytest.mark.parametrize("dies", ["", "source", "target"])
def test_a_stopped_guest_goes_by_word_alone(fleet: Fleet, store: Store, dies: str) -> None:
    """No process has its disks meanwhile. An agent that dies is followed by another one."""
    async def story() -> None:
        await fleet.start()
        fleet.started = as_(fleet.started, role="stop", force=True)
        assert (await fleet.here.engine.ensure(fleet.started)).state == "stopped"
        for _ in range(2):
            going = await fleet.meet(Terms(off=True))
            assert fleet.here.record(fleet.going).process is None and fleet.there.record(fleet.coming).process is None
            if dies:
                host = fleet.here if dies == "source" else fleet.there
                await host.die()
                await host.open()
                assert [one.state for one in await host.engine.observe() if one.id in (fleet.going, fleet.coming)] == [
                    "stopped" if dies == "source" else "listening"]
                await host.engine.ensure(going if dies == "source" else fleet.awaited)
            await fleet.here.engine.ensure(going)
            report = await fleet.ends("sent")
            assert report.progress is not None and report.progress.disk_bytes == report.progress.memory_bytes == 0
            await turn(fleet)
        started: Any = as_(fleet.started, role="run", starts=2)
        await fleet.here.open(started.port)
        assert (await fleet.here.engine.ensure(started)).state == "running"
        await fleet.counts_on(fleet.here, fleet.going)
        assert await volumes(store) == ["g-1"]
    asyncio.run(story())


def test_a_stopped_guest_that_is_started_before_it_went_stays(fleet: Fleet) -> None:
    async def story() -> None:
        await fleet.start()
        fleet.started = as_(fleet.started, role="stop", force=True)
        assert (await fleet.here.engine.ensure(fleet.started)).state == "stopped"
        going = await fleet.meet(Terms(off=True))
        fleet.strait.cut("word_port")
        await fleet.here.engine.ensure(going)
        await fleet.phase("ready", "mirroring")
        started = as_(fleet.started, role="run", force=False, starts=2)
        assert (await fleet.here.engine.ensure(started)).state == "running"
        await fleet.counts_on(fleet.here, "g-1")
        assert (await fleet.there.engine.ensure(left(fleet.awaited))).state == "gone"
        assert fleet.here.record("g-1").departure is None
    asyncio.run(story())


@pytest.mark.parametrize("dies", [False, True])
def test_memory_goes_after_a_guest_whose_disks_stay(fleet: Fleet, store: Store, monkeypatch: pytest.MonkeyPatch,
                                                    dies: bool) -> None:
    """If its source dies before all of it is there, it starts from the disks that both of them see."""
    async def slowly(monitor: Monitor, ways: connections.Connections) -> None:
        await monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 50_000})
        await trail.part(monitor, ways)
    monkeypatch.setattr(departure, "part", slowly)
    monkeypatch.setattr(Departing, "_gone_through", staticmethod(lambda seen: True))

    async def story() -> None:
        fleet.blueprint(busy=True)
        await fleet.start()
        before = await writer(store, "g-1")
        await fleet.here.engine.ensure(await fleet.meet(Terms(bytes_per_second=1_000_000, pause_ms=1, post_copy=True)))
        await until(lambda: fleet.there.record("g-2").made, "it runs there")
        if dies:
            fleet.here.cut_off("g-1")
        progress = (await fleet.ends("sent")).progress
        assert progress is not None and progress.post_copy and bool(progress.cut) == dies, progress
        if dies:
            assert (await fleet.there.engine.ensure(as_(fleet.awaited, role="run"))).state == "running"
            await fleet.counts_on(fleet.there, "g-2")
            await fleet.stands(fleet.here, "g-1")
        else:
            await fleet.arrived()
        assert await writer(store, "g-1") not in ("", before), "its lock went along"
        assert (await fleet.here.engine.ensure(left(fleet.started))).state == "gone"
        await fleet.counts_on(fleet.there, "g-2")
    asyncio.run(story())
