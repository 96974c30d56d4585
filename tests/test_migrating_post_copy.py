"""The controller's side of a live migration by post-copy: it is offered where both agents know of it and the target can, and
the source is kept for as long as it is needed. With hosts as in test_migrating."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from skysail.contract.migration import Progress, Pull, Terms
from skysail.contract.report import GuestReport, HostReport
from skysail.hosts import outages
from skysail.hosts.transit import LAST_WORD_SECONDS
from skysail.hosts.watch import write_facts, write_report
from skysail.resources import migration
from skysail.serve import prometheus
from skysail.serve.migrate import summary, words
from skysail.store.schema import moves
from test_migrating import FACTS, Hall
from test_workflows import IMAGE, Desk

LACKS = "post-copy needs QEMU 8.0 and /dev/userfaultfd on the target: this is QEMU 7.2.22"


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    desk = Desk(tmp_path)
    yield Hall(desk)
    desk.database.close()


def tell(hall: Hall, **lacks: str | None) -> None:
    """What the hosts say of it, by their names."""
    with hall.desk.database.transaction() as connection:
        for host, why in lacks.items():
            write_facts(connection, host.replace("_", "-"), msgspec.structs.replace(FACTS, no_post_copy=why),
                        hall.desk.clock.now())


def begin(hall: Hall) -> str:
    with hall.desk.database.transaction() as connection:
        found = migration.find_instance(connection, "one", "us-east-1", "admin")
        return migration.begin(connection, found, hall.desk.clock.now(), "", Terms(post_copy=True))


@pytest.mark.parametrize(("here", "there", "error"), [
    ("", LACKS, f"no host can take it in: host-2 cannot take it in so ({LACKS})"),
    ("", None, "no host can take it in: host-2 cannot take it in so (its agent knows nothing of post-copy)"),
    (None, "", "the agent of host-1 is too old to let it go by post-copy")])
def test_hosts_that_do_not_offer_it_take_no_part_in_it(hall: Hall, here: str | None, there: str | None, error: str) -> None:
    async def story() -> None:
        await hall.launch("one")
        tell(hall, host_1=here, host_2=there)
        told = await hall.over(begin(hall))
        assert (told.state, told.error) == ("failed", error)
        assert hall.guest()["host_id"] == "host-1" and hall.desk.state() == "running" and not hall.desk.rows(moves)
    asyncio.run(story())


def test_a_source_need_not_be_able_to_take_in(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        tell(hall, host_1=LACKS, host_2="")
        told = await hall.over(begin(hall))
        assert told.state == "succeeded" and told.report.post_copy and not told.report.cut
        assert "by post-copy" in words(told) and summary(told)["way"] == "post-copy"
        with hall.desk.database.transaction(write=False) as connection:
            page = prometheus.page(connection, hall.desk.clock.now())
        assert 'skysail_migrations_by_post_copy_total{memory="whole"} 1' in page.splitlines()
    asyncio.run(story())


def test_one_that_is_stopped_has_no_memory_that_could_come_after_it(hall: Hall) -> None:
    async def story() -> None:
        await hall.launch("one")
        await hall.stop()
        told = await hall.over(begin(hall))  # no host has told that it offers it
        assert told.state == "succeeded" and not told.report.post_copy
    asyncio.run(story())


async def half_there(hall: Hall) -> str:
    """It runs at its target, and its source has some of its memory; the operation."""
    await hall.launch("one")
    tell(hall, host_1="", host_2="")
    identifier = begin(hall)
    source, target = (hall.sites[name].hypervisor for name in ("host-1", "host-2"))
    await hall.come_to("going")
    former, moved = hall.guest()["id"], hall.desk.rows(moves)[0]["id"]
    await hall.sites["host-1"].tend()
    source._call_off(former)
    source._change(former, state="sent", progress=Progress(guest=moved, state="sent", reason="memory", post_copy=True))
    target._change(moved, state="running", pull=Pull(state="coming"))
    await hall.come_to("landed")
    return identifier


def pull(hall: Hall, **said: str) -> None:
    """The target says how its memory stands."""
    with hall.desk.database.transaction() as connection:
        write_report(connection, "host-2", HostReport(
            host="host-2", boot="b", sequence=1, generation=0, vcpus=64, memory_mib=1 << 16, disk_gib=999, accelerator="sim",
            images=(IMAGE,), guests=(GuestReport(
                id=hall.guest()["id"], state="running", pull=Pull(**said)),)), hall.desk.clock.now())  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [{"state": "whole"}, {"state": "cut", "reason": "its source ended"}])
def test_its_source_is_kept_until_its_target_needs_it_no_more(hall: Hall, said: dict[str, str]) -> None:
    async def story() -> None:
        identifier = await half_there(hall)
        for _ in range(5):
            hall.desk.clock.advance(LAST_WORD_SECONDS + 1)
            await hall.round()
            assert hall.phase() == "landed" and hall.guest()["host_id"] == "host-2"
        pull(hall, **said)
        hall.desk.clock.advance(LAST_WORD_SECONDS + 1)
        told = await hall.over(identifier)
        assert told.state == "succeeded" and told.report.cut == said.get("reason", "")
        assert ("as after a power cut" in words(told)) == bool(told.report.cut)
        await hall.clean()
    asyncio.run(story())


def test_a_target_that_is_off_for_certain_needs_no_source(hall: Hall) -> None:
    async def story() -> None:
        await half_there(hall)
        hall.sites["host-2"].answers = False
        hall.desk.clock.advance(LAST_WORD_SECONDS + 1)
        await hall.round()
        assert hall.phase() == "landed"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outages, "is_fenced", lambda connection, host: host == "host-2")
            hall.desk.clock.advance(LAST_WORD_SECONDS + 1)
            await hall.round()
            await hall.come_to("clearing")
    asyncio.run(story())
