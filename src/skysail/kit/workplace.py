"""Workplaces: folders in which something comes to be, and of which nothing stays when its maker dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """A folder of one's own in ``directory``. It goes when the context ends; one that was left by a process that was killed
    goes when the next one is asked for."""
    with locked(directory):
        for left in directory.glob(".work-*"):
            # Its maker holds a lock on it for as long as it lives.
            with lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as abandoned:
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".work-", dir=directory))
        held = contextlib.ExitStack()
        held.enter_context(lock(work, fcntl.LOCK_EX))
    with held:
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time changes the directory, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def lock(folder: Path, how: int) -> Iterator[bool]:
    """Hold ``folder`` by flock(2); says whether it could be had. The kernel lets go when the process dies."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
