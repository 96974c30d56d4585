"""What the controller shows to agents: a certificate of its own, that it makes for itself and renews before it runs out."""

from __future__ import annotations

import os
import ssl
import threading

from skysail.hosts.authority import Authority
from skysail.kit import certificates
from skysail.kit.clock import Clock
from skysail.store.database import Database
from skysail.store.vault import Vault

# A certificate is renewed when this part of its life is over: whoever is away for the rest of it has to join again.
RENEW_AFTER = 1 / 3


class Credentials:
    """The controller's side of mutual TLS. Nothing is made before the first host asks for it: a cloud of one machine has no
    authority."""

    def __init__(self, database: Database, vault: Vault, clock: Clock, lifetime_seconds: float) -> None:
        self._database = database
        self._vault = vault
        self._clock = clock
        self._lifetime_seconds = lifetime_seconds
        self._authority: Authority | None = None
        self._context: ssl.SSLContext | None = None
        self._renew_at = 0.0
        self._lock = threading.Lock()

    def authority(self) -> Authority:
        """The cloud's authority; it is made if there is none."""
        with self._lock:
            return self._ensure_authority()

    def _ensure_authority(self) -> Authority:
        if self._authority is None:
            with self._database.transaction(write=False) as connection:
                self._authority = Authority.find(connection, self._vault, self._lifetime_seconds)
        if self._authority is None:
            with self._database.transaction() as connection:
                self._authority = Authority.ensure(connection, self._vault, self._clock.now(), self._lifetime_seconds)
        return self._authority

    def context(self) -> ssl.SSLContext:
        """For connections to agents. Always the same one: what it shows changes, for connections that begin from then on."""
        with self._lock:
            authority, now = self._ensure_authority(), self._clock.now()
            if self._context is None:
                self._context = calling(authority)
            if now >= self._renew_at:
                show_controller(self._context, authority, now)
                self._renew_at = now + self.renewal_seconds
            return self._context

    def certify(self, identity: str, request: bytes) -> bytes:
        """A new certificate (PEM) of a host, see :meth:`Authority.certify_host`."""
        return self.authority().certify_host(identity, request, self._clock.now())

    @property
    def renewal_seconds(self) -> float:
        """How long a new certificate is used before another one is made."""
        return RENEW_AFTER * self._lifetime_seconds

    def due_in(self, until: float) -> float:
        """Seconds until a certificate that runs out at ``until`` is to be renewed."""
        return until - (1 - RENEW_AFTER) * self._lifetime_seconds - self._clock.now()


def calling(authority: Authority) -> ssl.SSLContext:
    """For who calls agents that this authority certified; it shows nothing yet."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(cadata=authority.pem.decode())
    return made


def show_controller(context: ssl.SSLContext, authority: Authority, now: float) -> None:
    """Let ``context`` show a new certificate of a controller."""
    key = certificates.new_key()
    show(context, authority.certify_controller(key, now) + certificates.key_pem(key))


def show(context: ssl.SSLContext, chain: bytes) -> None:
    """Let ``context`` show this certificate with its key (PEM) from now on. OpenSSL reads them from a file only; this one is
    memory that no other process sees."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
