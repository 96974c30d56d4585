"""A network without packets: ports in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from skysail.contract.document import Port
from skysail.kit.errors import SkysailError
from skysail.network import PortCounters
from skysail.network.plan import vet


class SimFabric:
    """Remembers which ports exist."""

    def __init__(self) -> None:
        self._ports: dict[str, Port] = {}

    async def apply(self, ports: Sequence[Port]) -> None:
        vet(ports)
        self._ports = {port.id: port for port in ports}

    async def open_port(self, port: Port) -> int:
        if port.id not in self._ports:
            raise SkysailError(f"port {port.id} does not exist", "apply the port first")
        return os.open(os.devnull, os.O_RDWR)

    async def observe(self) -> dict[str, PortCounters]:
        return {identifier: PortCounters(rx_bytes=0, tx_bytes=0) for identifier in self._ports}

    async def check(self) -> list[str]:
        return []
