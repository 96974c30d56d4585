"""Downloads that go on where they were cut off.

What has arrived lies in a file of its own, named by the checksum that is wanted, until the whole is there: the next attempt
asks for the rest (RFC 9110, 14.2, range requests). What the bytes are is decided by the checksum of the whole alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from skysail.kit.errors import SkysailError

MAX_BYTES = 32 << 30
FETCH_SECONDS = 3600.0
PAUSE_SECONDS = 1.0
# A download that nobody has come back to for so long goes with the next one.
KEPT_SECONDS = 7 * 86400.0
_CHUNK = 1 << 20


def download(source: str, sha256: str, target: Path, folder: Path, detail: Callable[[str], None] = lambda text: None) -> str:
    """Write what lies at the address ``source`` to ``target``, by way of ``folder``, and return its sha256.

    Raises :class:`SkysailError` when it does not come, and keeps what has come; and when there is no room for it, or somebody
    else is fetching the same. What turns out to have another checksum is not kept.
    """
    for left in folder.glob(".part-*"):
        if time.time() - left.stat().st_mtime > KEPT_SECONDS:
            left.unlink(missing_ok=True)
    part = folder / f".part-{sha256}"
    with part.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise SkysailError(f"{source} is being fetched already", "wait for the other import") from taken
        try:
            digest = _whole(source, part, detail)
            if digest == sha256:
                part.rename(target)
            else:
                part.unlink()
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
    return digest


def _whole(source: str, part: Path, detail: Callable[[str], None]) -> str:
    """Ask until ``part`` is whole and return its sha256; raises SkysailError."""
    end = time.monotonic() + FETCH_SECONDS
    while True:
        before = part.stat().st_size
        try:
            return _rest(source, part, end, detail)
        except httpx.TransportError as cut:
            # As long as each attempt brings something, the next one may bring the rest.
            if part.stat().st_size <= before:
                raise SkysailError(f"{source} could not be fetched: {cut or type(cut).__name__}",
                                   "what has come so far is kept: the next attempt goes on from there") from cut
            time.sleep(PAUSE_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as failed:
            raise SkysailError(f"{source} could not be fetched: {failed or type(failed).__name__}") from failed


def _rest(source: str, part: Path, end: float, detail: Callable[[str], None]) -> str:
    """Ask for what ``part`` lacks, add it, and return the sha256 of the whole; raises httpx's errors and SkysailError."""
    whole = hashlib.sha256()
    with part.open("rb") as held:
        while piece := held.read(_CHUNK):
            whole.update(piece)
    there = part.stat().st_size
    # `identity`: the checksum is that of the bytes as they lie there.
    asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
    with httpx.stream("GET", source, headers=asked, follow_redirects=True,
                      timeout=httpx.Timeout(60.0, connect=15.0)) as answer, part.open("r+b") as out:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and there:
            return whole.hexdigest()  # it was whole already, or is another one by now: the checksum says it
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            whole, there = hashlib.sha256(), 0  # told from the beginning: a server that knows no ranges
            out.truncate(0)
        told = answer.headers.get("Content-Length", "")
        length = there + int(told) if told.isdigit() else 0
        room = min(MAX_BYTES, there + shutil.disk_usage(part.parent).free - (1 << 30))
        if length > room:
            raise SkysailError(f"{source} is {length >> 20} MiB large, there is room for {max(room, 0) >> 20} MiB")
        written, shown = there, -1
        out.seek(there)
        # As it arrives: a piece that is cut off is kept as far as it came.
        for chunk in answer.iter_raw():
            written += len(chunk)
            if written > room:
                out.truncate(0)
                raise SkysailError(f"{source} is larger than the {max(room, 0) >> 20} MiB that there is room for")
            if time.monotonic() > end:
                raise SkysailError(f"{source} did not arrive within {FETCH_SECONDS / 60:.0f} minutes",
                                   "what has come so far is kept: the next attempt goes on from there")
            whole.update(chunk)
            out.write(chunk)
            if written >> 20 != shown:
                shown = written >> 20
                detail(f"{shown} MiB" + (f" of {length >> 20}" if length else ""))
        out.flush()
        os.fsync(out.fileno())
    return whole.hexdigest()
