"""Access keys of the admin account: made, listed, revoked. Secrets are sealed; a secret is shown once, when made."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, select, update

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import accounts
from skysail.serve import endpoint
from skysail.store.schema import access_keys
from skysail.store.vault import Vault
from skysail.store.visit import visit


def listed(config: Config) -> list[dict[str, Any]]:
    """Every access key of the admin account, oldest first, without secrets."""
    own = endpoint.credentials(config)[0]

    def rows(connection: Connection) -> list[dict[str, Any]]:
        found = connection.execute(
            select(access_keys.c.id, access_keys.c.created_at, access_keys.c.revoked_at)
            .where(access_keys.c.account_id == _account(connection, own)).order_by(access_keys.c.created_at))
        return [{"id": row.id, "created": _day(row.created_at), "revoked": _day(row.revoked_at)} for row in found]

    return visit(config, rows, list[dict[str, Any]])


def create(config: Config) -> dict[str, str]:
    """A new access key of the admin account."""
    own = endpoint.credentials(config)[0]

    def made(connection: Connection) -> dict[str, str]:
        key, secret = accounts.create_access_key(connection, Vault.at(config.master_key), _account(connection, own),
                                                 time.time())
        return {"accessKeyId": key, "secretAccessKey": secret}

    return visit(config, made, dict[str, str], write=True)


def revoke(config: Config, key: str) -> None:
    """Refuse ``key`` from now on. Raises :class:`SkysailError` when there is no such key that is still good."""
    if key == endpoint.credentials(config)[0]:
        raise SkysailError("this is the key that this command line signs with", cure="revoke another one")

    def revoked(connection: Connection) -> bool:
        return connection.execute(
            update(access_keys).where(access_keys.c.id == key, access_keys.c.revoked_at.is_(None))
            .values(revoked_at=time.time())).rowcount == 1

    if not visit(config, revoked, bool, write=True):
        raise SkysailError(f"no access key {key} that could be revoked", cure="see: sudo ./skysail keys list")


def _account(connection: Connection, own: str) -> str:
    """The account of the access key that this command line signs with."""
    account: str | None = connection.execute(
        select(access_keys.c.account_id).where(access_keys.c.id == own)).scalar_one_or_none()
    if account is None:
        raise SkysailError("the stored admin key is unknown to this cloud", cure="run: sudo ./skysail up")
    return account


def _day(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
