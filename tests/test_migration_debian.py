"""A whole Debian guest, a clone of the tests' template with further memory plugged in, moves to another host and back while
it works: what it has in memory and on its disks is the same, its clock goes right, it does not take itself for a copy.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clouds import ensure_image, older_qemu, taken_slot
from skysail.contract.document import Attachment, Guest, Volume
from skysail.contract.migration import Progress, Receiving, Sending, Terms
from skysail.hypervisor import guest_agent
from skysail.hypervisor.process import PROGRAM
from skysail.hypervisor.template import Image
from skysail.images.library import Library
from test_migration import Host, until

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(3000)]
SECONDS = 600.0
USUAL = Terms()
# Much less than what a processor copies, even an emulated one.
SLOW = Terms(bytes_per_second=8 << 20, seconds=130)
# Which boot it is, what is in its memory and on its disks, and how often it was told that it is a copy (vmgenid).
KNOWN = """echo 3 > /proc/sys/vm/drop_caches; cat /proc/sys/kernel/random/boot_id
cd /; sha256sum dev/shm/memory var/tmp/disk mnt/xvdf/block; dmesg | grep -c 'virtual machine fork' || true"""


class DebianHost(Host):
    """A host with the tests' image; ``program`` is its QEMU."""

    def __init__(self, folder: Path, slot: int, program: str = PROGRAM) -> None:
        super().__init__(folder, slot, {})
        self.digest = ensure_image("debian_12")
        self.program = program

    def _image(self, digest: str) -> Image | None:
        return Image(digest=digest, path=Library(self.config.images_dir).path(digest), ours=True)

    def guest(self, name: str, **more: Any) -> Guest:
        plain = super().guest(name)
        return msgspec.structs.replace(plain, memory_mib=1024, volume=Volume(id=name, image=self.digest, size_gib=4), **more)

    async def tell(self, name: str, script: str) -> str:
        """What a shell in the guest prints."""
        async with guest_agent.reached(self.config.guests_dir / name / "run" / "agent.sock") as channel:
            ended = await guest_agent.run(channel, "/bin/sh", "-ec", script, seconds=SECONDS)
        assert ended.status == 0, ended.said
        return ended.said


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def move(here: DebianHost, guest: Guest, there: DebianHost, name: str, on: Terms = USUAL) -> Guest:
    """The guest runs there when this returns, and its former self is gone."""
    progress, coming = await attempt(here, guest, there, name, on)
    assert progress.state == "sent", progress
    assert (await there.engine.ensure(msgspec.structs.replace(coming, role="run"))).state == "running"
    assert (await here.engine.ensure(msgspec.structs.replace(guest, role="gone"))).state == "gone"
    for disk in guest.disks:
        await here.pool.remove(disk.volume.id)  # as the document says once its guest is gone
    return msgspec.structs.replace(coming, role="run")


async def attempt(here: DebianHost, guest: Guest, there: DebianHost, name: str, on: Terms) -> tuple[Progress, Guest]:
    """How an attempt ended, and what it would have come to."""
    sending = msgspec.structs.replace(guest, role="send", receiving=None, sending=Sending(guest=name, terms=on))
    report = await here.engine.ensure(sending)
    assert report.passport is not None, report
    coming = there.guest(name, role="receive", disks=guest.disks, receiving=Receiving(passport=report.passport, terms=on))
    report = await there.engine.ensure(coming)
    assert report.destination is not None, report
    here.told.clear()
    await here.engine.ensure(msgspec.structs.replace(sending, sending=Sending(
        guest=name, destination=report.destination, terms=on)))

    def over() -> Any:
        return [one.progress for one in here.told if one.progress is not None and (
            one.progress.state == "failed" or (one.progress.state == "sent" and not one.progress.reason))]
    progress = (await until(over, "it is over", SECONDS))[-1]
    print(f"{here.program} to {there.program}: {progress}")
    return progress, coming


