"""The process that guests reach at 169.254.169.254. They are hostile: it has an unprivileged user of its own, no capability,
a network namespace without devices, and nothing but the sockets that its agent made for it.

``responder.py MARK DESCRIPTOR...``: the descriptors are listening sockets, standard input is a socket to the agent, which
says in lines of JSON who is to be told what, and is answered line by line. When that socket ends, this process does.

A guest is known by the address that it asks from: what is on its tap lets no other source through. Tokens are sealed for one
guest under the cloud's key and kept nowhere. Source: EC2 user guide, "How Instance Metadata Service Version 2 works".

Kept free of imports beyond the standard library: it is started without any of the agent's own.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import hashlib
import hmac
import json
import os
import re
import resource
import socket
import struct
import sys
import time
import urllib.parse
from email.utils import formatdate
from typing import Any

# Of one request, its answer included; and of a client that does not take note of its end.
REQUEST_SECONDS, FAREWELL_SECONDS = 10.0, 2.0
MAX_HEAD_BYTES, MAX_BODY_BYTES = 8192, 4096
MAX_OPEN, MAX_OPEN_OF_ONE = 800, 16
MAX_REQUESTS_A_SECOND = 200
MAX_TOKEN_SECONDS = 21600
HOPS = 64
TOKEN, TOKEN_SECONDS = "x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds"
# All of them hold the same tree; clients look for one that they know.
VERSIONS = ("1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
            "2009-04-04", "2011-01-01", "2011-05-01", "2012-01-12", "2014-02-25", "2014-11-05", "2015-10-20", "2016-04-19",
            "2016-06-30", "2016-09-02", "2018-03-28", "2018-08-17", "2018-09-24", "2019-10-01", "2020-10-27", "2021-01-03",
            "2021-03-23", "2021-07-15", "2022-09-24", "latest")
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
           405: "Method Not Allowed", 413: "Content Too Large", 431: "Request Header Fields Too Large",
           503: "Service Unavailable", 505: "HTTP Version Not Supported"}
_REQUEST = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/(\d)\.\d")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")


class Refused(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, message: str = "", **fields: str) -> None:
        super().__init__(message or REASONS[status])
        self.status = status
        self.fields = fields


class Request:
    """The head of an HTTP/1 request (RFC 9112), read strictly; raises :class:`Refused`."""

    def __init__(self, head: bytes) -> None:
        line, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        found = _REQUEST.fullmatch(line)
        if found is None:
            raise Refused(400)
        if found[3] != "1":
            raise Refused(505)
        self.method, self.path = found[1], urllib.parse.unquote(found[2].partition("?")[0])
        self.fields: dict[str, str] = {}
        for text in rest:
            field = _FIELD.fullmatch(text)
            if field is None or (field[1].lower() in self.fields and field[1].lower() in (
                    "content-length", "transfer-encoding", TOKEN, TOKEN_SECONDS)):
                raise Refused(400)
            self.fields[field[1].lower()] = field[2]

    @property
    def body_bytes(self) -> int:
        """How much comes behind the head: nothing that anybody reads."""
        length = self.fields.get("content-length", "0")
        if "transfer-encoding" in self.fields or not re.fullmatch(r"[0-9]{1,9}", length):
            raise Refused(400)
        if int(length) > MAX_BODY_BYTES:
            raise Refused(413)
        return int(length)


class Told:
    """What one guest is told: its record, and every path of it with its text."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.id: str = record["id"]
        self.addresses: list[str] = record["addresses"]
        self.options: dict[str, Any] = record["options"]
        self.digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        leaves: dict[str, str] = record["leaves"]
        folders: dict[str, set[str]] = collections.defaultdict(set)
        for path in leaves:
            names = path.rstrip("/").split("/")
            for depth in range(len(names)):
                more = depth + 1 < len(names) or path.endswith("/")
                folders["/".join(names[:depth])].add(names[depth] + ("/" if more else ""))
        self._texts = {path: "\n".join(sorted(names)) for path, names in folders.items()}
        self._texts |= {path.rstrip("/"): text for path, text in leaves.items()}
        self._folders = folders.keys()

    def find(self, path: str) -> str | None:
        """The text at a path, a folder's with or without its slash; None when there is none."""
        version, _, below = path.removeprefix("/").partition("/")
        if path == "/":
            return "\n".join(VERSIONS)
        if version not in VERSIONS:
            return None
        if below.endswith("/"):
            below = below[:-1]
            if below not in self._folders:
                return None
        return self._texts.get(below)


