"""One HTTP connection: uvicorn's, held to limits before anything of a request is kept.

uvicorn's httptools protocol bounds neither the head of a request nor the time it takes to arrive. Here a request has
:data:`MAX_HEAD_BYTES`, :data:`MAX_BODY_BYTES` and :data:`REQUEST_SECONDS`, and whoever breaks that, or speaks no HTTP, is
answered with Lightsail's error envelope. After a refusal we read on for :data:`LINGER_SECONDS` and throw away what comes:
to close with unread bytes would reset the connection and take the answer with it.
"""

from __future__ import annotations

import asyncio
import uuid
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from skysail.api import protocol
from skysail.kit.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 1024 * 1024
MAX_CONNECTIONS = 512
REQUEST_SECONDS = 20.0
LINGER_SECONDS = 5.0
FLUSH_SECONDS = 60.0


def too_large(what: str, limit: int, status: int) -> ApiError:
    """A request that is larger than what is read of one."""
    return ApiError("RequestEntityTooLargeException", f"The {what} is larger than {limit} bytes.", status=status)


class Wire(HttpToolsProtocol):
    """A client's connection; a request is *arriving* from its first byte to the last one of its body."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._head_bytes = self._body_bytes = 0
        self._verdict: ApiError | None = None  # why the parser was stopped
        self._pending: ApiError | None = None  # a refusal that waits for answers to earlier requests
        self._refused = self._ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arrive()
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(ApiError("ServiceUnavailableException", "Too many connections are open.", "Try again.", 503))

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._refused or self._pending:
            return
        self._arrive()
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if not self._in_body and self._head_bytes > MAX_HEAD_BYTES:
                self._verdict = too_large("head", MAX_HEAD_BYTES, 431)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._verdict = self._verdict or ApiError("SerializationException", "This is not an HTTP request.")
        if self._verdict is not None:
            self._refuse(self._verdict)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that only closed its half still gets its answers."""
        if self._refused:
            return None
        self._ended = True
        if self._timer is not None and (self._head_bytes or self._in_body):
            self._refuse(ApiError("SerializationException", "The request ended before it was whole."))
        elif self.cycle is None or self.cycle.response_complete:
            return None
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_body = False
        self._arrive()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if name.lower() == b"content-length" and value.isdigit() and int(value[:20]) > MAX_BODY_BYTES:
            self._verdict = too_large("body", MAX_BODY_BYTES, 413)

    def on_headers_complete(self) -> None:
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._verdict = too_large("head", MAX_HEAD_BYTES, 431)
        if self.parser.should_upgrade():  # the parser would take its body for another protocol
            self._verdict = ApiError("SerializationException", "Connections are not upgraded here.",
                                     "Turn HTTP/2 and WebSocket off in your client: this is HTTP/1.1.")
        if self._verdict is not None:
            raise self._verdict  # ends feed_data, before the request is anything to us
        self._in_body, self._head_bytes, self._body_bytes = True, 0, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._verdict = too_large("body", MAX_BODY_BYTES, 413)
            raise self._verdict
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body, self._head_bytes = False, 0
        self._arrived()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unanswered() or self.transport.is_closing():
            return
        if self._pending is not None:
            self._unset_keepalive_if_required()
            self._refuse(self._pending)
        elif self._ended:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for long enough. Who has not even read the last answer by then is waited for no longer than a minute."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(FLUSH_SECONDS, self.transport.abort)

    def _arrive(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self._late)

    def _arrived(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._refused or not (self._head_bytes or self._in_body):
            self.transport.abort()
        else:
            self._refuse(ApiError("RequestTimeoutException", f"The request took more than {REQUEST_SECONDS:.0f} s to "
                                  "arrive.", status=408))

    def _unanswered(self) -> bool:
        """Whether an earlier request, one that arrived whole, has no answer yet."""
        if self._in_body:
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, failure: ApiError) -> None:
        if self.transport.is_closing():
            return
        if self._unanswered() and self._pending is None:
            self._pending = failure
            if self.pipeline and self._in_body:
                self.pipeline.popleft()  # the request that is refused, latest in the queue
                self._in_body = False
            self._arrived()
            return
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its reader wakes up and gives up
            self.cycle.message_event.set()
        body = protocol.error(failure)
        headers = [*self.server_state.default_headers, (b"content-type", b"application/x-amz-json-1.1"),
                   (b"x-amzn-requestid", str(uuid.uuid4()).encode()), (b"content-length", b"%d" % len(body)),
                   (b"connection", b"close")]
        self.transport.write(b"HTTP/1.1 %d %s\r\n" % (failure.status, HTTPStatus(failure.status).phrase.encode())
                             + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + body)
        self._arrived()
        if self._ended:
            self.transport.close()
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():  # TLS knows no half-closed connection
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._late)
