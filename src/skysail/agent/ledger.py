"""The ledger: the last accepted document, on local disk, so that a host cut off from its controller keeps its guests."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from skysail.contract.document import HostDocument
from skysail.kit import durable

log = logging.getLogger(__name__)


class Ledger:
    """One file, replaced atomically and synced before :meth:`write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> HostDocument | None:
        """The last document; None on a fresh host, and when the file cannot be read: the controller sends it again."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=HostDocument)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as damaged:
            log.error("the ledger %s cannot be read (%s): waiting for the controller's document", self._path, damaged)
            return None

    def write(self, document: HostDocument) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(self._path, msgspec.json.encode(document))
