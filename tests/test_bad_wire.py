"""Bytes that are no good request, sent to the real controller process over a socket of their own.

Whatever comes, the answer is Lightsail's error envelope with a useful message (or the connection just ends), the
controller's memory stays where it was, and the next good request is answered.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from clouds import Cloud
from skysail.api.wire import LINGER_SECONDS, MAX_CONNECTIONS, REQUEST_SECONDS

TARGET = "Lightsail_20161128."
MEMORY_MIB = 250  # of the controller, after everything below


class Wire:
    """The controller's port, and good requests as bytes."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        held = json.loads((cloud.folder / "credentials.json").read_text())
        self.credentials = Credentials(held["access_key_id"], held["secret_access_key"])
        self.lorises = [Loris(self, first) for first in (
            b"POST / HTTP/1.1\r\nX-Slow: ", b"", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")]

    def request(self, action: str = "GetRegions", body: bytes = b"{}", *, sign: bool = True, service: str = "lightsail",
                secret: str = "", key: str = "", skew_seconds: int = 0, **headers: str) -> AWSRequest:
        """A call, signed as asked."""
        request = AWSRequest("POST", f"http://127.0.0.1:{self.cloud.port}/", data=body, headers={
            "Host": f"127.0.0.1:{self.cloud.port}", "X-Amz-Target": TARGET + action,
            **{name.replace("_", "-"): value for name, value in headers.items()}})
        if sign:
            signer = SigV4Auth(Credentials(key or self.credentials.access_key, secret or self.credentials.secret_key),
                               service, "us-east-1")
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + skew_seconds))
            request.context["timestamp"] = stamp
            request.headers["X-Amz-Date"] = stamp
            text = signer.string_to_sign(request, signer.canonical_request(request))
            signer._inject_signature_to_request(request, signer.signature(text, request))
        return request

    def good(self, action: str = "GetRegions", body: bytes = b"{}", *, line: str = "POST / HTTP/1.1", **more: Any) -> bytes:
        return self.raw(self.request(action, body, **more), body, line=line)

    @staticmethod
    def raw(request: AWSRequest, body: bytes, *, line: str = "POST / HTTP/1.1", length: int | None = None) -> bytes:
        """The request's bytes, with a content-length that need not be true."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        return f"{line}\r\n{headers}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body

    def connect(self, seconds: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.cloud.port), timeout=seconds)

    def tell(self, data: bytes, *, half_close: bool = False) -> tuple[int, dict[str, Any]]:
        """Send ``data`` and read one answer."""
        with self.connect() as wire:
            wire.sendall(data)
            if half_close:
                wire.shutdown(socket.SHUT_WR)
            return read(wire)

    def well(self) -> None:
        """The controller still answers, and is not fat."""
        assert self.tell(self.good())[0] == 200
        status = Path(f"/proc/{self.cloud.processes['controller'].pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        assert resident < MEMORY_MIB * 1024, f"{resident} KiB"
        assert "Traceback" not in (self.cloud.folder / "controller.log").read_text()


class Loris(threading.Thread):
    """Sends a byte now and then and notes when the controller has had enough."""

    def __init__(self, wire: Wire, first: bytes) -> None:
        super().__init__(daemon=True)
        self.wire = wire.connect(0.5)
        self.wire.sendall(first)
        self.silent = not first
        self.said = b""
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        with self.wire:
            while time.monotonic() - began < REQUEST_SECONDS * 3:
                try:
                    if not self.silent:
                        self.wire.sendall(b"x")
                    found = self.wire.recv(4096)
                except TimeoutError:
                    continue
                except OSError:
                    break
                self.said += found
                if not found:
                    break
        self.seconds = time.monotonic() - began


def read(wire: socket.socket) -> tuple[int, dict[str, Any]]:
    """One answer from the wire: its status, its JSON. (0, {}) when the connection ended without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        found = wire.recv(65536)
        if not found:
            assert data == b"", data
            return 0, {}
        data += found
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    while len(body) < int(headers["content-length"]):
        found = wire.recv(65536)
        assert found, "the answer is cut"
        body += found
    assert headers["content-type"] == "application/x-amz-json-1.1" and headers["x-amzn-requestid"] and headers["date"]
    # Anything behind this answer belongs to the next one.
    assert len(body) == int(headers["content-length"]), body
    content = json.loads(body)
    status = int(lines[0].split()[1])
    if status != 200:
        assert 400 <= status < 500, content
        assert content["__type"] == content["code"] and len(content["message"]) > 10, content
        assert "Traceback" not in body.decode()
    return status, content


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    cloud = Cloud(folder)
    cloud.start("controller")
    try:
        yield Wire(cloud)
    finally:
        cloud.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def still_well(wire: Wire) -> Iterator[None]:
    yield
    wire.well()


