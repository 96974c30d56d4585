"""Which images the rows speak of: a guest is started again, and a snapshot restored, only while its image is known."""

from __future__ import annotations

from sqlalchemy import Connection, select

from skysail.kit.config import Config
from skysail.store.schema import guests, snapshots
from skysail.store.visit import visit


def users(connection: Connection) -> list[tuple[str, str]]:
    """Digest of an image, and in words who needs it, for each guest and each snapshot with a system disk."""
    found = [(row.image, f"the instance {row.instance_name} is made of it")
             for row in connection.execute(select(guests.c.image, guests.c.instance_name, guests.c.role))
             if row.role != "gone"]
    found += [(row.source["image"], f"the snapshot {row.name or row.id} is of a server that is made of it")
              for row in connection.execute(select(snapshots.c.id, snapshots.c.name, snapshots.c.source))
              if row.source.get("image")]
    return found


def known(config: Config) -> list[tuple[str, str]]:
    """:func:`users` by the store of this cloud, if it has one."""
    return visit(config, users, list[tuple[str, str]]) if config.database or config.sqlite_file.exists() else []
