"""From SQLite to PostgreSQL: the rows are copied and compared, then the configuration says where they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from skysail.kit import durable, process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.owner import as_owner
from skysail.serve.turn import turn
from skysail.store import copying
from skysail.store.database import Database

_FIELDS = ("database", "database_password_file")
_TABLE = re.compile(rb"(^\s*\[)", re.MULTILINE)


def move(config: Config, url: str, password_file: str, progress: Callable[[str], None]) -> list[copying.Copied]:
    """Move the rows of this cloud, whose controller is stopped, to the empty database at ``url``. They are copied as the
    controller's user, whose file they are in.

    A crash at any moment leaves the cloud where it was, or, once all is copied and the configuration says so, where it is
    then. The file stays as it was, and ``up`` waits until it is decided. Raises SkysailError with nothing changed.
    """
    process.require_root()
    with turn(config, progress):
        return _move(config, moved(config, url, password_file), progress)


def _move(config: Config, there: Config, progress: Callable[[str], None]) -> list[copying.Copied]:
    source, target = Database.of(config), Database.of(there)

    def copied() -> list[copying.Copied]:
        try:
            return copying.copy(source, target)
        finally:
            source.close()
            target.close()

    progress("rows: copying")
    found = as_owner(config.sqlite_file.parent, copied, list[copying.Copied])
    point(config, there)
    progress("configuration: names PostgreSQL")
    return found


def moved(config: Config, url: str, password_file: str) -> Config:
    """The configuration afterwards. Raises SkysailError when it cannot be."""
    if config.database:
        raise SkysailError(f"the rows are in {config.database} already", "only SQLite is moved from")
    if not config.sqlite_file.exists():
        raise SkysailError(f"there is no cloud in {config.data}", "run: sudo ./skysail up")
    try:
        return msgspec.structs.replace(config, database=url, database_password_file=password_file)
    except ValueError as wrong:
        raise SkysailError(str(wrong), "see docs/database.md") from wrong


def point(config: Config, there: Config) -> None:
    """Let ``skysail.toml`` say where the rows are, at once and for good; the rest of it stays as it was written."""
    path = Path(config.data) / "skysail.toml"
    held = path.read_bytes() if path.exists() else b""
    # Before everything else: what stands behind the first table's head belongs to that table.
    lines = [f"{name} = {json.dumps(getattr(there, name))}\n" for name in _FIELDS if getattr(there, name)]
    head, table, rest = _TABLE.split(held, 1) if _TABLE.search(held) else (held, b"", b"")
    kept = [line for line in head.splitlines(keepends=True) if line.split(b"=")[0].strip().decode() not in _FIELDS]
    held = b"".join(kept) + table + rest
    whole = "".join(lines).encode() + held
    if msgspec.convert(msgspec.toml.decode(whole) | {"data": config.data}, Config) != there:
        raise SkysailError(f"{path} is written in a way that is not understood well enough to change it",
                           f"write into it: {' '.join(lines)}")
    found = path.stat() if path.exists() else None
    durable.replace(path, whole, found.st_mode & 0o777 if found else 0o644,
                    (found.st_uid, found.st_gid) if found else None)
