"""Who this host is to its controller: its key, which never leaves it, its certificate, and the authority that it trusts.

Both are in one file, so that at every moment they belong together. A certificate is renewed under way: the controller asks
for a request, made with a new key, and brings the certificate. Connections that are open go on; new ones are shown the new
one.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from skysail.contract.identity import host_name
from skysail.kit import certificates, durable
from skysail.kit.errors import SkysailError


class Identity:
    """The files below ``folder``: ``host.pem`` (certificate and key, mode 0600) and ``authority.pem``."""

    def __init__(self, folder: Path) -> None:
        self._host = folder / "host.pem"
        self._next = folder / "next.key"
        self._authority = folder / "authority.pem"
        self._context: ssl.SSLContext | None = None

    def request(self) -> bytes:
        """A request (PEM) for a certificate, with a key that is made and kept for it. One before it is void."""
        key = certificates.new_key()
        self._next.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.replace(self._next, certificates.key_pem(key))
        return certificates.pem(certificates.request(key))

    def repeat(self) -> bytes:
        """The last request that no certificate came for, made with the same key; a new one when there is none."""
        try:
            return certificates.pem(certificates.request(certificates.read_key(self._next.read_bytes())))
        except (FileNotFoundError, ValueError):
            return self.request()

    def begin(self, identity: str, certificate: bytes, authority: bytes) -> None:
        """The first certificate, and the authority that is trusted from now on (PEM, both). Raises SkysailError as
        :meth:`take` does."""
        chain = self._fitting(certificate, x509.load_pem_x509_certificate(authority), host_name(identity))
        durable.replace(self._authority, authority, 0o644)
        self._keep(chain)

    def take(self, certificate: bytes) -> None:
        """Show this certificate (PEM) from now on. Raises SkysailError when it is not by our authority, not for the key of
        our last request, or another host's."""
        self._keep(self._fitting(certificate, x509.load_pem_x509_certificate(self._authority.read_bytes()), self.name))
        if self._context is not None:
            self._context.load_cert_chain(self._host)

    def _fitting(self, pem: bytes, authority: x509.Certificate, name: str) -> bytes:
        """The certificate with its key."""
        try:
            certificate, key = x509.load_pem_x509_certificate(pem), certificates.read_key(self._next.read_bytes())
            certificate.verify_directly_issued_by(authority)
        except FileNotFoundError as unasked:
            raise SkysailError("no certificate was asked for") from unasked
        except (ValueError, TypeError, InvalidSignature) as wrong:
            raise SkysailError(f"the certificate is not by the cloud's authority: {wrong}") from wrong
        if certificate.public_key() != key.public_key():
            raise SkysailError("the certificate is for another key than the one that was asked with last")
        if certificates.held_names(certificate) != certificates.alternative_names([name]):
            raise SkysailError("the certificate is another host's")
        return certificates.pem(certificate) + certificates.key_pem(key)

    def _keep(self, chain: bytes) -> None:
        durable.replace(self._host, chain)
        self._next.unlink(missing_ok=True)

    def _held(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self._host.read_bytes())

    @property
    def name(self) -> str:
        """The host name that the certificate is for."""
        return str(certificates.held_names(self._held()).get_values_for_type(x509.DNSName)[0])

    @property
    def until(self) -> float:
        """When the certificate runs out, in seconds since the epoch."""
        return self._held().not_valid_after_utc.timestamp()

    @property
    def expired(self) -> bool:
        """Whether no controller calls this host any more."""
        return self.until < time.time()

    @property
    def authority(self) -> bytes:
        """The certificate (PEM) of the authority that is trusted."""
        return self._authority.read_bytes()

    @property
    def whole(self) -> bool:
        """Whether certificate, key and authority are there."""
        return self._host.exists() and self._authority.exists()

    def context(self) -> ssl.SSLContext:
        """For those who call: only who shows a certificate of a caller by our authority comes in. Raises SkysailError when
        what is kept cannot be used."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        # Who comes again within hours would be let in by a ticket, and no certificate be looked at.
        made.num_tickets = 0
        try:
            made.load_verify_locations(self._authority)
            made.load_cert_chain(self._host)
        except (OSError, ssl.SSLError) as unusable:
            raise SkysailError(f"the certificate in {self._host.parent} cannot be used: {unusable}",
                               "join the cloud again") from unusable
        self._context = made
        return made
