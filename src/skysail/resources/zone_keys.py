"""Keys that sign zones: one per zone, for its keys and its records alike (a combined signing key).

The controller makes and keeps them (sealed), so that every host signs alike, and a name server's lost database takes no key
with it: the delegation at the registrar stays good. Source: RFC 4034, 6605 (algorithm 13), 8624 (why this algorithm).
"""

from __future__ import annotations

import base64

import dns.dnssec
import dns.dnssectypes
import dns.name
from cryptography.hazmat.primitives.asymmetric import ec

_HEAD = "Private-key-format: v1.2\nAlgorithm: 13 (ECDSAP256SHA256)\nPrivateKey: "
# Zone key and secure entry point (RFC 4034, 2.1.1).
_FLAGS = 257


def make(zone: str) -> tuple[str, str]:
    """A new key: its private half in the form of BIND's key files, and its delegation signer record (SHA-256)."""
    key = ec.generate_private_key(ec.SECP256R1())
    number = key.private_numbers().private_value.to_bytes(32, "big")
    public = dns.dnssec.make_dnskey(key.public_key(), dns.dnssectypes.Algorithm.ECDSAP256SHA256, flags=_FLAGS)
    signer = dns.dnssec.make_ds(dns.name.from_text(zone), public, "SHA256")
    return f"{_HEAD}{base64.b64encode(number).decode()}\n", signer.to_text()
