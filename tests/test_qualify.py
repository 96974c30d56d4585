"""What tells whether two versions of QEMU keep the same state of a guest: processors' registers, devices' descriptions and
the stream of a migration; and the trials that hold all of it against each other.

The older QEMU is unpacked from its Debian package, beside the one that is installed (see :func:`older`).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ticker
from clouds import older_qemu
from skysail.contract.qualification import Qualification
from skysail.hypervisor import qemu, registers, vmstate
from skysail.hypervisor.process import PROGRAM
from skysail.hypervisor.qmp import Monitor
from skysail.hypervisor.trial import cell, matrix, programs, stream, subject
from skysail.hypervisor.trial.cell import Condition, Shape
from skysail.kit.errors import SkysailError

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

DUMP = """
CPU#0
RAX=0000000000000000 RBX=ffffffff82a0c740 RCX=0000000000000000 RDX=0000000000000001
RIP=ffffffff81c3b1ae RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
ES =0000 0000000000000000 ffffffff 00c00000
CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]
TR =0040 fffffe0000003000 00004087 00008b00 DPL=0 TSS64-busy
GDT=     fffffe0000001000 0000007f
CR0=80050033 CR2=00007f1c2b1d3000 CR3=0000000001a0a000 CR4=000006f0
DR6=00000000ffff0ff0 DR7=0000000000000400
CCS=0000000000000000 CCD=0000000000000000 CCO=LOGICB
EFER=0000000000000d01
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80
FPR0=0000000000000000 0000 FPR1=0000000000000000 0000
XMM00=0000000000000000 00000000ff000000 XMM01=0000000000000000 0000000000000000
"""


def test_every_register_is_read() -> None:
    found = registers.parse(DUMP.replace("\n", "\r\n") + DUMP.replace("CPU#0", "CPU#1"))
    assert sorted(found) == [0, 1] and found[0] == found[1]
    assert found[0] | {"RBX": "ffffffff82a0c740", "CS.flags": "00af9b00", "CS.selector": "0010", "TR.limit": "00004087",
                       "GDT.base": "fffffe0000001000", "GDT.limit": "0000007f", "CR4": "000006f0", "MXCSR": "00001f80",
                       "FPR0": "0000000000000000 0000", "XMM00": "0000000000000000 00000000ff000000",
                       "EFER": "0000000000000d01"} == found[0]
    assert not {"HLT", "CCO", "CCD"} & found[0].keys()
    assert registers.differences(found, found) == []


def test_a_lost_bit_is_named() -> None:
    before = registers.parse(DUMP)
    after = registers.parse(DUMP.replace("00af9b00", "008f9300").replace("EFER=0000000000000d01", "EFER=0000000000000901")
                            .replace("FPR1=0000000000000000 0000", "FPR1=8000000000000000 3fff"))
    assert [str(one) for one in registers.differences(before, after)] == [
        "CPU 0 CS.flags: 00af9b00 became 008f9300 (L (64-bit code) lost, type 11 became 3)",
        "CPU 0 EFER: 0000000000000d01 became 0000000000000901 (LMA lost)",
        "CPU 0 FPR1: 0000000000000000 0000 became 8000000000000000 3fff"]
    assert str(registers.differences(before, {})[0]) == "CPU 0 RAX: 0000000000000000 became nothing"


def described(*fields: dict[str, Any], version: int = 1, least: int = 1, **more: Any) -> dict[str, Any]:
    return {"vmschkmachine": {"Name": "pc"}, "card": {"Description": {
        "name": "card", "version_id": version, "minimum_version_id": least, "Fields": list(fields), **more}}}


def field(name: str, size: int = 4, **more: Any) -> dict[str, Any]:
    return {"field": name, "version_id": 0, "field_exists": False, "size": size, **more}


@pytest.mark.parametrize(("sender", "receiver", "said"), [
    (described(field("a")), described(field("a")), []),
    (described(field("a")), described(field("a"), field("late", version_id=2), version=2), []),
    (described(field("a"), version=2), described(field("a")), ["card, state: version 2 is sent, 1 to 1 is loaded"]),
    (described(field("a")), described(field("a"), version=3, least=2),
     ["card, state: version 1 is sent, 2 to 3 is loaded"]),
    (described(field("a"), field("b")), described(field("a")),
     ["card, state.b: this field is sent, and the receiver does not load it"]),
    (described(field("b")), described(field("a"), field("b")),
     ["card, state.a: the receiver loads this field, and it is not sent"]),
    (described(field("a")), described(field("a", size=8)), ["card, state.a: 4 bytes are sent, 8 are loaded"]),
    (described(field("a"), field("old"), field("z")), described(field("a"), field("new"), field("z")), []),
    (described(field("a", field_exists=True)), described(),
     ["card, state.a: this field is sent, and the receiver does not load it (only where it is in use)"]),
    (described(Subsections=[{"name": "card/new"}]), described(),
     ["card, state > card/new: this part is sent, and the receiver does not know it (only where it is in use)"]),
    (described(), {"vmschkmachine": {"Name": "pc"}}, ["card, device: the receiver does not know its state"]),
    ({"vmschkmachine": {"Name": "pc"}}, {"vmschkmachine": {"Name": "other"}}, ["machine, type: pc is not other"]),
])
def test_what_does_not_fit_is_said(sender: dict[str, Any], receiver: dict[str, Any], said: list[str]) -> None:
    assert [str(one) for one in vmstate.check(sender, receiver, ["card"])] == said


# --- real ones


class Bare:
    """A QEMU process of this version with a counting guest, as QEMU prints and takes its state."""

    def __init__(self, folder: Path, program: str, *more: str) -> None:
        self.folder = folder
        (folder / "run").mkdir(parents=True)
        disk = ticker.image(folder / "disk.qcow2")
        machine = qemu.Machine(id=folder.name, accelerator="tcg", vcpus=2, memory_mib=64, folder=str(folder / "run"),
                               disk=(str(disk),), generation_id="11111111-2222-3333-4444-555555555555", incoming="in" in more)
        words = [word for word in more if word != "in"]
        self.process = subprocess.Popen([program, *qemu.argv(machine), *words], stdin=subprocess.DEVNULL)
        self.serial = folder / "run" / "serial.log"
        self.monitor: Monitor = None  # type: ignore[assignment]

    async def open(self) -> Bare:
        self.monitor = await Monitor.connect(self.folder / "run" / "qmp.sock", 60)
        return self

    async def registers(self) -> dict[int, dict[str, str]]:
        return registers.parse(await self.monitor.execute("human-monitor-command", {"command-line": "info registers -a"}))

    async def migrated(self, way: str, done: tuple[str, ...]) -> str:
        await self.monitor.execute(way, {"uri": f"unix:{self.folder.parent / 'state.sock'}"})
        if way == "migrate-incoming":
            return ""
        for _ in range(6000):
            status: str = (await self.monitor.execute("query-migrate")).get("status", "")
            if status in done:
                return status
            await asyncio.sleep(0.01)
        raise AssertionError("it does not end")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("upwards", [True, False])
def test_a_paused_guest_keeps_its_registers_between_versions(place: Path, upwards: bool) -> None:
    first, second = (older_qemu(), PROGRAM) if upwards else (PROGRAM, older_qemu())

    async def story() -> None:
        await source.open()
        await target.open()
        await source.monitor.execute("cont")
        for _ in range(6000):
            if len(ticker.counts(source.serial)) > 5:
                break
            await asyncio.sleep(0.01)
        await source.monitor.execute("stop")
        before = await source.registers()
        await target.migrated("migrate-incoming", ())
        assert await source.migrated("migrate", ("completed", "failed")) == "completed"
        after = await target.registers()
        assert len(before) == 2 and len(before[0]) > 40
        assert registers.differences(before, after) == []
        if not upwards:
            return
        # What is lost is found: one register is changed behind the guest's back, by the debugger's protocol.
        reader, writer = await asyncio.open_unix_connection(str(place / "gdb.sock"))
        writer.write(b"$?#3f")
        await reader.readuntil(b"#")
        packet = b"P1=" + (0x1122334455667788).to_bytes(8, "little").hex().encode()  # RBX, in the order of org.gnu.gdb.i386
        writer.write(b"+$" + packet + b"#%02x" % (sum(packet) % 256))
        await asyncio.wait_for(reader.readuntil(b"OK"), 60)
        writer.close()
        (lost,) = registers.differences(before, await target.registers())
        # In real mode QEMU prints the lower halves.
        assert (lost.cpu, lost.register, lost.after) == (0, "EBX", "55667788")

    source = Bare(place / "a", first)
    target = Bare(place / "b", second, "in", "-gdb", f"unix:{place}/gdb.sock,server=on,wait=off")
    try:
        asyncio.run(story())
    finally:
        source.end()
        target.end()


def dump(program: str, place: Path, machine: str = qemu.MACHINE) -> Any:
    path = place / f"{Path(program).parent.name or 'own'}-{machine}.json"
    subprocess.run([program, "-machine", machine, "-display", "none", "-dump-vmstate", str(path)], check=True,
                   stdin=subprocess.DEVNULL)
    return json.loads(path.read_text())


def test_what_debians_versions_say_of_their_devices(place: Path) -> None:
    older, newer = dump(older_qemu(), place), dump(PROGRAM, place)
    assert len(vmstate.DEVICES & older.keys() & newer.keys()) > 15, "they are called by these names"
    both = vmstate.check(older, newer) + vmstate.check(newer, older)
    assert [str(one) for one in both if one.fatal] == []
    assert vmstate.check(newer, newer) == []
    assert "is not" in str(vmstate.check(newer, dump(PROGRAM, place, "pc-q35-10.0"))[0])
    planted = json.loads(json.dumps(newer))
    planted["virtio-blk-device"]["Description"]["version_id"] += 1
    assert [one.device for one in vmstate.check(planted, older) if one.fatal] == ["virtio-blk-device"]


# --- the stream of a migration


def sent(*fields: tuple[str, bytes], name: str = "card", subsection: tuple[str, bytes] | None = None) -> bytes:
    """A stream with memory and one device, as QEMU writes it."""
    described: dict[str, Any] = {"name": name, "instance_id": 0, "vmsd_name": name, "version": 1, "fields": [
        {"name": field, "type": "buffer", "size": len(value)} for field, value in fields]}
    more = b""
    if subsection is not None:
        described["subsections"] = [{"vmsd_name": subsection[0], "version": 1, "fields": [
            {"name": "more", "type": "buffer", "size": len(subsection[1])}]}]
        more = b"\x05" + bytes([len(subsection[0])]) + subsection[0].encode() + (1).to_bytes(4, "big") + subsection[1]
    text = json.dumps({"configuration": {"vmsd_name": "configuration", "fields": []}, "page_size": 4096,
                       "devices": [described]})
    word = lambda value, size=4: value.to_bytes(size, "big")  # noqa: E731
    memory = (b"\x01" + word(2) + b"\x03ram" + word(0) + word(4) + word(4096 | 0x04, 8) + b"\x06pc.ram" + word(4096, 8)
              + word(0x02, 8) + b"\x06pc.ram" + b"\0" + word(0x08 | 0x20, 8) + bytes(4096) + word(0x10, 8) + b"\x7e"
              + word(2))
    device = (b"\x04" + word(3) + bytes([len(name)]) + name.encode() + word(0) + word(1)
              + b"".join(value for _, value in fields) + more + b"\x7e" + word(3))
    return (stream.MAGIC + b"\x07" + word(10) + b"pc-q35-7.2" + memory + device + b"\0\x06" + word(len(text)) + text.encode())


def test_a_stream_is_taken_apart() -> None:
    found = stream.devices(sent(("status", b"\1\2"), ("level", b"\3"), subsection=("card/late", b"\4")))
    assert found == {"card: status": b"\1\2", "card: level": b"\3", "card: (card/late)": b"", "card: (card/late).more": b"\4"}
    for broken in (b"", b"QEVM", sent(("status", b"\1"))[:-40]):
        with pytest.raises(stream.Unreadable):
            stream.devices(broken)


@pytest.mark.parametrize(("ours", "theirs", "said"), [
    (sent(("a", b"\1")), sent(("a", b"\1")), []),
    (sent(("a", b"\1")), sent(("a", b"\1"), ("new", b"\2")), []),
    (sent(("old", b"\1")), sent(("new", b"\1")), []),
    (sent(("old", b"\1")), sent(("new", b"\2")), ["card: old: 01 became 02"]),
    (sent(("a", b"\1"), ("b", b"\2\2")), sent(("a", b"\1")), ["card: b was sent and is not kept"]),
    (sent(("a", bytes(40))), sent(("a", bytes(30) + b"\7" + bytes(9))),
     ["card: a: 0000000000000000 became 0700000000000000 (at byte 30 of 40)"]),
    (sent(("a", b"\1"), subsection=("card/late", b"\4")), sent(("a", b"\1")),
     ["card: (card/late), (card/late).more was sent and is not kept"]),
    (sent(("a", b"\1")), sent(("a", b"\1"), name="other"), ["card: its state was sent and is not kept"]),
    (sent(("size", b"\1"), name="globalstate"), sent(("a", b"\1")), []),
])
def test_what_a_receiver_does_not_keep_is_said(ours: bytes, theirs: bytes, said: list[str]) -> None:
    assert stream.differences(stream.devices(ours), stream.devices(theirs)) == said


# --- trials


def test_the_guest_is_what_its_source_says(tmp_path: Path) -> None:
    """It is kept as it was built, for machines without a compiler."""
    source = Path(subject.__file__).with_name("guest.c")
    if shutil.which("gcc") is None:
        pytest.skip("no compiler is here")
    words = source.read_text().partition("Built by:")[2].partition("\n *\n * Source")[0].replace("\n *", " ").split()
    words[words.index("guest.bin")] = str(tmp_path / "guest.bin")
    subprocess.run(words, cwd=source.parent, check=True)
    version = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    if version != "12.2.0":
        pytest.skip(f"gcc {version} builds another one than gcc 12.2.0, by which it was")
    assert (tmp_path / "guest.bin").read_bytes() == source.with_suffix(".bin").read_bytes()


def shape(vcpus: int = 2) -> Shape:
    return Shape(machine=qemu.MACHINE, accelerator="tcg", cpu="qemu64", vcpus=vcpus)


@pytest.mark.parametrize(("upwards", "condition", "live"), [
    (True, "computing", True), (False, "busy", True), (False, "booting", False), (False, "dirtying", True)])
def test_a_guest_gets_whole_from_one_version_to_another(upwards: bool, condition: Condition, live: bool) -> None:
    pair = (older_qemu(), PROGRAM) if upwards else (PROGRAM, older_qemu())
    assert cell.run(*pair, shape(), condition, live) == []


def test_writes_that_a_version_loses_while_memory_is_sent_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulating QEMU 7.2 does; so its guests stand still then, when they move and when they are tried."""
    assert cell.run(older_qemu(), PROGRAM, shape(), "dirtying", True) == []
    monkeypatch.setattr(cell, "follows_writes", lambda *_: True)
    found = cell.run(older_qemu(), PROGRAM, shape(), "dirtying", True)
    assert any("pages of memory are not the same" in one for one in found), found
    assert "the guest says that its memory changed" in found


