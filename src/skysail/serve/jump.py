"""The SSH jump's process: ``python -m skysail.serve.jump SETTINGS``, unprivileged, in the data plane's namespace.

It opens connections to port 22 of guests for those who hold a key of the guest's account, as far as the guest's firewall lets
their address in. It has no shell, no commands, no other forwarding, and no key but its own host key. Source: RFC 4254, 7.2.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from skysail.ingress.jump import USER, Door, Holder, Settings

log = logging.getLogger(__name__)
SSH_PORT = 22
LOGIN_SECONDS = 20.0


class Gate(asyncssh.SSHServer):
    """One connection to the jump."""

    def __init__(self, rights: Path) -> None:
        self._rights = rights
        self._key = ""

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._client = IPv4Address(conn.get_extra_info("peername")[0])

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        # Asked for a key that is offered, and again for the one that is proven, which comes last.
        self._key = _plain(key.export_public_key().decode())
        return username == USER and any(self._key in map(_plain, holder.keys) for holder in self._holders())

    async def connection_requested(self, dest_host: str, dest_port: int, orig_host: str,
                                   orig_port: int) -> Any:
        door = self._find(dest_host.lower().removesuffix(".")) if dest_port == SSH_PORT else None
        if door is None or not any(self._client in IPv4Network(source, strict=False) for source in door.sources):
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED,
                                            "no instance of yours lets you in there: ask for its name or address, port 22")
        log.info("%s to %s", self._client, door.address)
        return await self._connection.forward_connection(door.address, SSH_PORT)

    def _find(self, word: str) -> Door | None:
        return next((holder.doors[word] for holder in self._holders()
                     if word in holder.doors and self._key in map(_plain, holder.keys)), None)

    def _holders(self) -> tuple[Holder, ...]:
        return msgspec.json.decode(self._rights.read_bytes(), type=tuple[Holder, ...])


def _plain(key: str) -> str:
    """A public key without its comment."""
    return " ".join(key.split()[:2])


async def serve(settings: Settings) -> None:
    """Listen until cancelled."""
    server = await asyncssh.create_server(
        lambda: Gate(Path(settings.rights)), settings.address, settings.port, server_host_keys=[settings.host_key],
        login_timeout=LOGIN_SECONDS, keepalive_interval=60, agent_forwarding=False, x11_forwarding=False, allow_pty=False,
        allow_scp=False)
    sys.stdout.write("listening\n")
    await server.wait_closed()


def main() -> None:
    """Serve with the settings in the file that is named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    asyncio.run(serve(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Settings)))


if __name__ == "__main__":
    main()
