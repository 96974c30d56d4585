"""The guest of a trial (guest.c): its disk, and what it says of itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Literal

import msgspec

# What it does all the time.
Work = Literal["idle", "computing", "dirtying", "busy"]
SIZE_BYTES = 4 << 20
_PROGRAM = Path(__file__).with_name("guest.bin")
_NUMBERS: dict[Work, int] = {"idle": 0, "computing": 1, "dirtying": 2, "busy": 3}
_WORK_AT, _VCPUS_AT = 496, 497
_LINE = re.compile(r"^([0-9A-F]{8}) (-|[A-Z]+) ([0-9A-F]{16}) ([0-9A-F]{6}) ([0-9A-F]{8}) ([0-9A-F]{8}) ([0-9A-F]{8}) $",
                   re.MULTILINE)
# Its letters, in words.
MEANINGS = {
    "B": "its cards are out of reach", "C": "CPUID says something else", "D": "its disk has something else",
    "E": "its disk does not answer", "F": "x87 or SSE registers changed", "G": "debug registers changed",
    "M": "its memory changed", "N": "a frame came back changed", "R": "model-specific registers changed",
    "S": "a processor does not start", "T": "its time-stamp counter went back", "X": "a processor faulted"}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What it says once in a step. ``time`` is that of its real-time clock, as in ``093000``; ``rounds``: how often the
    processor that did so least looked whether everything is as it was; ``echoes`` and ``blocks``: frames that came back, and
    blocks of the disk that were written."""

    count: int
    complaints: str
    tsc: int
    time: str
    rounds: int
    echoes: int
    blocks: int


def image(path: Path, work: Work, vcpus: int) -> Path:
    """The disk that it boots from."""
    program = bytearray(_PROGRAM.read_bytes())
    program[_WORK_AT], program[_VCPUS_AT] = _NUMBERS[work], vcpus
    raw = path.with_suffix(".raw")
    raw.write_bytes(bytes(program).ljust(SIZE_BYTES, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    return path


def said(serial: str) -> list[Line]:
    """All that it said since it was started last, by its serial log."""
    return [Line(count=int(one[1], 16), complaints=one[2].strip("-"), tsc=int(one[3], 16), time=one[4],
                 rounds=int(one[5], 16), echoes=int(one[6], 16), blocks=int(one[7], 16))
            for one in _LINE.finditer(serial.rpartition("BOOT\n")[2])]


def boots(serial: str) -> int:
    """How often it was started."""
    return serial.count("BOOT\n")
