"""Secrets at rest: sealed with AES-GCM under the cloud's master key, which lives in a file of its own.

A SigV4 secret has to be readable to verify a signature (AWS General Reference, "Create a signed request"), so it is
sealed rather than hashed.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class Vault:
    """Seals and opens small secrets; ``purpose`` is bound to the text, so that a secret can't be moved to another row."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    @classmethod
    def at(cls, path: Path) -> Vault:
        """The vault of the master key in ``path`` (made, mode 0600, if absent)."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls(path.read_bytes())
        key = AESGCM.generate_key(256)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        return cls(key)

    def seal(self, secret: str, purpose: str) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, secret.encode(), purpose.encode())

    def open(self, sealed: bytes, purpose: str) -> str:
        return self._cipher.decrypt(sealed[:12], sealed[12:], purpose.encode()).decode()
