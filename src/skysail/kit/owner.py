"""Working in the place of a file's owner: root neither makes files among those of an unprivileged process, which could not
use them then, nor reads with its own rights what such a process wrote.
"""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from skysail.kit.errors import SkysailError

T = TypeVar("T")
_PR_SET_NO_NEW_PRIVS = 38  # prctl(2)


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a process says at its end: what the call answered, as JSON, or why it failed."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    failure: tuple[str, str] | None = None


def as_owner(path: Path, call: Callable[[], T], kind: type[T]) -> T:
    """What ``call`` answers, which is of the type ``kind`` and can be written as JSON. For root it is called in a process of
    its own, which has the user and group that ``path`` belongs to, no other group, and no way back; what comes back is read
    as JSON. Anybody else calls it as they are.

    ``call`` shall import nothing of ours: its user need not be able to read the folder that this program lies in. Raises
    :class:`SkysailError` with its words.
    """
    held = path.stat()
    if os.geteuid() != 0 or held.st_uid == 0:
        return msgspec.json.decode(msgspec.json.encode(call()), type=kind)
    answers, says = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of this copy of the program comes to an end of its own: no handler, no buffer that is written twice.
        try:
            os.close(answers)
            _become(held.st_uid, held.st_gid)
            with os.fdopen(says, "wb") as out:
                out.write(_said(call))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(says)
    try:
        with os.fdopen(answers, "rb") as said:
            text = said.read()
    finally:
        _, status = os.waitpid(child, 0)
    if status != 0:
        raise SkysailError(f"a process of the user {held.st_uid} ended with status {os.waitstatus_to_exitcode(status)}")
    answer = msgspec.json.decode(text, type=_Answer)
    if answer.failure is not None:
        raise SkysailError(*answer.failure)
    return msgspec.json.decode(answer.value, type=kind)


def _become(uid: int, gid: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _said(call: Callable[[], object]) -> bytes:
    try:
        return msgspec.json.encode(_Answer(value=msgspec.Raw(msgspec.json.encode(call()))))
    except SkysailError as failed:
        return msgspec.json.encode(_Answer(failure=(failed.what, failed.cure)))
    except Exception as failed:
        traceback.print_exc()
        return msgspec.json.encode(_Answer(failure=(f"{type(failed).__name__}: {failed}", "")))
