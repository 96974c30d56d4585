"""A guest that counts, and nothing else: a boot sector (ticker.s) that a test starts in a blink and follows on its serial
line.

At each step it looks whether its memory and its disk are as it left them, and says so in front of the count when they are
not: ``M`` for the memory, ``D`` for the disk, ``E`` for a disk that does not work.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_CODE = bytes.fromhex(
    "fa31c08ed88ed0bc007cfbfc8816e97cb800208ec031ff31c005379eab85ff75f8b800208ec031ff31c005379eaf7407"
    "b04de8a100eb0485ff75efb442e86e0066a1e57c6685c0740c66390600807405b044e8810066ff06e57c66a1e57c66a3"
    "0080b80043e84600668b1ee57cb9080066c1c30488d8240f3c0a1c692fe85600e2eeb00ae84f00803efc7d007503f4eb"
    "9045b800308ec026892e00000500013d009072f1f7c53f000f8475ffebe3668b1ee57c6683e33f6681c3000800006689"
    "1ef47c30c08a16e97cbeec7ccd137305b045e80100c350bafd03eca82074fb58baf803eec30000000000669010000100"
    "0080")
SIZE_BYTES = 4 << 20


def image(path: Path, *, busy: bool = False, ballast_mib: int = 0) -> Path:
    """The disk that it boots from, with something behind it that takes up room. One that is ``busy`` writes to 384 KiB of its
    memory all the time."""
    raw = path.with_suffix(".raw")
    sector = _CODE.ljust(508, b"\0") + bytes([busy, 0]) + b"\x55\xaa"
    raw.write_bytes(sector.ljust(SIZE_BYTES, b"\0") + os.urandom(ballast_mib << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    path.chmod(0o644)
    return path


def counts(serial: Path) -> list[int]:
    """What it has counted, by its serial log."""
    text = serial.read_text() if serial.exists() else ""
    return [int(line, 16) for line in re.findall(r"^\W*[MDE]*([0-9A-F]{8})$", text, re.MULTILINE)]


def complaints(serial: Path) -> list[str]:
    """The lines in which it found something wrong."""
    return re.findall(r"^[MDE]+[0-9A-F]{8}$", serial.read_text() if serial.exists() else "", re.MULTILINE)
