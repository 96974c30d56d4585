"""Certificates of one attempt to move one guest.

Each side makes an authority, has it sign the one certificate that it shows, and forgets the authority's key. The other side
is told the authority, and trusts nobody else. A guest's own process reads these files: what it could do with them is to take
part in its own migration.

Source: QEMU "TLS setup for network services" (names of the files in a folder of tls-creds-x509); RFC 5280.
"""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skysail.kit import durable

# Clocks of two hosts differ; an attempt does not last longer.
EARLY, LATE = datetime.timedelta(days=1), datetime.timedelta(days=7)
Endpoint = Literal["client", "server"]


def make(folder: Path, endpoint: Endpoint, name: str, uid: int) -> str:
    """A new folder with the key and the certificate of ``name``, for the eyes of ``uid``; its authority, in PEM."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o750)
    os.chown(folder, 0, uid)
    signer, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate(f"authority of {name}", signer, signer, f"authority of {name}", True)
    own = _certificate(name, key, signer, f"authority of {name}", False)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, text in ((f"{endpoint}-key.pem", secret), (f"{endpoint}-cert.pem", _pem(own))):
        durable.replace(folder / file, text, 0o640, (0, uid))
    return _pem(authority).decode()


def trust(folder: Path, authority: str, uid: int) -> None:
    """Let whoever uses the folder trust that authority, and no other."""
    durable.replace(folder / "ca-cert.pem", authority.encode(), 0o640, (0, uid))


def named(folder: Path, endpoint: Endpoint, name: str) -> dict[str, object]:
    """QEMU's object over the folder, in the words of ``object-add``. Its check of our own certificate is left out: it would
    look for our own authority, which we do not trust in others."""
    return {"qom-type": "tls-creds-x509", "id": name, "dir": str(folder), "endpoint": endpoint, "verify-peer": True,
            "sanity-check": False}


def context(folder: Path, endpoint: Endpoint) -> ssl.SSLContext:
    """For our own connections by these certificates, which both sides show."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if endpoint == "client" else ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cafile=str(folder / "ca-cert.pem"))
    made.load_cert_chain(str(folder / f"{endpoint}-cert.pem"), str(folder / f"{endpoint}-key.pem"))
    return made


def _certificate(name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, issuer: str,
                 authority: bool) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not authority, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=authority, crl_sign=authority, encipher_only=False, decipher_only=False)
    made = (x509.CertificateBuilder().subject_name(_name(name)).issuer_name(_name(issuer)).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - EARLY).not_valid_after(now + LATE)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False))
    if not authority:
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    return made.sign(signer, hashes.SHA256())


def _name(name: str) -> x509.Name:
    # RFC 5280, appendix A: a common name has 64 characters at most.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
