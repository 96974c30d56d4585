"""A network without packets: ports in memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from skysail.contract.document import Port
from skysail.kit.errors import SkysailError
from skysail.network import PortCounters
from skysail.network.plan import vet


class SimFabric:
    """Remembers which ports exist. ``flow`` says what has gone through one."""

    def __init__(self, flow: Callable[[str], tuple[int, int]] = lambda port: (0, 0)) -> None:
        self._flow = flow
        self._ports: dict[str, Port] = {}

    async def apply(self, ports: Sequence[Port]) -> None:
        vet(ports)
        self._ports = {port.id: port for port in ports}

    async def open_port(self, port: Port) -> int:
        if port.id not in self._ports:
            raise SkysailError(f"port {port.id} does not exist", "apply the port first")
        return os.open(os.devnull, os.O_RDWR)

    async def listen(self) -> tuple[socket.socket, ...]:
        return ()

    async def observe(self) -> dict[str, PortCounters]:
        flows = {identifier: self._flow(identifier) for identifier in self._ports}
        return {identifier: PortCounters(rx_bytes=rx, tx_bytes=tx) for identifier, (rx, tx) in flows.items()}

    async def check(self) -> list[str]:
        return []
