"""A post office for tests: a real SMTP receiver and a real HTTP one, on the loopback address, that keep what they are given.

The receiver speaks RFC 5321 as far as a client of ours goes, STARTTLS (RFC 3207) and AUTH PLAIN (RFC 4954). It may be told to
turn mail away for a while, or a receiver for good.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email
import email.policy
import json
import ssl
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PostOffice:
    """What came in: ``mails`` in their order. ``closed``: each mail is turned away with 451; ``unknown``: receivers that do
    not exist. With ``tls`` and ``password`` it wants both before any mail."""

    def __init__(self, tls: ssl.SSLContext | None = None, password: str = "") -> None:
        self.mails: list[EmailMessage] = []
        self.receivers: list[str] = []
        self.closed = False
        self.unknown: set[str] = set()
        self.attempts = 0
        self._tls, self._password = tls, password
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
            self.port: int = self._server.sockets[0].getsockname()[1]
            started.set()
            with contextlib.suppress(asyncio.CancelledError):
                await self._server.serve_forever()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),), daemon=True)
        self._thread.start()
        started.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._thread.join(10)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(line: str) -> None:
            writer.write(line.encode() + b"\r\n")

        say("220 post office")
        secure, known = self._tls is None, not self._password
        receivers: list[str] = []
        while line := (await reader.readline()).decode().strip():
            verb, _, rest = line.partition(" ")
            match verb.upper():
                case "EHLO":
                    say("250-post office")
                    if not secure:
                        say("250-STARTTLS")
                    say("250 AUTH PLAIN")
                case "STARTTLS":
                    say("220 go ahead")
                    await writer.drain()
                    assert self._tls is not None
                    await writer.start_tls(self._tls)
                    secure = True
                case "AUTH":
                    known = base64.b64decode(rest.split()[1]).split(b"\0")[2].decode() == self._password
                    say("235 welcome" if known else "535 who are you")
                case "MAIL":
                    self.attempts += 1
                    say("530 not like this" if not (secure and known) else "451 come back later" if self.closed else "250 ok")
                case "RCPT":
                    receiver = rest[rest.index("<") + 1:rest.index(">")]
                    say("550 nobody of that name" if receiver in self.unknown else "250 ok")
                    receivers.append(receiver)
                case "DATA":
                    say("354 go on")
                    content = await reader.readuntil(b"\r\n.\r\n")
                    mail = email.message_from_bytes(content[:-5].replace(b"\r\n..", b"\r\n."), policy=email.policy.default)
                    assert isinstance(mail, EmailMessage)
                    self.mails.append(mail)
                    self.receivers.append(receivers.pop())
                    say("250 taken over")
                case "QUIT":
                    say("221 bye")
                    break
                case _:
                    say("250 ok")
            await writer.drain()
        writer.close()


class Hook:
    """What was posted to a webhook; ``answer`` is the status that it answers with."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.answer = 204
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                hook.posts.append((self.headers["Idempotency-Key"], body))
                self.send_response(hook.answer)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def post_office(tls: ssl.SSLContext | None = None, password: str = "") -> Iterator[PostOffice]:
    """One that is open as long as the context lasts."""
    made = PostOffice(tls, password)
    try:
        yield made
    finally:
        made.close()