def refused(answer: tuple[int, dict[str, Any]], code: str, words: str = "") -> None:
    assert answer[0] >= 400 and answer[1]["code"] == code and words in answer[1]["message"] + answer[1]["tip"], answer


@pytest.mark.parametrize("body", [b"{", b"{'a': 1}", b"\xff\xfe", b"nul", b'{"a": 1}}', b"[" * 100_000, b'{"a":"\x01"}'])
def test_malformed_json(wire: Wire, body: bytes) -> None:
    refused(wire.tell(wire.good(body=body)), "SerializationException", "JSON")


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true", b"1e999"])
def test_json_that_is_no_object(wire: Wire, body: bytes) -> None:
    refused(wire.tell(wire.good(body=body)), "SerializationException", "JSON")


@pytest.mark.parametrize("target", ["MakeCoffee", "", "GetRegions ", "x" * 5000])
def test_an_unknown_action(wire: Wire, target: str) -> None:
    refused(wire.tell(wire.good(target)), "UnknownOperationException", "not known")


@pytest.mark.parametrize("target", [None, "", "garbage", "DynamoDB_20120810.ListTables", "\x7f\xe9"])
def test_no_target_or_garbage(wire: Wire, target: str | None) -> None:
    request = wire.request(sign=False)
    del request.headers["X-Amz-Target"]
    if target is not None:
        request.headers["X-Amz-Target"] = target
    refused(wire.tell(wire.raw(request, b"{}")),
            "SerializationException" if target == "\x7f\xe9" else "UnknownOperationException")


@pytest.mark.parametrize(("change", "code", "words"), [
    ({"sign": False}, "MissingAuthenticationTokenException", "not signed"),
    ({"secret": "wrong"}, "InvalidSignatureException", "does not match"),
    ({"key": "AKIANOBODY"}, "UnrecognizedClientException", "token"),
    ({"key": "x" * 3000}, "UnrecognizedClientException", "token"),
    ({"service": "ec2"}, "InvalidSignatureException", "'lightsail'"),
    ({"skew_seconds": -86_400}, "InvalidSignatureException", "expired"),
    ({"skew_seconds": 86_400}, "InvalidSignatureException", "clock"),
    ({"sign": False, "Authorization": "Basic Zm9vOmJhcg=="}, "IncompleteSignatureException", "AWS4-HMAC-SHA256"),
    ({"sign": False, "Authorization": "AWS4-HMAC-SHA256 " + "a," * 10_000}, "IncompleteSignatureException", "AWS4"),
])
def test_signatures_that_do_not_hold(wire: Wire, change: dict[str, Any], code: str, words: str) -> None:
    refused(wire.tell(wire.good(**change)), code, words)


def test_a_tampered_body(wire: Wire) -> None:
    request = wire.request(body=b'{"includeAvailabilityZones": true}')
    refused(wire.tell(wire.raw(request, b'{"includeAvailabilityZones":false}')), "InvalidSignatureException")


@pytest.mark.parametrize("stamp", ["", "yesterday", "20240101T000000", "99999999T999999Z", "20240101T000000Z" * 9])
def test_a_date_that_is_none(wire: Wire, stamp: str) -> None:
    request = wire.request()
    request.headers.replace_header("X-Amz-Date", stamp)
    refused(wire.tell(wire.raw(request, b"{}")), "IncompleteSignatureException", "X-Amz-Date")


