"""Checksums of files that nobody changes: each is read once, and again when it is another file by what stat(2) says.

So a file that somebody changed or replaced is found before anything grows from it. What a disk loses silently, without a
change of the file, is found at the first look of each agent; ``skysail snapshots export`` and ``skysail verify`` read all
anew.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from skysail.kit.errors import SkysailError


class Checksums:
    """Remembers the sha256 of files by device, inode, size and time of their last change."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, int, int], str] = {}
        self._lock = threading.Lock()

    def check(self, path: Path, sha256: str) -> None:
        """Raises SkysailError when the file has another sha256, or is gone."""
        try:
            with path.open("rb") as file:
                seen = path.stat()
                key = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
                with self._lock:
                    found = self._seen.get(key)
                found = found or hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as lost:
            raise SkysailError(f"the file {path} of a snapshot is not there any more", "bring it back") from lost
        if found != sha256:
            raise SkysailError(f"the file {path} of a snapshot has changed since it was made: its checksum is another one",
                               "bring it back as it was, or use another snapshot")
        with self._lock:
            self._seen[key] = found
