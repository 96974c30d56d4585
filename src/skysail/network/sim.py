"""A network without packets: ports in memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from skysail.contract.document import Network, Overlay, Port
from skysail.kit.errors import SkysailError
from skysail.network import Joined, PortCounters
from skysail.network.plan import vet, vet_overlay


class SimFabric:
    """Remembers which ports exist. ``flow`` says what has gone through one."""

    def __init__(self, flow: Callable[[str], tuple[int, int]] = lambda port: (0, 0)) -> None:
        self._flow = flow
        self._ports: dict[str, Port] = {}
        self._networks: dict[int, Network] = {}

    async def apply(self, ports: Sequence[Port], networks: Sequence[Network] = (), overlay: Overlay | None = None) -> None:
        vet(ports)
        if overlay is not None:
            vet_overlay(overlay, networks)
        self._ports = {port.id: port for port in ports}
        self._networks = {network.number: network for network in networks}

    async def announce(self, port: str) -> None:
        if port not in self._ports:
            raise SkysailError(f"port {port} does not exist", "apply the port first")

    async def open_port(self, port: Port) -> int:
        if port.id not in self._ports:
            raise SkysailError(f"port {port.id} does not exist", "apply the port first")
        return os.open(os.devnull, os.O_RDWR)

    async def listen(self) -> tuple[socket.socket, ...]:
        return ()

    async def observe(self) -> dict[str, PortCounters]:
        flows = {identifier: self._flow(identifier) for identifier in self._ports}
        return {identifier: PortCounters(rx_bytes=rx, tx_bytes=tx) for identifier, (rx, tx) in flows.items()}

    async def joined(self) -> Joined:
        alone = Network(number=0)
        return Joined(
            reached_by={port.id: tuple(sorted((port.network, *self._networks.get(port.network, alone).peers)))
                        for port in self._ports.values()},
            routed=tuple(sorted(port.id for port in self._ports.values() if self._networks.get(port.network, alone).routed)))

    async def check(self) -> list[str]:
        return []
