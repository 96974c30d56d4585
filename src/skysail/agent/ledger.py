"""The ledger: the last accepted document, on local disk, so that a host cut off from its controller keeps its guests.

Large zones come in parts, and those of a document that are new are one file beside it, a *pack*: a change costs what it
changes, and one sync. A pack goes when the document names none of its parts any more; when there are many, the next one takes
in all that is named.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from skysail.contract.document import HostDocument, RecordSet, Zone, ZoneOutline, part_digest
from skysail.kit import durable

log = logging.getLogger(__name__)
# How many packs there are before they become one.
MAX_PACKS = 64
_Part = tuple[RecordSet, ...]


class MissingParts(Exception):
    """The document names parts of zones, ``digests``, that are neither here nor came with it."""

    def __init__(self, digests: Iterable[str]) -> None:
        self.digests = tuple(sorted(digests))
        super().__init__(f"{len(self.digests)} parts of zones are missing")


class Ledger:
    """The file ``path``, replaced atomically and synced before :meth:`write` returns, and the folder ``zones`` beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.with_name("zones")
        self._parts: dict[str, tuple[bytes, _Part]] = {}
        self._packs: dict[Path, frozenset[str]] = {}
        self._zones: dict[str, tuple[ZoneOutline, Zone]] = {}
        self._opened = False
        self._lock = threading.Lock()

    def read(self) -> HostDocument | None:
        """The last document; None on a fresh host, and when the file cannot be read: the controller sends it again. It does
        so, too, with a zone of which a part cannot be read: until then the document has it not, and it is left as it is."""
        with self._lock:
            return self._read()

    def _read(self) -> HostDocument | None:
        try:
            document = msgspec.json.decode(self._path.read_bytes(), type=HostDocument)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as damaged:
            log.error("the ledger %s cannot be read (%s): waiting for the controller's document", self._path, damaged)
            return None
        # Anew from the disk, as a host that starts: this is also how it is verified.
        parts = {digest: part for _, held in self._read_packs() for digest, (_, part) in held.items()}
        zones = []
        for outline in document.outlines:
            if missing := [digest for digest in outline.parts if digest not in parts]:
                log.error("zone %s: %d of %d parts cannot be read: waiting for the controller", outline.name, len(missing),
                          len(outline.parts))
            else:
                zones.append(outline.zone(parts[digest] for digest in outline.parts))
        return msgspec.structs.replace(document, outlines=(), zones=(*document.zones, *zones))

    def write(self, document: HostDocument, parts: Mapping[str, bytes] | None = None) -> HostDocument:
        """Keep the document and the parts that came with it; the document with its zones whole. Raises :class:`MissingParts`,
        ValueError for a part that is not what its digest says; then nothing changed."""
        with self._lock:
            named = self._take_in(document, parts or {})
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self._path, msgspec.json.encode(document))
            self._sweep(named)
            return self._whole(document)

    def heard_in(self, boot: str) -> bool:
        """Whether a controller has spoken in this boot of the machine."""
        try:
            return self._path.with_name("boot").read_text() == boot
        except FileNotFoundError:
            return False

    def hear_in(self, boot: str) -> None:
        """A controller has spoken in this boot; on the disk when this returns."""
        durable.replace(self._path.with_name("boot"), boot.encode())

    def again(self, document: HostDocument, parts: Mapping[str, bytes] | None = None) -> HostDocument:
        """The document that is kept already, with its zones whole; of its parts those are kept that were lost. Raises as
        :meth:`write` does."""
        with self._lock:
            self._take_in(document, parts or {})
            return self._whole(document)

    def _take_in(self, document: HostDocument, parts: Mapping[str, bytes]) -> set[str]:
        """Have all parts that the document names; their digests."""
        if not self._opened:
            for path, held in self._read_packs():
                self._packs[path] = frozenset(held)
                self._parts |= held
            self._opened = True
        named = {digest for outline in document.outlines for digest in outline.parts}
        fresh = {digest: _decoded(digest, parts[digest]) for digest in named & parts.keys() - self._parts.keys()}
        if missing := named - self._parts.keys() - fresh.keys():
            raise MissingParts(missing)
        if fresh:
            # On the disk before the document that names them: whichever document a power cut leaves, its parts are there.
            self._pack({**self._parts, **fresh} if len(self._packs) >= MAX_PACKS else fresh, named)
            self._parts |= fresh
        return named

    def _pack(self, parts: Mapping[str, tuple[bytes, _Part]], named: set[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        held = {digest: msgspec.Raw(raw) for digest, (raw, _) in parts.items() if digest in named}
        path = self._folder / f"{max((int(path.stem) for path in self._packs), default=0) + 1}.json"
        durable.replace(path, msgspec.json.encode(held))
        self._packs[path] = frozenset(held)

    def _sweep(self, named: set[str]) -> None:
        """Forget what the document names no more, and the packs that are of no use."""
        self._parts = {digest: part for digest, part in self._parts.items() if digest in named}
        seen: set[str] = set()
        for path in sorted(self._packs, key=lambda path: int(path.stem), reverse=True):
            if not self._packs[path] & named - seen:
                path.unlink(missing_ok=True)
                del self._packs[path]
            else:
                seen |= self._packs[path]

    def _whole(self, document: HostDocument) -> HostDocument:
        """The document with its zones whole: the same ones as before where they did not change, so that nobody looks through
        them again."""
        former, self._zones = self._zones, {}
        for outline in document.outlines:
            held = former.get(outline.id)
            self._zones[outline.id] = held if held is not None and held[0] == outline else (
                outline, outline.zone(self._parts[digest][1] for digest in outline.parts))
        return msgspec.structs.replace(document, outlines=(), zones=(
            *document.zones, *(zone for _, zone in self._zones.values())))

    def _read_packs(self) -> Iterator[tuple[Path, dict[str, tuple[bytes, _Part]]]]:
        """Each pack and its parts; none of one that cannot be read."""
        for path in self._folder.glob("*.json"):
            if not path.stem.isdigit():
                continue
            try:
                raws = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
                held = {digest: _decoded(digest, bytes(raw)) for digest, raw in raws.items()}
            except (OSError, msgspec.MsgspecError, ValueError) as damaged:
                log.error("%s cannot be read (%s)", path, damaged)
                held = {}
            yield path, held


def _decoded(digest: str, raw: bytes) -> tuple[bytes, _Part]:
    if part_digest(raw) != digest:
        raise ValueError(f"a part of a zone is not what its digest {digest} says")
    return raw, msgspec.json.decode(raw, type=_Part)
