"""Files that survive a power cut: a rename is only on the disk once the file's content and its folder's entry are."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """What was written to the file ``path``, or which names stand in the folder ``path``, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Give ``path`` this content, ``mode`` and ``owner`` (uid, gid; else ours): at every moment, also after a power cut, it
    holds the former content or this one whole, and nobody but its owner ever reads more than its mode lets."""
    half = path.with_name(path.name + ".new")
    half.unlink(missing_ok=True)
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:  # a full disk is not to stay so for half of a file
        half.unlink(missing_ok=True)
        raise
    sync(path.parent)
