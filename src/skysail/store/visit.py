"""A look into a controller's store by somebody who is not the controller: a verb of the operator's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.owner import as_owner
from skysail.store.database import Database

T = TypeVar("T")


def visit(config: Config, look: Callable[[Connection], T], kind: type[T], *, write: bool = False) -> T:
    """What ``look`` answers, of the type ``kind``, in one transaction of the cloud's store. It is made in a process of the
    controller's user (see :func:`skysail.kit.owner.as_owner`): what root itself shall do has its place before or behind it.

    Raises :class:`SkysailError` when there is no cloud, and with what ``look`` raises.
    """
    none = SkysailError(f"there is no cloud in {config.data}", "run: sudo ./skysail up")
    folder = config.master_key.parent
    if not folder.exists():
        raise none
    database = Database.of(config)

    def looked() -> T:
        try:
            if not database.exists():
                raise none
            with database.transaction(write=write) as connection:
                return look(connection)
        finally:
            database.close()

    return as_owner(folder, looked, kind)
