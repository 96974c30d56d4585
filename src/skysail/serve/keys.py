"""Access keys of the admin account: made, listed, revoked. Secrets are sealed; a secret is shown once, when made."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select, update

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import accounts
from skysail.serve import endpoint
from skysail.store.database import Database
from skysail.store.schema import access_keys
from skysail.store.vault import Vault


def listed(config: Config) -> list[dict[str, Any]]:
    """Every access key of the admin account, oldest first, without secrets."""
    database = Database.found(config)
    try:
        with database.transaction(write=False) as connection:
            rows = connection.execute(
                select(access_keys.c.id, access_keys.c.created_at, access_keys.c.revoked_at)
                .where(access_keys.c.account_id == _account(connection, config)).order_by(access_keys.c.created_at))
            return [{"id": row.id, "created": _day(row.created_at), "revoked": _day(row.revoked_at)} for row in rows]
    finally:
        database.close()


def create(config: Config) -> dict[str, str]:
    """A new access key of the admin account."""
    database = Database.found(config)
    try:
        with database.transaction() as connection:
            key, secret = accounts.create_access_key(connection, Vault.at(config.master_key),
                                                     _account(connection, config), time.time())
    finally:
        database.close()
    return {"accessKeyId": key, "secretAccessKey": secret}


def revoke(config: Config, key: str) -> None:
    """Refuse ``key`` from now on. Raises :class:`SkysailError` when there is no such key that is still good."""
    if key == endpoint.credentials(config)[0]:
        raise SkysailError("this is the key that this command line signs with", cure="revoke another one")
    database = Database.found(config)
    try:
        with database.transaction() as connection:
            done = connection.execute(
                update(access_keys).where(access_keys.c.id == key, access_keys.c.revoked_at.is_(None))
                .values(revoked_at=time.time()))
            if done.rowcount != 1:
                raise SkysailError(f"no access key {key} that could be revoked", cure="see: sudo ./skysail keys list")
    finally:
        database.close()


def _account(connection: Any, config: Config) -> str:
    own = endpoint.credentials(config)[0]
    account: str | None = connection.execute(
        select(access_keys.c.account_id).where(access_keys.c.id == own)).scalar_one_or_none()
    if account is None:
        raise SkysailError("the stored admin key is unknown to this cloud", cure="run: sudo ./skysail up")
    return account


def _day(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
