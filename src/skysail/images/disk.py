"""A BIOS-bootable GPT disk written by the program itself: no loop device, no mount."""

from __future__ import annotations

import shutil
import struct
import uuid
import zlib
from pathlib import Path

from skysail.kit.errors import SkysailError
from skysail.kit.process import run

SECTOR = 512
GRUB_AT, ROOT_AT = 34, 2048
GRUB = Path("/usr/lib/grub/i386-pc")
MODULES = ("biosdisk", "part_gpt", "ext2", "normal", "linux", "serial", "terminal", "echo", "configfile", "search",
           "search_fs_uuid", "minicmd", "ls", "test")
_BIOS_GRUB = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
_LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def _gpt(sectors: int, root_sectors: int) -> tuple[bytes, bytes]:
    """The primary table (sectors 1..33) and the backup (last 33 sectors) of a disk of ``sectors``."""
    def entry(kind: uuid.UUID, first: int, last: int, name: str) -> bytes:
        return kind.bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, last, 0) + \
            name.encode("utf-16-le").ljust(72, b"\0")
    table = bytearray(128 * 128)
    table[0:128] = entry(_LINUX, ROOT_AT, ROOT_AT + root_sectors - 1, "root")
    table[13 * 128:14 * 128] = entry(_BIOS_GRUB, GRUB_AT, ROOT_AT - 1, "bios_grub")
    disk = uuid.uuid4().bytes_le

    def header(here: int, other: int, entries: int) -> bytes:
        def pack(crc: int) -> bytes:
            return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, here, other, 34, sectors - 34,
                               disk, entries, 128, 128, zlib.crc32(table))
        return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")
    return header(1, sectors - 1, 2) + table, bytes(table) + header(sectors - 1, 1, sectors - 33)


def write_disk(tree: Path, raw: Path, size_mib: int, root_uuid: str) -> None:
    """Make ``raw`` a bootable disk holding ``tree`` as its ext4 root, ``size_mib`` MiB large."""
    sectors = size_mib * 2048
    root_sectors = sectors - ROOT_AT - 2048
    core = raw.with_suffix(".core")
    run(["grub-mkimage", "-O", "i386-pc", "-p", "(hd0,gpt1)/boot/grub", "-o", str(core), *MODULES])
    image = bytearray(core.read_bytes())
    core.unlink()
    if len(image) > (ROOT_AT - GRUB_AT) * SECTOR:
        raise SkysailError("the boot loader does not fit before the first partition")
    struct.pack_into("<Q", image, 0x1F4, GRUB_AT + 1)
    boot = bytearray((GRUB / "boot.img").read_bytes()[:440].ljust(SECTOR, b"\0"))
    struct.pack_into("<Q", boot, 0x5C, GRUB_AT)
    boot[0x66:0x68] = b"\x90\x90"
    boot[446:462] = struct.pack("<B3sB3sII", 0x80, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1)
    boot[510:512] = b"\x55\xaa"
    primary, backup = _gpt(sectors, root_sectors)
    with raw.open("wb") as out:
        out.truncate(sectors * SECTOR)
        out.write(bytes(boot) + primary)
        out.seek(GRUB_AT * SECTOR)
        out.write(image)
        out.seek((sectors - 33) * SECTOR)
        out.write(backup)
    run(["mke2fs", "-q", "-t", "ext4", "-U", root_uuid, "-L", "root", "-d", str(tree), "-E",
         f"offset={ROOT_AT * SECTOR},root_owner=0:0", str(raw), f"{root_sectors // 2}k"])
    if not shutil.which("qemu-img"):
        raise SkysailError("qemu-img is not installed", cure="run: sudo ./skysail up")
