"""The SSH jump of a single address, ``ssh -J jump@ADDRESS INSTANCE``: what it may do, and its process.

The process (``skysail.serve.jump``) runs without any privilege and knows public keys only. It reads its rights from a file,
which is replaced as a whole, at each login and each connection: a change acts at once and ends nothing that is open.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import asyncssh
import msgspec

from skysail.contract.document import Entrance, Guest
from skysail.kit import durable
from skysail.kit.confined import Confined
from skysail.kit.process import in_thread

USER = "jump"


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's SSH: where it is, and the networks that its firewall lets in."""

    address: str
    sources: tuple[str, ...]


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever has one of ``keys`` may go through ``doors``, which are asked for by name or address."""

    keys: tuple[str, ...]
    doors: dict[str, Door]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is started with. ``program`` tells its code: another one is started anew."""

    address: str
    port: int
    host_key: str
    rights: str
    program: str


class Jump:
    """The jump with its files in ``folder``, which listens on ``address`` in the data plane's ``namespace``."""

    def __init__(self, folder: Path, *, namespace: str, address: str, port: int, user: str, log: Path, program: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._listener = Confined(folder, "python", namespace, user, log)
        self._settings = Settings(address=address, port=port, host_key=str(folder / "host_key"),
                                  rights=str(folder / "rights.json"),
                                  program=hashlib.sha256(program.read_bytes() + Path(__file__).read_bytes()).hexdigest())
        text = msgspec.json.encode(self._settings)
        self._file = folder / f"jump-{hashlib.sha256(text).hexdigest()[:16]}.json"

    async def apply(self, entrance: Entrance, guests: Mapping[str, Guest]) -> None:
        """See :class:`skysail.ingress.Ingress`."""
        await in_thread(self._apply, entrance, dict(guests))

    def _apply(self, entrance: Entrance, guests: dict[str, Guest]) -> None:
        with self._lock:
            account = self._prepare()
            text, path = msgspec.json.encode(rights(entrance, guests)), Path(self._settings.rights)
            if not path.exists() or path.read_bytes() != text:
                durable.replace(path, text, 0o400, (account.pw_uid, account.pw_gid))
            self._listener.ensure([sys.executable, "-m", "skysail.serve.jump", str(self._file)], self._file, self._ready, {
                "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.environ.get("PYTHONPATH", "")})

    def _prepare(self) -> pwd.struct_passwd:
        account = self._listener.prepare()
        key = Path(self._settings.host_key)
        if not key.exists():
            made = asyncssh.generate_private_key("ssh-ed25519")
            durable.replace(key.with_suffix(".pub"), made.export_public_key(), 0o644)
            durable.replace(key, made.export_private_key(), 0o400, (account.pw_uid, account.pw_gid))
        if not self._file.exists():
            for former in self._folder.glob("jump-*.json"):
                former.unlink()
            durable.replace(self._file, msgspec.json.encode(self._settings), 0o644)
        return account

    def _ready(self) -> bool:
        # It says so itself: its port is in a namespace in which we are not.
        return self._listener.said_since_start("listening")

    def alive(self) -> bool:
        return self._listener.alive()

    async def observe(self) -> dict[str, str]:
        return {}

    async def end(self) -> None:
        await in_thread(self._listener.end)

    async def check(self) -> list[str]:
        return []


def rights(entrance: Entrance, guests: Mapping[str, Guest]) -> tuple[Holder, ...]:
    """Who may go where: the holders of an account's keys to the SSH of its guests. A name that two of them have, in different
    regions, means neither."""
    called: dict[str, list[str]] = {}
    for one in entrance.names:
        called.setdefault(one.guest, []).append(one.name)
    made = []
    for account in entrance.accounts:
        own = [guest for guest in guests.values() if guest.port.network in account.networks]
        alike = Counter(guest.instance.lower() for guest in own)
        doors: dict[str, Door] = {}
        for guest in own:
            name = guest.instance.lower()
            words = [guest.port.private_ipv4, guest.port.public_ipv4, *called.get(guest.id, ())]
            door = Door(address=guest.port.private_ipv4, sources=guest.port.sources(22))
            doors |= dict.fromkeys(filter(None, [name, *words] if alike[name] == 1 else words), door)
        made.append(Holder(keys=account.keys, doors=doors))
    return tuple(made)
