"""What a guest's disks and memory go by to another host: its QEMU has no network.

Each disk has a connection of its own, which we open, and whose descriptor QEMU gets. Memory goes by a Unix socket, and from
there by a relay, which outlives us. TLS is between the two QEMUs, by the certificates of the attempt.

Source: QEMU QMP Reference Manual, object-add, qom-list, getfd; "TLS setup for network services".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any

from skysail.contract.migration import Destination
from skysail.hypervisor import credentials, ferry, relay
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.qmp import Monitor
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread

CONNECT_SECONDS = 10.0
# A QEMU that has not answered for so long waits for the network.
HANG_SECONDS = 5.0
# What QEMU's names of certificates begin with.
TLS = "move."
# linux/tcp.h, struct tcp_info: where tcpi_bytes_acked is.
_ACKED = 120


class Failed(SkysailError):
    """The attempt is over, the guest is still ours."""


class Connections:
    """Those of one attempt of one guest, to the guest ``name`` at its destination. ``relay_uid`` carries its memory to the
    network."""

    def __init__(self, guest: QemuGuest, destination: Destination, name: str, relay_uid: int) -> None:
        self._guest = guest
        self._destination = destination
        self._name = name
        self._relay_uid = relay_uid
        # Those of the disks, which QEMU has too; and what arrived by former ones.
        self._sockets: list[socket.socket] = []
        self._arrived = 0

    @property
    def _folder(self) -> Path:
        return self._guest.folder / "move"

    @property
    def tls(self) -> dict[str, str]:
        """By whose certificates QEMU talks to whom, in QMP's words."""
        return {"tls-creds": f"{TLS}{self._name}", "tls-hostname": self._name}

    async def take_certificates(self, monitor: Monitor) -> None:
        """QEMU holds those of this attempt; undone by :func:`drop_certificates`."""
        name = self.tls["tls-creds"]
        if name not in await _held(monitor):
            await monitor.execute("object-add", credentials.named(self._folder, "client", name))

    async def to_disks(self, monitor: Monitor, name: str) -> None:
        """QEMU has one more connection to the target's disks, as the descriptor ``name``. Raises Failed when they are not
        reached."""
        address = self._destination.address
        try:
            made = await in_thread(socket.create_connection, (address, self._destination.disks_port), CONNECT_SECONDS)
        except OSError as failure:
            raise Failed(f"the disks at {address} are not reached: {failure}") from failure
        made.settimeout(None)
        ferry.attend(made)
        self._sockets.append(made)
        await monitor.pass_descriptor(name, made.fileno())

    def to_memory(self) -> Path:
        """A socket that the guest's process can send its memory to. What it sends is carried by a new relay, until
        :func:`skysail.hypervisor.relay.end`."""
        relay.end(self._guest.folder)
        outlet = self._folder / "out.sock"
        outlet.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(outlet))
            os.chown(outlet, self._guest.record.uid, -1)
            listener.listen(64)
            target = f"{self._destination.address}:{self._destination.memory_port}"
            relay.spawn(listener, target, self._guest.folder, uid=self._relay_uid, networked=True)
        return outlet

    async def ask(self, monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """QEMU's answer. When it greets the other side, and when it begins to send, it waits for the network with its main
        loop, and the guest with it: if the network goes away in such a moment, we hang up. Raises Failed then."""
        answer = asyncio.ensure_future(monitor.execute(command, arguments))
        done, _ = await asyncio.wait((answer,), timeout=HANG_SECONDS)
        if not done:
            self.hang_up()
        try:
            return await answer
        finally:
            if not done:
                raise Failed(f"the network between the hosts went away, and QEMU waited for it with {command}")

    def hang_up(self) -> None:
        """Break the connections under QEMU, which may wait for one of them with its main loop."""
        relay.end(self._guest.folder)
        for made in self._sockets:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)

    def disk_bytes(self) -> int:
        """What has arrived at the target of disks, as the kernel counts it."""
        return self._arrived + sum(
            int(struct.unpack_from("=Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED + 8), _ACKED)[0])
            for one in self._sockets)

    def close(self) -> None:
        """We have none of them any more; what goes by them goes on."""
        self._arrived = self.disk_bytes()
        for made in self._sockets:
            made.close()
        self._sockets.clear()


async def drop_certificates(monitor: Monitor) -> None:
    """QEMU holds none of any attempt."""
    for name in await _held(monitor):
        await monitor.execute("object-del", {"id": name})


async def _held(monitor: Monitor) -> list[str]:
    """The certificates of attempts that QEMU holds, by name."""
    return [one["name"] for one in await monitor.execute("qom-list", {"path": "/objects"}) if one["name"].startswith(TLS)]