def test_presigned_in_the_query(wire: Wire) -> None:
    request = wire.request(sign=False)
    SigV4QueryAuth(wire.credentials, "lightsail", "us-east-1").add_auth(request)
    line = f"POST /?{request.url.partition('?')[2]} HTTP/1.1"
    refused(wire.tell(wire.raw(request, b"{}", line=line)), "IncompleteSignatureException", "Authorization header")


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "PUT / HTTP/1.1", "POST /x HTTP/1.1", "DELETE /healthz HTTP/1.1",
                                  "GET /%00%ff?a=b HTTP/1.1", "OPTIONS * HTTP/1.1", "GET //../../etc/passwd HTTP/1.1"])
def test_elsewhere(wire: Wire, line: str) -> None:
    refused(wire.tell(f"{line}\r\nHost: h\r\n\r\n".encode()), "UnknownOperationException", "POST /")


@pytest.mark.parametrize("data", [
    b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"POST / HTTP/9.9\r\n\r\n", b"\x00" * 4096,
    b"POST /\xff HTTP/1.1\r\nHost: h\r\n\r\n", b"CONNECT h:443 HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nno colon\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
])
def test_what_is_no_http(wire: Wire, data: bytes) -> None:
    status, content = wire.tell(data)
    assert status >= 400 and content["code"] in ("SerializationException", "RequestEntityTooLargeException"), content


def test_a_header_of_a_megabyte(wire: Wire) -> None:
    refused(wire.tell(wire.good(X_Big="x" * 1_000_000)), "RequestEntityTooLargeException", "65536")
    many = "".join(f"X-{number}: y\r\n" for number in range(100_000))
    refused(wire.tell(f"POST / HTTP/1.1\r\n{many}\r\n".encode()), "RequestEntityTooLargeException", "65536")
    refused(wire.tell(b"POST /" + b"x" * 1_000_000), "RequestEntityTooLargeException", "65536")


@pytest.mark.parametrize("line", [b"x" * 65536, b"X: y\r\n" * 10_000, b"\r\n" * 32768])
def test_a_head_without_end(wire: Wire, line: bytes) -> None:
    with wire.connect(LINGER_SECONDS + 10) as endless:
        began, sent = time.monotonic(), 0
        endless.sendall(b"POST / HTTP/1.1\r\nX: " if line[0] != 13 else b"")
        with pytest.raises(OSError):  # we read on for a while, then the door is shut
            while time.monotonic() - began < REQUEST_SECONDS:
                endless.sendall(line)
                sent += len(line)
                time.sleep(0.002)
        assert sent > 65536
        assert time.monotonic() - began < LINGER_SECONDS + 5


def test_a_body_of_100_megabytes_is_refused_before_it_came(wire: Wire) -> None:
    request = wire.request()
    head = wire.raw(request, b"", length=100_000_000)
    began = time.monotonic()
    refused(wire.tell(head), "RequestEntityTooLargeException", "1048576")
    assert time.monotonic() - began < 2
    refused(wire.tell(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")), "RequestEntityTooLargeException")
    with wire.connect(60) as whole:  # and a client that sends all of it before it reads gets the answer too
        whole.sendall(head)
        for _ in range(100):
            whole.sendall(b" " * 1_000_000)
        refused(read(whole), "RequestEntityTooLargeException", "1048576")


def test_chunked_bodies(wire: Wire) -> None:
    body = b'{"includeAvailabilityZones": true}'
    head = wire.raw(wire.request(body=body), b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:5], body[5:6], body[6:]))
    status, content = wire.tell(head + pieces + b"0\r\n\r\n")
    assert status == 200 and content["regions"][0]["availabilityZones"]
    refused(wire.tell(head + pieces[:-2] + b"!\r\n0\r\n\r\n"), "SerializationException")
    with wire.connect(60) as endless:
        endless.sendall(head)
        for _ in range(100):
            endless.sendall(b"%x\r\n%s\r\n" % (1_000_000, b" " * 1_000_000))
        refused(read(endless), "RequestEntityTooLargeException", "1048576")


