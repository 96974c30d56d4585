"""The endpoint's certificate: a small authority of the cloud's own, and the server's certificate by it.

The authority is made once and stays, so that clients trust it for good; the server's certificate is made anew when it runs
out soon or its names change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from skysail.kit import certificates, durable

DAY = 86400.0
AUTHORITY_DAYS = 3650
SERVER_DAYS = 398
RENEW_DAYS = 60


class Certificates:
    """The files below ``folder``: authority and server, each a certificate (PEM) and a key (PEM, mode 0600)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def authority(self) -> Path:
        """What clients are given to trust."""
        return self._folder / "authority.pem"

    @property
    def server(self) -> tuple[Path, Path]:
        """The server's certificate and its key."""
        return self._folder / "server.pem", self._folder / "server.key"

    def ensure(self, names: Sequence[str], now_seconds: float) -> None:
        """All four files are there, and the server's certificate is good for ``names`` (host names and addresses)."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_path = self._folder / "authority.key"
        if not self.authority.exists():
            # The key first: a certificate without it would be taken for a finished authority.
            key = _new_key(key_path)
            made = certificates.authority(key, "Skysail cloud", now_seconds, AUTHORITY_DAYS * DAY)
            durable.replace(self.authority, certificates.pem(made), 0o644)
        server, server_key = self.server
        if not (server.exists() and server_key.exists() and _good(server, names, now_seconds)):
            issuer = x509.load_pem_x509_certificate(self.authority.read_bytes())
            signer = certificates.read_key(key_path.read_bytes())
            made = certificates.issue(issuer, signer, _new_key(server_key).public_key(), names, now_seconds,
                                      SERVER_DAYS * DAY, {"server"})
            durable.replace(server, certificates.pem(made), 0o644)


def _good(path: Path, names: Sequence[str], now_seconds: float) -> bool:
    held = x509.load_pem_x509_certificate(path.read_bytes())
    return (held.not_valid_after_utc.timestamp() > now_seconds + RENEW_DAYS * DAY
            and certificates.held_names(held) == certificates.alternative_names(names))


def _new_key(path: Path) -> certificates.Key:
    key = certificates.new_key()
    durable.replace(path, certificates.key_pem(key))
    return key