@pytest.mark.parametrize("older", [False, True])
def test_a_debian_guest_moves_while_it_works_and_back(place: Path, older: bool) -> None:
    async def story(here: DebianHost, there: DebianHost) -> None:
        await here.open(here.port(10))
        await there.open(there.port(10))
        disk = Attachment(volume=Volume(id="d-1", image="", size_gib=1), name="xvdf", mount=True)
        await here.pool.ensure(disk.volume, None, 1 << 30, 0)
        guest = here.guest("g-1", disks=(disk,))
        assert (await here.engine.ensure(guest)).state == "running"
        await here.tell("g-1", """
            dd if=/dev/urandom of=/dev/shm/memory bs=1M count=64 2>/dev/null
            dd if=/dev/urandom of=/var/tmp/disk bs=1M count=24 2>/dev/null
            dd if=/dev/urandom of=/mnt/xvdf/block bs=1M count=16 2>/dev/null
            cat > /var/tmp/count <<'END'
            n=0
            while :; do n=$((n + 1)); echo $n >> /var/tmp/counted; sync -d /var/tmp/counted; done
END
            setsid sh /var/tmp/count > /dev/null 2>&1 &
            sync""")
        known = await here.tell("g-1", KNOWN)
        assert int(await here.tell("g-1", "grep MemTotal /proc/meminfo | tr -dc 0-9")) > 900_000, "the plan's memory is there"
        for name in ("g-2", "g-3"):
            guest = await move(here, guest, there, name)
            here, there = there, here
            before = int(await here.tell(name, "tail -n 1 /var/tmp/counted"))
            await asyncio.sleep(5)
            assert int(await here.tell(name, "tail -n 1 /var/tmp/counted")) > before, "its program goes on"
            assert await here.tell(name, "awk '$1 != NR' /var/tmp/counted") == "", "and missed nothing"
            assert await here.tell(name, KNOWN) == known
            # Asking takes its time, too; what it stood still for, its clock did.
            asked, told = time.time(), float(await here.tell(name, "date +%s.%N"))
            assert asked - 10 < told < time.time() + 10, "its clock goes right"

    with taken_slot() as first, taken_slot() as second:
        hosts = [DebianHost(place / "a", first, older_qemu() if older else PROGRAM), DebianHost(place / "b", second)]
        try:
            asyncio.run(story(*hosts))
        finally:
            for host in hosts:
                host.remove()


def test_a_debian_guest_that_writes_faster_than_it_is_sent_goes_by_post_copy_alone(place: Path) -> None:
    async def story(here: DebianHost, there: DebianHost) -> None:
        await here.open(here.port(10))
        await there.open(there.port(10))
        guest = here.guest("g-1")
        assert (await here.engine.ensure(guest)).state == "running"
        await here.tell("g-1", """
            dd if=/dev/urandom of=/dev/shm/memory bs=1M count=64 2>/dev/null
            cat > /var/tmp/busy <<'END'
            n=0
            while dd if=/dev/shm/memory of=/dev/shm/copy bs=1M conv=notrunc 2>/dev/null; do
                n=$((n + 1)); echo $n > /dev/shm/copied
            done
END
            setsid sh /var/tmp/busy > /dev/null 2>&1 &""")
        known = await here.tell("g-1", "cat /proc/sys/kernel/random/boot_id; sha256sum /dev/shm/memory")
        progress, coming = await attempt(here, guest, there, "g-2", SLOW)
        assert progress.state == "failed" and progress.rounds > 2, "it never comes to an end by itself"
        assert (await there.engine.ensure(msgspec.structs.replace(coming, role="gone"))).state == "gone"
        assert (await here.engine.ensure(guest)).state == "running"
        guest = await move(here, guest, there, "g-3", msgspec.structs.replace(SLOW, post_copy=True))
        before = int(await there.tell("g-3", "cat /dev/shm/copied"))
        await asyncio.sleep(5)
        assert int(await there.tell("g-3", "cat /dev/shm/copied")) > before, "its program goes on"
        assert await there.tell("g-3", "cat /proc/sys/kernel/random/boot_id; sha256sum /dev/shm/memory") == known

    with taken_slot() as first, taken_slot() as second:
        hosts = [DebianHost(place / "a", first), DebianHost(place / "b", second)]
        try:
            asyncio.run(story(*hosts))
        finally:
            for host in hosts:
                host.remove()