def planted(place: Path, words: str, script: str = "") -> str:
    """A QEMU that is another one by the words that are added to its own."""
    program = place / PROGRAM
    program.write_text(f"#!/bin/bash\n{script}\nexec {shutil.which(PROGRAM)} \"$@\" {words}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(("words", "script", "said"), [
    # A device that takes its state in, and does not send it on.
    ("-global isa-pcspk.migrate=off", "", "pcspk: its state was sent and is not kept"),
    ("-global virtio-pci.migrate-extra=off", "", "virtio-blk: virtio: "),
    # A clock that goes by another time: nothing but the guest sees that.
    ("-rtc clock=vm", "", "its clock shows"),
    # A processor that says that it can do less: nor is that in any state.
    ("-global qemu64-x86_64-cpu.cx16=off", "", "the guest says that CPUID says something else"),
    # Another machine type under the same name.
    ("", 'set -- "${@//pc-q35-7.2/pc-q35-7.1}"', "the receiver does not take it in: "),
])
def test_what_is_planted_is_found(place: Path, words: str, script: str, said: str) -> None:
    other = planted(place, words, script)
    if not script:
        before, after = dump(PROGRAM, place), dump(other, place)
        assert vmstate.check(before, after) == vmstate.check(after, before) == [], "what it says of itself does not show it"
    found = cell.run(PROGRAM, other, shape(), "idle", False)
    assert any(said in one for one in found), found


