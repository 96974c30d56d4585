"""Key pairs: the private half is shown once and forgotten, except that of the region's default key pair.

Fingerprints as EC2 has them: SHA-1 of the private key (PKCS #8 DER) for a key made here, MD5 of the public key (DER) for
an imported one; ed25519 keys have OpenSSH's SHA-256. Source: EC2 user guide, "Verify the fingerprint of your key pair".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import uuid
from collections.abc import Callable
from typing import Any

import asyncssh
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from sqlalchemy import Connection, RowMapping, delete, insert, select

from skysail.hosts import entrance
from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input, not_found
from skysail.operations import history
from skysail.resources import names, paging, tags
from skysail.resources.request import Request
from skysail.store.schema import key_pairs
from skysail.store.vault import Vault

DEFAULT_NAME = names.DEFAULT_KEY_PAIR


def _fingerprint(digest: bytes) -> str:
    return ":".join(f"{octet:02x}" for octet in digest)


def _generate() -> tuple[str, str, str]:
    """A new RSA key: private PEM, public OpenSSH text, fingerprint."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8,
                            serialization.NoEncryption())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
                            serialization.NoEncryption()).decode()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return pem, public, _fingerprint(hashlib.sha1(der, usedforsecurity=False).digest())


def _find(connection: Connection, request: Request, name: str) -> RowMapping | None:
    return connection.execute(select(key_pairs).where(
        key_pairs.c.account_id == request.account_id, key_pairs.c.region == request.region,
        key_pairs.c.name == name)).mappings().first()


def _get(connection: Connection, request: Request, name: str) -> RowMapping:
    row = _find(connection, request, name)
    if row is None:
        raise not_found(f"The KeyPair does not exist: {name}", "GetKeyPairs lists the ones that do.")
    return row


def _insert(connection: Connection, request: Request, name: str, public: str, fingerprint: str, now: float,
            private_sealed: bytes | None = None) -> str:
    if name == DEFAULT_NAME and private_sealed is None:
        raise invalid_input(f"The name {DEFAULT_NAME} is kept for the region's default key pair.",
                            "DownloadDefaultKeyPair makes it.")
    identifier = str(uuid.uuid4())
    names.claim(connection, request, name, "KeyPair", identifier)
    connection.execute(insert(key_pairs).values(
        id=identifier, account_id=request.account_id, region=request.region, name=name, public_key=public,
        fingerprint=fingerprint, private_sealed=private_sealed, is_default=private_sealed is not None, created_at=now))
    entrance.bump(connection)
    return identifier


def _default(connection: Connection, vault: Vault, request: Request, now: float) -> RowMapping:
    """The region's default key pair of the account, made at first need."""
    row = _find(connection, request, DEFAULT_NAME)
    if row is None:
        private, public, fingerprint = _generate()
        sealed = vault.seal(private, f"default-key:{request.account_id}:{request.region}")
        _insert(connection, request, DEFAULT_NAME, public, fingerprint, now, sealed)
        row = _get(connection, request, DEFAULT_NAME)
    return row


def public_key(connection: Connection, vault: Vault, request: Request, name: str, now: float) -> str:
    """The public half of key pair ``name`` in OpenSSH text; raises NotFoundException."""
    if name == DEFAULT_NAME:
        return str(_default(connection, vault, request, now)["public_key"])
    return str(_get(connection, request, name)["public_key"])


