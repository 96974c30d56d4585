"""A second server within a process: another address, another protocol, the same event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator

import uvicorn

# linux/in.h, linux/in6.h: an address may be bound to that is not there yet, as before a network is up.
IP_FREEBIND, IPV6_FREEBIND = 15, 78


class _Beside(uvicorn.Server):
    """Signals are the first server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def served(config: uvicorn.Config, listener: socket.socket, context: ssl.SSLContext) -> AsyncIterator[None]:
    """The application of ``config`` answers at ``listener`` by TLS for as long as the context lasts. Its lifespan is not run:
    it is the first server's."""
    config.lifespan = "off"
    config.load()
    config.ssl = context
    server = _Beside(config)
    work = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await work


def listen(address: str, port: int) -> socket.socket:
    """A TCP socket at an address of this machine, which need not be there yet. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    try:
        made.bind((address, port))
    except OSError:
        made.close()
        raise
    return made
