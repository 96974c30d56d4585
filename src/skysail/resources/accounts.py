"""Accounts, their access keys, and their SSH certificate authorities."""

from __future__ import annotations

import secrets
from typing import Any

import asyncssh
from sqlalchemy import Connection, Row, bindparam, insert, select, update

from skysail.store.schema import access_keys, accounts, authorities
from skysail.store.vault import Vault

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
# Made once: each request asks it.
_FIND_SECRET = select(access_keys.c.account_id, access_keys.c.secret_sealed).where(
    access_keys.c.id == bindparam("key"), access_keys.c.revoked_at.is_(None))


def create_account(connection: Connection, name: str, now: float) -> str:
    """A new account; its id has twelve digits."""
    identifier = f"{secrets.randbelow(9 * 10**11) + 10**11}"
    connection.execute(insert(accounts).values(id=identifier, name=name, created_at=now))
    return identifier


def find_account(connection: Connection, name: str) -> str | None:
    """The id of the account called ``name``."""
    return connection.execute(select(accounts.c.id).where(accounts.c.name == name)).scalar_one_or_none()


def create_access_key(connection: Connection, vault: Vault, account_id: str, now: float) -> tuple[str, str]:
    """A new access key of the account: its id and its secret."""
    key = "AKIA" + "".join(secrets.choice(_ALPHABET) for _ in range(16))
    secret = secrets.token_urlsafe(30)
    connection.execute(insert(access_keys).values(
        id=key, account_id=account_id, secret_sealed=vault.seal(secret, f"access-key:{key}"), created_at=now))
    return key, secret


def revoke(connection: Connection, key_id: str, now: float) -> bool:
    """The key is good no more; whether there was a good one."""
    return connection.execute(update(access_keys).where(
        access_keys.c.id == key_id, access_keys.c.revoked_at.is_(None)).values(revoked_at=now)).rowcount == 1


def list_access_keys(connection: Connection) -> list[dict[str, object]]:
    """Every key, without its secret."""
    rows = connection.execute(select(
        access_keys.c.id, accounts.c.name, access_keys.c.created_at, access_keys.c.revoked_at)
        .join(accounts, accounts.c.id == access_keys.c.account_id).order_by(access_keys.c.created_at))
    return [{"id": row.id, "account": row.name, "created_at": row.created_at, "revoked_at": row.revoked_at}
            for row in rows]


def find_secret(connection: Connection, vault: Vault, key_id: str) -> tuple[str, str] | None:
    """Account and secret of a key that is not revoked."""
    row = connection.execute(_FIND_SECRET, {"key": key_id}).first()
    return None if row is None else (row.account_id, vault.open(row.secret_sealed, f"access-key:{key_id}"))


def ensure_authority(connection: Connection, vault: Vault, account_id: str, region: str) -> str:
    """The public key of the account's certificate authority in the region (OpenSSH text), made at first need.

    Each account has its own: what it signs logs in to every instance that trusts it.
    """
    row = _authority(connection, account_id, region)
    if row is not None:
        return str(row.public_key)
    key = asyncssh.generate_private_key("ssh-ed25519", comment=f"skysail {region}")
    public = key.export_public_key().decode().strip()
    connection.execute(insert(authorities).values(
        account_id=account_id, region=region, public_key=public,
        private_sealed=vault.seal(key.export_private_key().decode(), f"authority:{region}")))
    return public


def authority_private(connection: Connection, vault: Vault, account_id: str, region: str) -> str:
    """The private key of the account's authority in the region; raises LookupError if it was never made."""
    row = _authority(connection, account_id, region)
    if row is None:
        raise LookupError(f"account {account_id} has no authority in {region}")
    return vault.open(row.private_sealed, f"authority:{region}")


def _authority(connection: Connection, account_id: str, region: str) -> Row[Any] | None:
    return connection.execute(select(authorities).where(
        authorities.c.account_id == account_id, authorities.c.region == region)).first()
