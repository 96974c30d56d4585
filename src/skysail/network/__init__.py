"""The network door: ports, addresses and firewall of one host. Engines: Linux, and a simulation."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

import msgspec
import pyroute2.config

from skysail.contract.document import Network, Overlay, Port

# pyroute2 works in another namespace by a fork of this process, which it ends by SIGTERM. With our own handlers that copy
# would go on as if it were this process being told to end: it would unwind our callers, and tear down what is ours.
pyroute2.config.disable_mp_signal = True


class PortCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one port since it was made, as the guest sees them."""

    rx_bytes: int
    tx_bytes: int


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """By port, the numbers of the networks whose guests reach it; and the ports that peer subnets reach."""

    reached_by: dict[str, tuple[int, ...]]
    routed: tuple[str, ...]


class Fabric(Protocol):
    """Holds the data plane. ``apply`` is idempotent and atomic for the ruleset."""

    async def apply(self, ports: Sequence[Port], networks: Sequence[Network] = (), overlay: Overlay | None = None) -> None:
        """Make exactly these ports exist, with their addresses and firewall; remove what is left over. Join exactly these
        networks: what is joined no more is cut, connections that are open too. With an ``overlay``, those with an identifier
        span hosts: a new port that is not awaited is announced to the other hosts, and one that another host announces after
        that is taken for gone there.

        Raises SkysailError for a port that cannot be, or two that contradict each other; then nothing was changed."""
        ...

    async def announce(self, port: str) -> None:
        """The guest of this port runs here, from now on: its addresses are here, and all that reach it learn it. Says nothing
        to the controller, and waits for no answer. Raises SkysailError for a port that was not applied."""
        ...

    async def open_port(self, port: Port) -> int:
        """A file descriptor of the port's tap device; the caller owns and closes it. Raises SkysailError when the port
        does not exist, or somebody else holds its tap and does not let go."""
        ...

    async def listen(self) -> tuple[socket.socket, ...]:
        """The sockets that guests reach where they ask for their metadata: the same ones as long as they are reached. They
        stay the fabric's. Raises SkysailError when there is no data plane yet, or somebody else holds that address in it."""
        ...

    async def observe(self) -> dict[str, PortCounters]:
        """Existing ports by id; no effects."""
        ...

    async def joined(self) -> Joined:
        """Who is let through to existing ports; no effects."""
        ...

    async def check(self) -> list[str]:
        """What keeps this engine from working here, each with its cure."""
        ...
