"""The ledger: the last accepted document, on local disk, so that a host cut off from its controller keeps its guests."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from skysail.contract.document import HostDocument


class Ledger:
    """One file, replaced atomically and synced before :meth:`write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> HostDocument | None:
        """The last document, or None on a fresh host."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=HostDocument)
        except FileNotFoundError:
            return None

    def write(self, document: HostDocument) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        half = self._path.with_suffix(".new")
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(document))
            file.flush()
            os.fsync(file.fileno())
        half.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
