"""A host's stock of images and templates: what there is, who needs each piece, and how one goes that nobody needs.

Files of guests and snapshots stand on them, for as long as those files are there. What stands on what is taken from the
agent's own notes, never from a disk: its guest's process wrote it.

The agent may be making a guest at the very moment. It notes a guest's parent before it makes the guest's volume over it, and
that fails when the parent is not there. So a piece is hidden first and its users are looked for afterwards: whoever was not
noted yet cannot come to stand on it any more. If somebody did, it is put back. The removal of its manifest is the moment from
which on it is gone; whatever is hidden and has its manifest is put back by the next one who looks (:func:`recover`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from skysail.agent.ledger import Ledger
from skysail.hypervisor import confinement, template
from skysail.hypervisor.record import Record
from skysail.images.library import Library
from skysail.images.library import Manifest as Image
from skysail.kit import durable
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.workplace import locked
from skysail.storage import Manifest

HIDDEN = ".leaving-"
T = TypeVar("T")
# Which image, by its digest, and why it has to stay.
Users = Callable[[], Sequence[tuple[str, str]]]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """An image or a template: its file or folder, the digest of the image that it is (of), what it takes on the disk.
    ``old``: nothing new will be made of it. ``needed`` says who needs it, '' when nobody does."""

    kind: Literal["image", "template"]
    path: Path
    digest: str
    blueprint: str
    bytes: int
    old: bool
    needed: str

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.kind} {self.path.stem[:12]} of {self.blueprint or 'an image that is gone'}"


class Stock:
    """The stock of the cloud with this configuration. ``users`` says who needs which image by the controller's rows, and is
    asked at each look."""

    def __init__(self, config: Config, users: Users) -> None:
        self._config = config
        self._library = Library(config.images_dir)
        self._users = users

    def look(self) -> list[Piece]:
        """Every piece, images first, the oldest first. Raises SkysailError when a note that tells who stands on what cannot
        be read: then nothing is known to be free."""
        images = {one.digest: one for one in self._library.list()}
        newest = {one.blueprint: one.digest for one in images.values()}
        standing, users = self._standing(), dict(self._users())
        current = template.Now.of(self._config) if any(self._config.templates_dir.glob("*/template.json")) else None
        templates = []
        for folder in sorted(self._config.templates_dir.glob("[!.]*")):
            told = _decoded(folder / "template.json", template.Facts)
            if told is not None and current is not None:
                image = images.get(told.image)
                templates.append(Piece(
                    kind="template", path=folder, digest=told.image, blueprint=image.blueprint if image else "",
                    bytes=_allocated(folder), needed=standing.get(folder.name) or self._shared(folder),
                    old=image is None or newest[image.blueprint] != told.image
                    or current.key(told.image, told.vcpus) != folder.name))
        return [*(self._image(image, newest[image.blueprint], standing, users, templates) for image in images.values()),
                *templates]

    def _image(self, image: Image, newest: str, standing: Mapping[str, str], users: Mapping[str, str],
               templates: Sequence[Piece]) -> Piece:
        path = self._library.path(image.digest)
        needed = standing.get(path.name) or users.get(image.digest) or next(
            (one.needed for one in templates if one.digest == image.digest and one.needed), self._shared(path))
        return Piece(kind="image", path=path, digest=image.digest, blueprint=image.blueprint, bytes=_allocated(path),
                     old=newest != image.digest, needed=needed)

    def _shared(self, path: Path) -> str:
        """Who else may need it, of whom we know nothing."""
        ours = path.resolve().is_relative_to(self._config.root.resolve())
        return "" if ours else f"{path.parent} is not in the data folder, and another cloud may use what lies there"

    def _standing(self) -> dict[str, str]:
        """Each piece, by the name of its file or folder, that the file of a guest or a snapshot stands on, as the agent noted
        it, and who that is. The names are digests: what was noted when the data folder lay elsewhere counts, too."""
        document = Ledger(self._config.root / "agent" / "document.json").read()
        called = {guest.id: guest.instance for guest in document.guests} if document is not None else {}
        found: dict[str, str] = {}

        def note(files: Iterable[str], who: str) -> None:
            for file in map(Path, filter(None, files)):
                found[file.name] = found[file.parent.name] = f"{who} stands on it"

        for path in self._config.guests_dir.glob("*/guest.json"):
            record = _decoded(path, Record)
            if record is not None:
                copies = [copy for manifest in record.copying.values() for copy in manifest.copies]
                note([record.parent, *record.parents, *(file for copy in copies for file in copy.parents)],
                     f"the instance {called.get(record.id, record.id)}")
        for path in self._config.snapshots_dir.glob("*/manifest.json"):
            manifest = _decoded(path, Manifest)
            if manifest is not None:
                note((file for copy in manifest.copies for file in copy.parents), f"the snapshot {manifest.id}")
        return found

    def remove(self, wanted: Callable[[Piece], bool]) -> list[Piece]:
        """Remove the pieces that are ``wanted``, with an image its templates; which went. Raises SkysailError with the
        reason, and has removed nothing, when one of them is needed."""
        with locked(self._config.images_dir), locked(self._config.templates_dir):
            recover(self._config)
            pieces = self.look()
            going = [piece for piece in pieces if wanted(piece)]
            digests = {piece.digest for piece in going if piece.kind == "image"}
            # A template without its image is of no use.
            going += [one for one in pieces if one.kind == "template" and one.digest in digests and one not in going]
            going.sort(key=lambda piece: piece.kind, reverse=True)
            for piece in going:
                _refuse(piece, piece.needed)
            with self._hidden(going):
                for piece in going:
                    self._drop(piece)
        return going

    @contextlib.contextmanager
    def _hidden(self, going: Sequence[Piece]) -> Iterator[None]:
        """Nobody finds these pieces; they are back when somebody needs one all the same."""
        try:
            for piece in going:
                piece.path.rename(piece.path.with_name(HIDDEN + piece.path.name))
            if confinement.holders(f"{self._config.templates_dir}/."):
                raise SkysailError("a template is being made", "wait until it is ready, then try again")
            users, standing = dict(self._users()), self._standing()
            for piece in going:
                _refuse(piece, standing.get(piece.path.name, ""))
                if piece.kind == "image":
                    _refuse(piece, users.get(piece.digest, ""))
            yield
        finally:
            recover(self._config)

    def _drop(self, piece: Piece) -> None:
        hidden = piece.path.with_name(HIDDEN + piece.path.name)
        manifest = hidden / "template.json" if piece.kind == "template" else piece.path.with_suffix(".json")
        # From here on it is gone: what is left of it goes whenever somebody comes by.
        manifest.unlink()
        durable.sync(manifest.parent)
        if piece.kind == "template":
            shutil.rmtree(hidden)
        else:
            hidden.unlink()


def free(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that nothing new will be made of and nobody needs."""
    return [piece for piece in pieces if piece.old and not piece.needed]