class KeyPairs:
    """The actions on key pairs."""

    def __init__(self, clock: Clock, vault: Vault) -> None:
        self._clock = clock
        self._vault = vault

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"CreateKeyPair": self.create, "ImportKeyPair": self.import_, "GetKeyPair": self.get,
                "GetKeyPairs": self.list, "DeleteKeyPair": self.delete,
                "DownloadDefaultKeyPair": self.download_default}

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        private, public, fingerprint = _generate()
        name = request.params["keyPairName"]
        identifier = _insert(connection, request, name, public, fingerprint, self._clock.now())
        tags.put(connection, identifier, request.params.get("tags") or [])
        shape = self._shape(_get(connection, request, name), tags.of(connection, [identifier]))
        return {"keyPair": shape, "publicKeyBase64": public, "privateKeyBase64": private,
                "operation": self._record(connection, request, name, identifier)}

    def import_(self, connection: Connection, request: Request) -> dict[str, Any]:
        name = request.params["keyPairName"]
        public, fingerprint = _read_public(request.params["publicKeyBase64"])
        identifier = _insert(connection, request, name, public, fingerprint, self._clock.now())
        return {"operation": self._record(connection, request, name, identifier)}

    def get(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = _get(connection, request, request.params["keyPairName"])
        return {"keyPair": self._shape(row, tags.of(connection, [row["id"]]))}

    def list(self, connection: Connection, request: Request) -> dict[str, Any]:
        query = select(key_pairs).where(key_pairs.c.account_id == request.account_id,
                                        key_pairs.c.region == request.region)
        if not request.params.get("includeDefaultKeyPair"):
            query = query.where(key_pairs.c.is_default.is_(False))
        found, token = paging.read(connection, query, request.params.get("pageToken"), key_pairs.c.name)
        tagged = tags.of(connection, [row["id"] for row in found])
        return {"keyPairs": [self._shape(row, tagged) for row in found], "nextPageToken": token}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = _get(connection, request, request.params["keyPairName"])
        expected = request.params.get("expectedFingerprint")
        if row["is_default"] and not expected:
            raise invalid_input("The default key pair is deleted only with its expectedFingerprint.")
        if expected and expected != row["fingerprint"]:
            raise invalid_input(f"The key pair {row['name']} has another fingerprint than the expected one.")
        names.release(connection, request.account_id, request.region, row["name"])
        tags.forget(connection, row["id"])
        connection.execute(delete(key_pairs).where(key_pairs.c.id == row["id"]))
        entrance.bump(connection)
        return {"operation": self._record(connection, request, row["name"], row["id"])}

    def download_default(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = _default(connection, self._vault, request, self._clock.now())
        private = self._vault.open(row["private_sealed"], f"default-key:{request.account_id}:{request.region}")
        return {"publicKeyBase64": row["public_key"], "privateKeyBase64": private, "createdAt": row["created_at"]}

    def _shape(self, row: RowMapping, tagged: tags.Tagged) -> dict[str, Any]:
        return {
            "name": row["name"], "createdAt": row["created_at"], "resourceType": "KeyPair",
            "arn": f"arn:aws:lightsail:{row['region']}:{row['account_id']}:KeyPair/{row['id']}",
            "supportCode": f"{row['account_id']}/{row['id']}", "fingerprint": row["fingerprint"],
            "location": {"availabilityZone": "all", "regionName": row["region"]},
            "tags": tagged.get(row["id"], []),
        }

    def _record(self, connection: Connection, request: Request, name: str, identifier: str) -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=name,
                              resource_type="KeyPair", resource_id=identifier)


def _read_public(text: str) -> tuple[str, str]:
    """OpenSSH text (or its base64) to OpenSSH text and fingerprint; raises InvalidInputException."""
    candidate = text.strip()
    if not candidate.startswith("ssh-"):
        try:
            candidate = base64.b64decode(candidate, validate=True).decode().strip()
        except (binascii.Error, ValueError):
            candidate = text.strip()
    try:
        key = asyncssh.import_public_key(candidate)
    except (asyncssh.KeyImportError, ValueError):
        raise invalid_input("publicKeyBase64 is not an OpenSSH public key.", "Send the text of the .pub file.") from None
    if key.get_algorithm() not in ("ssh-rsa", "ssh-ed25519"):
        raise invalid_input("Only RSA and ED25519 keys can be imported.")
    public = key.export_public_key().decode().strip()
    if key.get_algorithm() == "ssh-ed25519":
        return public, key.get_fingerprint("sha256").removeprefix("SHA256:")
    return public, _fingerprint(hashlib.md5(key.export_public_key("pkcs8-der"), usedforsecurity=False).digest())
