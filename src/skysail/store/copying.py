"""A whole store, copied into an empty database: every row of every table in one transaction, each table compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import JSON, Connection, MetaData, RowMapping, Table, insert, null, select

from skysail.kit.errors import SkysailError
from skysail.store import leases
from skysail.store.database import Database
from skysail.store.schema import controllers, metadata
from skysail.store.schema import leases as lease_rows

# How many rows are held in memory at a time.
PORTION = 1000
# Who works on a database, and what is theirs to do, is not what the database holds.
_LEFT = (controllers, lease_rows)
_ABSENT = "absent "


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What a table has in both databases: so many rows, with this SHA-256."""

    table: str
    rows: int
    checksum: str


def copy(source: Database, target: Database, progress: Callable[[Copied], None] = lambda copied: None) -> list[Copied]:
    """Copy all of ``source`` into ``target``. Nobody else writes to either meanwhile, and all of it is in ``target`` or
    nothing.

    Raises SkysailError when a controller works on ``source``, when ``target`` holds a cloud, or when what is in it afterwards
    is not what was read.
    """
    target.check()
    with source.transaction() as reading, target.transaction() as writing:
        working = leases.living(source, reading)
        if working:
            raise SkysailError(f"a controller works on the database: {', '.join(working)}", "stop it: sudo ./skysail down")
        source.require_current(reading)
        target.begin_copy(writing)
        copied = []
        for table in metadata.sorted_tables:
            if table in _LEFT:
                continue
            exact = _exact(table)
            for portion in _portions(reading, table):
                writing.execute(insert(exact), [_values(table, row) for row in portion])
            there, here = _sum(reading, table), _sum(writing, table)
            if there != here:
                raise SkysailError(f"the copy of {table.name} differs: {here.rows} rows of {there.rows}, or what is in them",
                                   "nothing was changed; see what PostgreSQL's log says")
            progress(here)
            copied.append(here)
    return copied


def _exact(table: Table) -> Table:
    """The same table, which tells JSON's null from none at all."""
    made = table.to_metadata(MetaData())
    for name in _optional(table):
        made.c[name].type = JSON(none_as_null=True)
    return made


def _optional(table: Table) -> list[str]:
    return [column.name for column in table.columns if isinstance(column.type, JSON) and column.nullable]


def _values(table: Table, row: RowMapping) -> dict[str, Any]:
    """What to insert of a row of :func:`_portions`."""
    values = {column.name: row[column.name] for column in table.columns}
    for name in _optional(table):
        if values[name] is None and not row[_ABSENT + name]:
            values[name] = JSON.NULL
    return values


def _portions(connection: Connection, table: Table) -> Iterator[Sequence[RowMapping]]:
    """The rows in the order of their keys, which is the same on every database: text is compared by its code points. Beside
    each column that JSON may be absent from stands whether it is."""
    absent = (table.c[name].is_(null()).label(_ABSENT + name) for name in _optional(table))
    query = select(*table.columns, *absent).order_by(*table.primary_key.columns).execution_options(yield_per=PORTION)
    yield from connection.execute(query).mappings().partitions()


def _sum(connection: Connection, table: Table) -> Copied:
    whole, rows = hashlib.sha256(), 0
    for portion in _portions(connection, table):
        for row in portion:
            # JSON is what it means, not how it is written; a moment is its 64 bits.
            whole.update(msgspec.json.encode([*row.values()], order="sorted") + b"\n")
            rows += 1
    return Copied(table=str(table.name), rows=rows, checksum=whole.hexdigest())