def recover(config: Config) -> None:
    """Put back what a removal that was interrupted had hidden, and remove what is left of what it had removed."""
    for hidden in config.images_dir.glob(f"{HIDDEN}*"):
        path = hidden.with_name(hidden.name.removeprefix(HIDDEN))
        if path.with_suffix(".json").exists() and not path.exists():
            hidden.rename(path)
        else:
            hidden.unlink()
    for hidden in config.templates_dir.glob(f"{HIDDEN}*"):
        path = hidden.with_name(hidden.name.removeprefix(HIDDEN))
        if (hidden / "template.json").exists() and not path.exists():
            hidden.rename(path)
        else:
            shutil.rmtree(hidden)


def _refuse(piece: Piece, needed: str) -> None:
    if needed:
        raise SkysailError(f"the {piece.name} cannot be removed: {needed}")


def _decoded(path: Path, kind: type[T]) -> T | None:
    """A note of ours; None when it went meanwhile."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError as damaged:
        raise SkysailError(f"{path} cannot be read, so that nobody knows what is still needed: {damaged}") from damaged


def _allocated(path: Path) -> int:
    """What a file, or all in a folder, takes on the disk."""
    return sum(one.lstat().st_blocks * 512 for one in ([path] if path.is_file() else path.rglob("*")))
