"""X.509 certificates as Skysail makes them: ECDSA keys on P-256, a small authority of its own, certificates by it.

Source: RFC 5280; RFC 6125 (names stand in subjectAltName); RFC 2986 (requests).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Collection, Sequence
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey
# Which end of a connection its holder may be. OpenSSL refuses a certificate at the other end.
Purpose = Literal["server", "client"]
_PURPOSES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
# A clock that is behind ours by less does not refuse what was made just now.
CLOCK_SECONDS = 3600.0


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """The key, not encrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def read_key(pem: bytes) -> Key:
    """Raises ValueError for what is no such key."""
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on an elliptic curve")
    return key


def pem(certificate: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the whole certificate, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def authority(key: Key, name: str, now: float, seconds: float) -> x509.Certificate:
    """A certificate that certifies others, and nothing else, by itself."""
    return (_begin(key.public_key(), name, None, now, seconds)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_usage(signs=True), critical=True).sign(key, hashes.SHA256()))


def issue(issuer: x509.Certificate, signer: Key, public: ec.EllipticCurvePublicKey, names: Sequence[str], now: float,
          seconds: float, purposes: Collection[Purpose]) -> x509.Certificate:
    """A certificate by ``issuer`` for the holder of ``public``, who has these host names and addresses."""
    return (_begin(public, names[0], issuer.subject, now, seconds)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(alternative_names(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.ExtendedKeyUsage([_PURPOSES[one] for one in sorted(purposes)]), critical=False)
            .add_extension(_usage(signs=False), critical=True).sign(signer, hashes.SHA256()))


def request(key: Key) -> x509.CertificateSigningRequest:
    """Asks for a certificate for the holder of ``key``, whose names are for the authority to say."""
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())


def requested_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request is for, whose holder made it. Raises ValueError for anything else."""
    asked = x509.load_pem_x509_csr(pem)
    public = asked.public_key()
    if not asked.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError("not a request by the holder of a key on an elliptic curve")
    return public


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def alternative_names(names: Sequence[str]) -> x509.SubjectAlternativeName:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return x509.SubjectAlternativeName(found)


def held_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    """The names that a certificate is good for."""
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _begin(public: ec.EllipticCurvePublicKey, name: str, issuer: x509.Name | None, now: float,
           seconds: float) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])  # RFC 5280, A.1: ub-common-name
    begin = datetime.datetime.fromtimestamp(now - CLOCK_SECONDS, datetime.UTC)
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(begin)
            .not_valid_after(datetime.datetime.fromtimestamp(now + seconds, datetime.UTC)))


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)