def test_what_is_tried() -> None:
    own = qemu.cpu_model("tcg")
    whole = matrix.planned("tcg", qemu.MACHINE, (own, "Westmere"), False)
    quick = matrix.planned("tcg", qemu.MACHINE, (own, "Westmere"), True)
    assert {one.condition for one in quick} == {one.condition for one in whole} == set(matrix.CONDITIONS)
    assert {one.live for one in quick} == {True, False} and len(quick) == len(matrix.CONDITIONS)
    assert {(one.condition, one.live) for one in whole} == set(product(matrix.CONDITIONS, (True, False)))
    assert {one.shape.cpu for one in whole} == {own, "Westmere"} and {one.shape.vcpus for one in whole} == {1, 2, 4}
    assert {one.shape.cpu for one in matrix.planned("kvm", qemu.MACHINE, ("Westmere",), False)} == {"Westmere"}


def test_a_version_is_found(place: Path) -> None:
    folder = Path(older_qemu()).parent
    found = programs.find("7.2", "tcg", [str(folder)], place)
    assert found.path == str(folder / PROGRAM) and found.offer.qemu.startswith("7.2.")
    assert programs.find(found.offer.qemu, "tcg", [str(folder)], place) == found
    assert programs.find(str(folder), "tcg", [], place) == found
    assert programs.find("10", "tcg", [str(folder)], place).path == shutil.which(PROGRAM)
    for word in ("99.9", "/nowhere", "10.0.2 (of somebody)"):
        with pytest.raises(SkysailError):
            programs.find(word, "tcg", [], place)


