"""The authority that hosts and controllers know each other by. It is the cloud's own and certifies nobody else: not the
endpoint of the API, which has another one (``api/tls.py``). Its key lies sealed in the store, which no agent can read.

Certificates are short-lived, so none is ever revoked: a host without a row is spoken to no more, and its certificate opens
nothing.
"""

from __future__ import annotations

from cryptography import x509
from sqlalchemy import Connection, insert, select

from skysail.contract.identity import CONTROLLER, host_name
from skysail.kit import certificates
from skysail.kit.errors import SkysailError
from skysail.store.schema import host_authority
from skysail.store.vault import Vault

YEARS_SECONDS = 20 * 365 * 86400.0
PURPOSE = "host authority"


class Authority:
    """Certifies hosts and controllers, for ``lifetime_seconds`` each."""

    def __init__(self, certificate: x509.Certificate, key: certificates.Key, lifetime_seconds: float) -> None:
        self._certificate = certificate
        self._key = key
        self._lifetime_seconds = lifetime_seconds

    @classmethod
    def find(cls, connection: Connection, vault: Vault, lifetime_seconds: float) -> Authority | None:
        """The cloud's authority; None while the cloud has no second machine."""
        row = connection.execute(select(host_authority)).first()
        return None if row is None else cls(
            x509.load_pem_x509_certificate(row.certificate.encode()),
            certificates.read_key(vault.open(row.private_sealed, PURPOSE).encode()), lifetime_seconds)

    @classmethod
    def ensure(cls, connection: Connection, vault: Vault, now: float, lifetime_seconds: float) -> Authority:
        """The cloud's authority, made if there is none yet (in a transaction that writes)."""
        if (held := cls.find(connection, vault, lifetime_seconds)) is not None:
            return held
        key = certificates.new_key()
        made = certificates.authority(key, "Skysail hosts", now, YEARS_SECONDS)
        connection.execute(insert(host_authority).values(
            id=1, certificate=certificates.pem(made).decode(), created_at=now,
            private_sealed=vault.seal(certificates.key_pem(key).decode(), PURPOSE)))
        return cls(made, key, lifetime_seconds)

    @property
    def pem(self) -> bytes:
        """What everyone may know of it."""
        return certificates.pem(self._certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate, in hexadecimal."""
        return certificates.fingerprint(self._certificate)

    def certify_host(self, identity: str, request: bytes, now: float) -> bytes:
        """A certificate (PEM) of the host of this identity, which asked by ``request`` (PEM). It is good at the end of a
        connection that is called, never at the one that calls: hosts do not speak to each other's agents. Raises
        SkysailError when it is no request."""
        try:
            public = certificates.requested_key(request)
        except (ValueError, TypeError) as wrong:
            raise SkysailError(f"this is no request for a certificate: {wrong}") from wrong
        return certificates.pem(certificates.issue(self._certificate, self._key, public, [host_name(identity)], now,
                                                   self._lifetime_seconds, {"server"}))

    def certify_controller(self, key: certificates.Key, now: float) -> bytes:
        """A certificate (PEM) by which agents know a controller that calls them."""
        return certificates.pem(certificates.issue(self._certificate, self._key, key.public_key(), [CONTROLLER], now,
                                                   self._lifetime_seconds, {"client"}))

    def certify_gate(self, key: certificates.Key, now: float) -> bytes:
        """A certificate (PEM) by which machines that join know a controller that they call."""
        return certificates.pem(certificates.issue(self._certificate, self._key, key.public_key(), [CONTROLLER], now,
                                                   self._lifetime_seconds, {"server"}))
