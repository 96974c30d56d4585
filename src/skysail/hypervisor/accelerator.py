"""Which accelerator really runs a guest here. That /dev/kvm opens, or even that firmware runs on it, proves nothing: nested
in some clouds it fails at the first 64-bit SSE instruction. So a boot sector goes there and signals (see probe.s).
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from skysail.hypervisor import qemu
from skysail.hypervisor.process import PROGRAM
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import run

Accelerator = Literal["kvm", "tcg"]
KVM = Path("/dev/kvm")
PROBE_SECONDS = 5.0
# isa-debug-exit ends QEMU with (value << 1) | 1; the probe writes 42.
SIGNAL = 85
_SECTOR = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cbf00106631c0b9000cfc66f3ab66c70600100320000066c70600200330000066c7060030"
    "830000000f011ede7c0f20e06683c8200f22e066b8001000000f22d866b9800000c00f32660d000100000f300f20c066"
    "0d010000800f22c00f0116d87cea727c080066b810008ed88ec08ed048c7c4007c00000f20c024fb0c020f22c00f20e0"
    "660d00060f22e048b8887766554433221166480f6ec066480f7ec34839c375feb900001000e2feb02ae6f4f4ebfe6690"
    "0000000000000000ffff0000009aaf00ffff00000092cf001700c07c")


# The first version that is known to follow what an emulated guest writes, while its memory is sent.
FOLLOWS_SINCE = 10


def follows_writes(accelerator: Accelerator, version: str) -> bool:
    """Whether a QEMU knows of each page that a running guest writes to. KVM does. Emulating QEMU 7.2 forgets pages that a
    processor keeps writing to without a pause: from its second look at the memory on it sees no write to them, and what goes
    over is what they held then. A guest of such a QEMU has to stand still before its memory is sent (docs/decisions/0044).
    ``version`` is in the words of an offer."""
    return accelerator == "kvm" or int(version.partition(".")[0] or 0) >= FOLLOWS_SINCE


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was tried and seen. ``seen`` says why it is not KVM, when it is not."""

    accelerator: Accelerator
    seen: str
    facts: str


def tried(accelerator: Accelerator) -> str:
    """Run the probe under one accelerator: empty when it signalled, else what happened; raises SkysailError without QEMU."""
    with tempfile.NamedTemporaryFile(suffix=".img") as image:
        image.write((_SECTOR.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
        image.flush()
        argv = [PROGRAM, "-machine", qemu.MACHINE, "-accel", accelerator, "-cpu", qemu.cpu_model(accelerator), "-m", "32M",
                "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot", "-device",
                "isa-debug-exit,iobase=0xf4,iosize=1", "-drive", f"file={image.name},format=raw,if=none,id=probe",
                "-device", "virtio-blk-pci,drive=probe,bootindex=0"]
        try:
            done = subprocess.run(argv, capture_output=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL, check=False)
        except FileNotFoundError as missing:
            raise SkysailError("QEMU is not installed", "run: sudo ./skysail up") from missing
        except subprocess.TimeoutExpired as stuck:
            said = (stuck.stderr or b"").decode(errors="replace")
            why = next((line for line in said.splitlines() if "error" in line), "no answer")
            return f"a tiny 64-bit guest hung for {PROBE_SECONDS:.0f} s ({why})"
    if done.returncode == SIGNAL:
        return ""
    return f"QEMU ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-300:]}"


def probe(cache: Path) -> Verdict:
    """The accelerator to use, from ``cache`` while kernel and QEMU are the ones that it was found with.

    Raises SkysailError when not even emulation works.
    """
    version = run([PROGRAM, "--version"], timeout=20).decode().splitlines()[0]
    facts = f"{platform.release()} {version} {KVM.exists()} {qemu.cpu_model('kvm')}"
    try:
        held = msgspec.json.decode(cache.read_bytes(), type=Verdict)
        if held.facts == facts:
            return held
    except (FileNotFoundError, msgspec.MsgspecError):
        pass
    seen = tried("kvm") if KVM.exists() else "/dev/kvm is not there"
    if seen:
        emulated = tried("tcg")
        if emulated:
            raise SkysailError(f"QEMU runs no guest here: {emulated}", "reinstall qemu-system-x86")
    found = Verdict(accelerator="tcg" if seen else "kvm", seen=seen or "a tiny 64-bit guest ran", facts=facts)
    cache.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(cache, msgspec.json.encode(found), 0o644)
    return found
