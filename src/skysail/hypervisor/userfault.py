"""Who may answer page faults of its own memory: the process of a guest that comes by post-copy, as long as it is awaited.

QEMU takes in by post-copy with userfaultfd(2). The kernel gives that to a process without rights by a device only, which root
alone may open: a process that can hold up the kernel in the middle of a copy from its memory has the races won that exploits
of the kernel depend on. So no guest may open it but one that is just being awaited, by an entry of its own in the device's
access control list (acl(5)), which is taken away when it has opened it or will not come.

Source: Linux, admin-guide/mm/userfaultfd (/dev/userfaultfd, vm.unprivileged_userfaultfd); uapi/linux/posix_acl_xattr.h;
QEMU 8.0's change log (/dev/userfaultfd).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
DEVICE = Path("/dev/userfaultfd")
# The first QEMU that opens the device; those before it know the system call alone.
SINCE = 8
NEEDS = f"post-copy needs QEMU {SINCE}.0 and {DEVICE} on the target"
_LIST = "system.posix_acl_access"
_VERSION = 2
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF
_BOTH_WAYS = 6
_Entry = tuple[int, int, int]


def hindrance(version: str) -> str:
    """Why no guest can come by post-copy to a QEMU of this ``version``, in the words of an offer, on this machine; empty when
    one can."""
    if int(version.partition(".")[0] or 0) < SINCE:
        return f"{NEEDS}: this is QEMU {version}"
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"{NEEDS}: there is no such device"
    except OSError as refused:
        return f"{NEEDS}: it cannot be opened ({refused.strerror})"
    try:
        _read(descriptor)
    except OSError as odd:
        return f"{NEEDS}: nobody can be let open it alone ({odd.strerror})"
    finally:
        os.close(descriptor)
    return ""


def admit(uid: int) -> None:
    """Let this user open the device, until :func:`dismiss`. Raises SkysailError where that cannot be."""
    try:
        _change(lambda entries: [one for one in entries if one[0] != _USER or one[2] != uid] + [(_USER, _BOTH_WAYS, uid)])
    except OSError as refused:
        raise SkysailError(f"{NEEDS}: {refused}") from refused


def dismiss(uid: int) -> None:
    """This user opens the device no more; what is open stays so. Repeatable."""
    keep(lambda one: one != uid)


def keep(wanted: Callable[[int], bool]) -> None:
    """Nobody opens the device any more, of those that were let, but whom one wants. Where that cannot be, nobody could be let
    either: no guest waits for it."""
    try:
        _change(lambda entries: [one for one in entries if one[0] != _USER or wanted(one[2])])
    except FileNotFoundError:
        pass
    except OSError as refused:
        log.warning("who may open %s is not known: %s", DEVICE, refused)


def _change(change: Callable[[list[_Entry]], list[_Entry]]) -> None:
    """The list with a change, if it is one. Agents of several hosts on one machine wait for each other."""
    descriptor = os.open(DEVICE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        held = _read(descriptor)
        wanted = change(held)
        if sorted(wanted) == sorted(held):
            return
        plain = [one for one in wanted if one[0] != _MASK]
        if any(one[0] in (_USER, _NAMED_GROUP) for one in plain):
            plain.append((_MASK, _BOTH_WAYS, _NOBODY))
        # Without a named entry it is no list any more: the kernel makes plain permissions of it.
        os.setxattr(descriptor, _LIST, struct.pack("<I", _VERSION) + b"".join(
            struct.pack("<HHI", *one) for one in sorted(plain, key=lambda one: (one[0], one[2]))))
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> list[_Entry]:
    try:
        return [*struct.iter_unpack("<HHI", os.getxattr(descriptor, _LIST)[4:])]
    except OSError as none:
        if none.errno != errno.ENODATA:
            raise
        mode = os.fstat(descriptor).st_mode
        return [(_OWNER, mode >> 6 & 7, _NOBODY), (_GROUP, mode >> 3 & 7, _NOBODY), (_OTHERS, mode & 7, _NOBODY)]
