"""Logs that stay small while others write them.

Who writes a log was given it open for appending, as its output, and never opens it again: PowerDNS, HAProxy, a QEMU, whatever
systemd started. So a log is cut from outside, at its beginning, under its writer's hands, who goes on at its end. On ext4
and XFS the kernel takes the beginning out in one step (fallocate(2), FALLOC_FL_COLLAPSE_RANGE), and no byte is lost.
Elsewhere what is left is written over the beginning, and what the writer says within that moment is lost.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

# Each log and each of its former generations.
LIMIT_BYTES = 8 << 20
GENERATIONS = 3
_COLLAPSE_RANGE = 0x08  # FALLOC_FL_COLLAPSE_RANGE, linux/falloc.h
_PORTION_BYTES = 1 << 20
_SHIFT_BYTES = 64 << 20


def rotate(log: Path, limit_bytes: int = LIMIT_BYTES, generations: int = GENERATIONS) -> bool:
    """Once the log is longer than ``limit_bytes``, what it holds becomes ``<log>.1``, the former one ``.2`` and so on; the
    oldest goes. Says whether it was. One after the other, the generations are what was written.

    A process that dies on the way leaves everything; some of it twice, if it had not come to cutting the log.
    """
    try:
        descriptor = os.open(log, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        held = os.fstat(descriptor)
        if held.st_size <= limit_bytes:
            return False
        # Whole blocks of the file system, and not the last byte: no more can be taken out at once.
        size = (held.st_size - 1) // held.st_blksize * held.st_blksize
        half = _generation(log, 0)
        half.unlink(missing_ok=True)
        with half.open("xb") as copy:
            os.fchmod(copy.fileno(), held.st_mode & 0o777)
            os.fchown(copy.fileno(), held.st_uid, held.st_gid)
            _copy(descriptor, copy.fileno(), size)
            os.fsync(copy.fileno())
        for number in range(generations - 1, -1, -1):
            if _generation(log, number).exists():
                _generation(log, number).replace(_generation(log, number + 1))
        cut(descriptor, size)
        return True
    finally:
        os.close(descriptor)


def cut(descriptor: int, size: int) -> None:
    """Take the first ``size`` bytes, a multiple of the file's block size, out of the file that ``descriptor`` can read and
    write, and that others append to."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, _COLLAPSE_RANGE, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    failure = ctypes.get_errno()
    if failure not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        raise OSError(failure, os.strerror(failure))
    _shift(descriptor, size)


def _shift(descriptor: int, size: int) -> None:
    """:func:`cut` for a file system that cannot."""
    source, target = size, 0
    # A writer that is faster than we are does not hold us for ever.
    while target < _SHIFT_BYTES and (portion := os.pread(descriptor, _PORTION_BYTES, source)):
        source += len(portion)
        while portion:
            done = os.pwrite(descriptor, portion, target)
            portion, target = portion[done:], target + done
    os.ftruncate(descriptor, target)


def since(log: Path, offset: int, limit_bytes: int) -> bytes:
    """The last ``limit_bytes`` of what was written behind ``offset``, also when the log was rotated once since it was that
    long."""
    former = _generation(log, 1)
    parts = [_end(log, offset, limit_bytes)] if _size(log) >= offset else [
        _end(former, offset, limit_bytes), _end(log, 0, limit_bytes)]
    return b"".join(parts)[-limit_bytes:]


def last(log: Path, limit_bytes: int) -> bytes:
    """The end of what was written, also when the log was rotated a moment ago."""
    return (_end(_generation(log, 1), 0, limit_bytes) + _end(log, 0, limit_bytes))[-limit_bytes:]


def _generation(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number or 'new'}")


def _copy(source: int, target: int, size: int) -> None:
    offset = 0
    while offset < size:
        portion = os.pread(source, min(_PORTION_BYTES, size - offset), offset)
        if not portion:
            raise OSError(errno.EIO, "a log was cut by somebody else")
        offset += len(portion)
        while portion:
            portion = portion[os.write(target, portion):]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _end(path: Path, offset: int, limit_bytes: int) -> bytes:
    """The end of what the file holds behind ``offset``."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(offset, file.seek(0, os.SEEK_END) - limit_bytes))
        return file.read(limit_bytes)