def qualified(place: Path, *words: str, status: int = 0) -> list[Qualification]:
    """What ``skysail qualify`` says, without a cloud."""
    done = subprocess.run([sys.executable, "-m", "skysail.cli.main", "qualify", "--json", *words], capture_output=True,
                          text=True, env={**os.environ, "SKYSAIL_DATA": str(place)}, check=False)
    assert done.returncode == status, done.stderr[-4000:]
    return msgspec.json.decode(done.stdout, type=list[Qualification])


@pytest.mark.long
def test_debians_versions_are_qualified(place: Path) -> None:
    """All that is tried, both ways."""
    upwards, downwards = qualified(place, "--qemu", str(Path(older_qemu()).parent), "--qemu", "10.0")
    assert (upwards.sender, upwards.receiver) == (downwards.receiver, downwards.sender)
    assert upwards.good and downwards.good and len(upwards.trials) == 25 and not upwards.quick


@pytest.mark.long
def test_a_planted_version_is_not_qualified(place: Path) -> None:
    planted(place, "-global isa-pcspk.migrate=off")
    there, _ = qualified(place, "--quick", "--qemu", "10.0", "--qemu", str(place), status=1)
    assert [one.way for one in there.trials if not one.differences] == ["described"]
    assert there.quick and not there.good