def test_expect_100_continue(wire: Wire) -> None:
    body = b"{}"
    with wire.connect() as patient:
        head = wire.raw(wire.request(), b"", length=len(body))
        patient.sendall(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert patient.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        patient.sendall(body)
        assert read(patient)[0] == 200


def test_a_half_closed_connection_gets_its_answer(wire: Wire) -> None:
    assert wire.tell(wire.good(), half_close=True)[0] == 200
    assert wire.tell(b"", half_close=True) == (0, {})


@pytest.mark.parametrize("cut", [10, 60, -1])
def test_a_request_that_ends_early(wire: Wire, cut: int) -> None:
    refused(wire.tell(wire.good(body=b'{"a": 1}')[:cut], half_close=True), "SerializationException", "before it was whole")


def test_clients_that_leave(wire: Wire) -> None:
    for cut in (0, 1, 10, 60, -1, 10**6):
        for linger in (False, True):
            with wire.connect() as leaving:
                if linger:  # SO_LINGER 0: a reset instead of a farewell
                    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                leaving.sendall(wire.good()[:cut])


def test_http_1_0(wire: Wire) -> None:
    with wire.connect() as old:
        old.sendall(wire.good(line="POST / HTTP/1.0"))
        assert read(old)[0] == 200
        assert old.recv(1) == b""
    refused(wire.tell(b"GET / HTTP/1.0\r\n\r\n"), "UnknownOperationException")


def exactly(wire: socket.socket, number: int) -> list[tuple[int, str]]:
    """The statuses and error codes of ``number`` answers that come one behind the other."""
    data, found = b"", []
    while len(found) < number:
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0) if rest or head else 0
        if head and length and len(rest) >= length:
            found.append((int(head.split()[1]), json.loads(rest[:length]).get("code", "")))
            data = rest[length:]
            continue
        more = wire.recv(65536)
        assert more, (found, data)
        data += more
    assert data == b""
    return found


def test_pipelining_answers_in_order(wire: Wire) -> None:
    with wire.connect() as pipe:
        pipe.sendall(wire.good() + wire.good("MakeCoffee") + wire.good("GetBundles") * 20)
        assert exactly(pipe, 22) == [(200, ""), (400, "UnknownOperationException"), *[(200, "")] * 20]
        pipe.sendall(wire.good() * 3 + b"no HTTP at all\r\n\r\n" + wire.good())
        assert exactly(pipe, 4) == [(200, "")] * 3 + [(400, "SerializationException")]
        assert pipe.recv(1) == b""
    with wire.connect() as pipe:
        pipe.sendall(wire.good() * 2 + wire.raw(wire.request(), b"", length=10**9))
        assert exactly(pipe, 3) == [(200, "")] * 2 + [(413, "RequestEntityTooLargeException")]
    with wire.connect() as pipe:
        pipe.sendall(wire.good() * 3)
        pipe.shutdown(socket.SHUT_WR)
        assert exactly(pipe, 3) == [(200, "")] * 3


def test_an_offer_to_upgrade_is_not_taken(wire: Wire) -> None:
    for offer in (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
                  wire.good(Connection="Upgrade, HTTP2-Settings", Upgrade="h2c")):
        refused(wire.tell(offer), "SerializationException", "not upgraded")


def test_idle_connections_beyond_the_limit_lock_nobody_out_for_long(wire: Wire) -> None:
    idle = [wire.connect() for _ in range(MAX_CONNECTIONS)]
    try:
        with wire.connect() as one_more:
            assert one_more.recv(12) == b"HTTP/1.1 503"
    finally:
        for each in idle:
            each.close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with wire.connect() as again:
            again.sendall(wire.good())
            if again.recv(12) == b"HTTP/1.1 200":
                return
    raise AssertionError("no request is answered after the idle ones left")


def test_random_bytes(wire: Wire) -> None:
    for length in (1, 100, 5000, 200_000):
        with wire.connect(LINGER_SECONDS + 5) as noise:
            noise.sendall(os.urandom(length))
            noise.shutdown(socket.SHUT_WR)
            read(noise)


def test_a_slow_request_ends(wire: Wire) -> None:
    """Begun with the first test of this file, so that nobody waits for it."""
    head, silent, body = wire.lorises
    for loris in wire.lorises:
        loris.join(REQUEST_SECONDS * 2)
        assert not loris.is_alive() and loris.seconds < REQUEST_SECONDS + LINGER_SECONDS + 5
    for loris in (head, body):
        assert b" 408 " in loris.said and b"RequestTimeoutException" in loris.said, loris.said
    assert silent.said == b""