class Book:
    """Whom to tell what, the key of the tokens, and how many were answered without one."""

    def __init__(self) -> None:
        self.key = b""
        self.tokenless: collections.Counter[str] = collections.Counter()
        self.trouble = ""
        self._guests: dict[str, Told] = {}
        self._at: dict[str, Told] = {}

    def take(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do what the agent says; the answer to it."""
        if "key" in order:
            self.key = bytes.fromhex(order["key"])
        for identifier in order.get("drop", ()):
            self._drop(identifier)
        for record in order.get("set", ()):
            self._drop(record["id"])
            told = Told(record)
            self._guests[told.id] = told
            self._at |= dict.fromkeys(told.addresses, told)
        answer = {"number": order["number"], "tokenless": dict(self.tokenless), "trouble": self.trouble}
        if order.get("look"):
            answer["held"] = {identifier: told.digest for identifier, told in self._guests.items()}
        self.trouble = ""
        return answer

    def _drop(self, identifier: str) -> None:
        told = self._guests.pop(identifier, None)
        for address in told.addresses if told else ():
            if self._at.get(address) is told:
                del self._at[address]

    def find(self, address: str) -> Told:
        """Who asks from this address."""
        told = self._at.get(address)
        if told is None:
            raise Refused(503, "This instance is not known here yet.")
        if told.options["http_endpoint"] != "enabled" or (
                ":" in address and told.options["http_protocol_ipv6"] != "enabled"):
            raise Refused(403, "The metadata of this instance are disabled.")
        return told

    def token(self, told: Told, seconds: int) -> str:
        """A token that is good for this guest and so long."""
        head = struct.pack(">Q", int(time.time()) + seconds) + os.urandom(8)
        return base64.urlsafe_b64encode(head + self._seal(told, head)).decode()

    def left(self, told: Told, token: str) -> int:
        """For how many seconds more the token is good; raises :class:`Refused` when it is not, or not this guest's."""
        try:
            raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        except ValueError:
            raise Refused(401) from None
        if len(raw) != 48 or not hmac.compare_digest(raw[16:], self._seal(told, raw[:16])):
            raise Refused(401)
        left: int = struct.unpack(">Q", raw[:8])[0] - int(time.time())
        if left <= 0:
            raise Refused(401)
        return left

    def _seal(self, told: Told, head: bytes) -> bytes:
        return hmac.digest(self.key, told.id.encode() + b"\0" + head, "sha256")


def answer(book: Book, address: str, asked: Request) -> tuple[str, dict[str, str], int]:
    """Text, further header fields and hop limit of the answer to a request from ``address``; raises :class:`Refused`."""
    told = book.find(address)
    if asked.method == "PUT" and asked.path == "/latest/api/token":
        if "x-forwarded-for" in asked.fields:
            # It came through a proxy, which an attacker may have talked into asking.
            raise Refused(403)
        seconds = asked.fields.get(TOKEN_SECONDS, "")
        if not re.fullmatch(r"[0-9]{1,5}", seconds) or not 1 <= int(seconds) <= MAX_TOKEN_SECONDS:
            raise Refused(400, f"{TOKEN_SECONDS} takes 1 to {MAX_TOKEN_SECONDS}.")
        hops: int = told.options["http_put_response_hop_limit"]
        return book.token(told, int(seconds)), {TOKEN_SECONDS: str(int(seconds))}, hops
    if asked.method not in ("GET", "HEAD") or asked.path == "/latest/api/token":
        raise Refused(405, Allow="PUT" if asked.path == "/latest/api/token" else "GET, HEAD")
    fields = {}
    if TOKEN in asked.fields:
        fields[TOKEN_SECONDS] = str(book.left(told, asked.fields[TOKEN]))
    elif told.options["http_tokens"] == "required":
        raise Refused(401)
    else:
        book.tokenless[told.id] += 1
    text = told.find(asked.path)
    if text is None:
        raise Refused(404)
    return text, fields, HOPS


def written(status: int, text: str, fields: dict[str, str], body: bool = True) -> bytes:
    """The answer as it goes out."""
    content = text.encode()
    head = {"Date": formatdate(usegmt=True), "Content-Type": "text/plain", "Content-Length": str(len(content)),
            "Connection": "close", **fields}
    return (f"HTTP/1.1 {status} {REASONS[status]}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in head.items())
            + "\r\n").encode() + (content if body else b"")


class Desk:
    """Serves connections: one request each, within bounds of time, size and number."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._open: collections.Counter[str] = collections.Counter()
        self._second = 0
        self._requests: collections.Counter[str] = collections.Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the first byte to the last."""
        address = str(writer.get_extra_info("peername")[0])
        if self._open[address] >= MAX_OPEN_OF_ONE or self._open.total() >= MAX_OPEN:
            writer.transport.abort()
            return
        self._open[address] += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._answer(address, reader, writer)
            # A connection that is closed with something unread is reset, and the answer may be lost with it.
            async with asyncio.timeout(FAREWELL_SECONDS):
                for _ in range(16):
                    if not await reader.read(MAX_BODY_BYTES):
                        break
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        except Exception as failure:
            self._book.trouble = f"{type(failure).__name__}: {failure}"[:300]
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]
            writer.transport.abort()

    async def _answer(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hops, body = HOPS, True
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise Refused(431) from None
            self._spend(address)
            asked = Request(head)
            body = asked.method != "HEAD"
            await reader.readexactly(asked.body_bytes)
            text, fields, hops = answer(self._book, address, asked)
            out = written(200, text, fields, body)
        except Refused as refused:
            out = written(refused.status, f"{refused}\n", refused.fields, body)
        if hops != HOPS:
            six = ":" in address
            writer.get_extra_info("socket").setsockopt(
                socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, hops)
        writer.write(out)
        await writer.drain()
        writer.write_eof()

    def _spend(self, address: str) -> None:
        now = int(time.monotonic())
        if now != self._second:
            self._second = now
            self._requests.clear()
        self._requests[address] += 1
        if self._requests[address] > MAX_REQUESTS_A_SECOND:
            raise Refused(503, "Too many requests.")


async def obey(book: Book, control: socket.socket) -> None:
    """Take orders until the agent is gone."""
    reader, writer = await asyncio.open_connection(sock=control, limit=1 << 30)
    while line := await reader.readline():
        writer.write(json.dumps(book.take(json.loads(line))).encode() + b"\n")
        await writer.drain()


async def serve(control: socket.socket, listeners: list[socket.socket]) -> None:
    """Answer guests for as long as there is an agent."""
    book = Book()
    desk = Desk(book)
    for listener in listeners:
        await asyncio.start_server(desk.serve, sock=listener, limit=MAX_HEAD_BYTES)
    await obey(book, control)


def main() -> None:
    descriptors = [int(word) for word in sys.argv[2:]]
    control, listeners = socket.socket(fileno=0), [socket.socket(fileno=one) for one in descriptors]
    for one in (control, *listeners):
        one.setblocking(False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN + 64, MAX_OPEN + 64))
    # It writes no file and makes no process.
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))
    with contextlib.suppress(ConnectionError):
        asyncio.run(serve(control, listeners))
    # Whatever connections there are: nobody is told anything any more.
    os._exit(0)


if __name__ == "__main__":
    main()
