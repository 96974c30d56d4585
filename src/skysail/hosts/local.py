"""HTTP to agents on this very machine, by Unix sockets and the event loop's own streams.

httpx's own way to a Unix socket (anyio) has the loop tell it of each socket that can be read, and takes that back when it has
heard. uvloop tells once more where more than a thousand sockets can be read at the same moment, before anything was taken
back: with ten thousand simulated hosts each of them was an error in the log, ten thousand times a second.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx


class Local(httpx.AsyncHTTPTransport):
    """A transport to the Unix socket at ``path``. No connection is kept: a new one costs nothing, an idle one an open
    file."""

    def __init__(self, path: str) -> None:
        # Without TLS, of which each would hold a store of certificates.
        super().__init__(uds=path, verify=False)
        self._pool = httpcore.AsyncConnectionPool(uds=path, network_backend=_Sockets(), max_connections=None,
                                                  max_keepalive_connections=0)


class _Sockets(httpcore.AsyncNetworkBackend):
    async def connect_unix_socket(self, path: str, timeout: float | None = None,
                                  socket_options: Iterable[Any] | None = None) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                return _Stream(*await asyncio.open_unix_connection(path))
        except TimeoutError as late:
            raise httpcore.ConnectTimeout from late
        except OSError as refused:
            raise httpcore.ConnectError(str(refused)) from refused

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        # Until when what is read now has to have come; the one timer that looks whether it has, and when it does.
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._looks = math.inf

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._await_until(asyncio.get_running_loop().time() + timeout if timeout is not None else math.inf)
        try:
            return await self._reader.read(max_bytes)
        except TimeoutError as late:
            raise httpcore.ReadTimeout from late
        except OSError as broken:
            raise httpcore.ReadError(str(broken)) from broken
        finally:
            self._due = math.inf

    def _await_until(self, due: float) -> None:
        # Of lines that come every few seconds a timer for each, made and taken back, costs more than the lines do.
        self._due = due
        if self._timer is not None and due < self._looks:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due < math.inf:
            self._timer, self._looks = asyncio.get_running_loop().call_at(due, self._look), due

    def _look(self) -> None:
        self._timer = None
        if asyncio.get_running_loop().time() < self._due:
            self._await_until(self._due)
        else:
            self._reader.set_exception(TimeoutError())

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()
        except TimeoutError as late:
            raise httpcore.WriteTimeout from late
        except OSError as broken:
            raise httpcore.WriteError(str(broken)) from broken

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._writer.close()

    async def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str | None = None,
                        timeout: float | None = None) -> httpcore.AsyncNetworkStream:
        raise NotImplementedError("there is nobody in between")

    def get_extra_info(self, info: str) -> Any:
        return None
