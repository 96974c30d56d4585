"""The endpoint's certificate: a small authority of the cloud's own, and the server's certificate by it.

The authority is made once and stays, so that clients trust it for good; the server's certificate is made anew when it runs
out soon or its names change. Source: RFC 5280; RFC 6125 (names stand in subjectAltName).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skysail.kit import durable

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
        now = datetime.datetime.fromtimestamp(now_seconds, datetime.UTC)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_path = self._folder / "authority.key"
        if not self.authority.exists():
            # The key first: a certificate without it would be taken for a finished authority.
            key = _new_key(key_path)
            durable.replace(self.authority, _authority(key, now).public_bytes(serialization.Encoding.PEM), 0o644)
        server, server_key = self.server
        if not (server.exists() and server_key.exists() and _good(server, names, now)):
            issuer = x509.load_pem_x509_certificate(self.authority.read_bytes())
            signer = serialization.load_pem_private_key(key_path.read_bytes(), None)
            assert isinstance(signer, ec.EllipticCurvePrivateKey)
            made = _server(_new_key(server_key), issuer, signer, names, now)
            durable.replace(server, made.public_bytes(serialization.Encoding.PEM), 0o644)


def _good(path: Path, names: Sequence[str], now: datetime.datetime) -> bool:
    held = x509.load_pem_x509_certificate(path.read_bytes())
    shown = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return held.not_valid_after_utc > now + datetime.timedelta(days=RENEW_DAYS) and shown == _names(names)


def _names(names: Sequence[str]) -> x509.SubjectAlternativeName:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return x509.SubjectAlternativeName(found)


def _begin(key: ec.EllipticCurvePrivateKey, name: str, issuer: x509.Name | None, now: datetime.datetime,
           days: int) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=days)))


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    return (_begin(key, "Skysail cloud", None, now, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_usage(signs=True), critical=True).sign(key, hashes.SHA256()))


def _server(key: ec.EllipticCurvePrivateKey, issuer: x509.Certificate, signer: ec.EllipticCurvePrivateKey,
            names: Sequence[str], now: datetime.datetime) -> x509.Certificate:
    return (_begin(key, names[0], issuer.subject, now, SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_names(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_usage(signs=False), critical=True).sign(signer, hashes.SHA256()))


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    durable.replace(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                            serialization.NoEncryption()))
    return key
