"""The line between the agents of a guest that moves: words in JSON, one a line, and an answer to each, over mutual TLS
between keys of this attempt. The source asks, the target answers.

``seed``: the content of the guest's seed disk. ``sync``: what came of the disks is on the target's disk. ``run``: the right
to run has passed; the answer is ``running``, and for how long it has (``for_ms``), or ``never``, with the reason. ``never``:
it shall not run, if it has not yet; the answer is as to ``run``. Of a guest that came by post-copy the answer has ``pull``,
too, how its memory stands. ``recover``: what is left of that goes by a new connection. ``lost``: nothing of it comes any
more. The answer to both is as to ``run``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from skysail.hypervisor.qmp import Gone, Refused

log = logging.getLogger(__name__)
CONNECT_SECONDS = 5.0
# A seed is some hundred kilobytes.
LINE_BYTES = 16 << 20


class Line:
    """The source's end. Made anew at each word that finds it broken; say a word again until it is answered."""

    def __init__(self, address: str, port: int, context: ssl.SSLContext, name: str) -> None:
        self._place = (address, port)
        self._context = context
        self._name = name
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, word: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer; raises Gone when there is none within ``seconds``, Refused when the target says that it cannot."""
        try:
            async with asyncio.timeout(seconds):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(*self._place, ssl=self._context, server_hostname=self._name,
                                                                  limit=LINE_BYTES)
                reader, writer = self._streams
                writer.write(json.dumps(word).encode() + b"\n")
                await writer.drain()
                answer = json.loads(await reader.readline())
        except (OSError, TimeoutError, ValueError) as silent:
            self.close()
            raise Gone(f"the host that guest {self._name} goes to does not answer ({silent or 'no answer'})") from silent
        except BaseException:
            # Called off: an answer that is still to come would be taken for the next one.
            self.close()
            raise
        if not isinstance(answer, dict) or "error" in answer:
            raise Refused(f"the host that guest {self._name} goes to: {str(answer)[:500]}")
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Ear:
    """The target's end: whoever is called with each word says the answer. Made by :meth:`open`."""

    def __init__(self, hear: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        self._hear = hear
        self._server: asyncio.Server | None = None
        self.talks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, listener: socket.socket, context: ssl.SSLContext,
                   hear: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> Ear:
        """Listen there, until closed."""
        made = cls(hear)
        made._server = await asyncio.start_server(made._talk, sock=listener, ssl=context, limit=LINE_BYTES)
        return made

    def close(self) -> None:
        """Nobody new is listened to; a talk that goes on comes to its end."""
        if self._server is not None:
            self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.talks.add(task)
        task.add_done_callback(self.talks.discard)
        try:
            while text := await reader.readline():
                try:
                    answer = await self._hear(json.loads(text))
                except Exception as failure:
                    log.exception("a word about a guest that comes could not be followed")
                    answer = {"error": str(failure)[:500]}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writer.close()
