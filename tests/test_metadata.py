"""What instances are told of themselves: the tree, the real process over a real socket, and who it is hostile to.

The process answers on loopback here: a guest is an address of 127.0.0.0/8. With real packets: test_packets_metadata.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clouds import eventually
from skysail.contract.document import Guest, Metadata, MetadataOptions, Personality, Port, Volume
from skysail.kit.errors import SkysailError
from skysail.metadata import Record, process, tree
from skysail.metadata.process import Answerer, holders, kept_key
from skysail.metadata.responder import MAX_OPEN_OF_ONE, VERSIONS, Refused, Request, Told

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user id needs root")
UID = 3_900_000
TTL, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


def guest(number: int = 10, user_data: str = "", **options: Any) -> Guest:
    return Guest(
        id=f"g-{number}", instance="web_1", role="run", starts=1, reboots=0, vcpus=2, memory_mib=512,
        volume=Volume(id=f"g-{number}", image="ab" * 32, size_gib=20),
        port=Port(id=f"g-{number}", mac=f"52:54:ac:1a:00:{number:02x}", network=1, private_ipv4=f"127.0.0.{number}",
                  public_ipv4=f"100.115.93.{number}", public_ipv6=f"fd53:6b79:7361::{number:x}"),
        personality=Personality(hostname="web-1", user="admin", authorized_keys=("ssh-ed25519 AAAA me",),
                                user_data=user_data),
        metadata=Metadata(instance_id=f"i{number}", account="123456789012", region="us-east-1", zone="a", bundle="nano_3_0",
                          key_name="laptop", launched_at=1_700_000_000.0, options=MetadataOptions(**options)))


def record(number: int = 10, **more: Any) -> Record:
    made = tree.record(guest(number, **more))
    assert made is not None
    return made


def find(path: str, **more: Any) -> str | None:
    return Told(msgspec.to_builtins(record(**more))).find(path)


# --- the tree

CARD = "/latest/meta-data/network/interfaces/macs/52:54:ac:1a:00:0a"
LEAVES = {
    "/latest/meta-data/local-ipv4": "127.0.0.10", "/latest/meta-data/public-ipv4": "100.115.93.10",
    "/latest/meta-data/mac": "52:54:ac:1a:00:0a", "/latest/meta-data/local-hostname": "web-1",
    "/latest/meta-data/placement/availability-zone": "us-east-1a", "/latest/meta-data/placement/region": "us-east-1",
    "/latest/meta-data/instance-type": "nano_3_0", "/latest/meta-data/ami-id": "ami-abababababababab" + "a",
    "/latest/meta-data/public-keys/0/openssh-key": "ssh-ed25519 AAAA me\n", "/latest/meta-data/public-keys/": "0=laptop",
    "/latest/meta-data/public-keys/0/": "openssh-key", f"{CARD}/local-ipv4s": "127.0.0.10", f"{CARD}/device-number": "0",
    f"{CARD}/ipv4-associations/100.115.93.10": "127.0.0.10", f"{CARD}/ipv6s": "fd53:6b79:7361::a",
    "/2009-04-04/meta-data/local-ipv4": "127.0.0.10", "/latest/": "dynamic\nmeta-data", "/latest": "dynamic\nmeta-data",
    "/latest/meta-data/placement": "availability-zone\nregion", "/latest/dynamic/": "instance-identity/",
    "/latest/dynamic/instance-identity/": "document", "/": "\n".join(VERSIONS),
}


@pytest.mark.parametrize("path", LEAVES)
def test_a_path_tells(path: str) -> None:
    assert find(path) == LEAVES[path]


def test_a_listing_shows_folders_by_their_slash() -> None:
    shown = (find("/latest/meta-data/") or "").splitlines()
    assert shown == (find("/latest/meta-data") or "").splitlines() == sorted(shown)
    assert {"ami-id", "placement/", "public-keys/", "network/", "services/"} <= set(shown)
    for name in shown:
        assert find(f"/latest/meta-data/{name}") is not None, name


@pytest.mark.parametrize("path", [
    "/1999-01-01/meta-data/", "/latest/meta-data/ami-id/", "/latest/meta-data/none", "/latest/meta-data//ami-id", "//latest",
    "/latest/user-data", "/latest/meta-data/iam/", "/latest/meta-data/placement/../ami-id", "/latest/dynamic/none", "/x"])
def test_what_is_not_there_is_not_found(path: str) -> None:
    assert find(path) is None


def test_user_data_come_as_the_owner_gave_them() -> None:
    text = "echo 'grüße'\n\n"
    assert find("/latest/user-data", user_data=text) == text
    assert find("/latest/", user_data=text) == "dynamic\nmeta-data\nuser-data"


def test_the_identity_document() -> None:
    told = json.loads(find("/latest/dynamic/instance-identity/document") or "")
    assert told["accountId"] == "123456789012" and told["pendingTime"] == "2023-11-14T22:13:20Z"
    assert told["instanceId"] == find("/latest/meta-data/instance-id") and len(told["instanceId"]) == 19
    assert told["region"] == "us-east-1" and told["privateIp"] == "127.0.0.10"


def test_without_public_addresses_none_is_told() -> None:
    alone = msgspec.structs.replace(guest(), port=msgspec.structs.replace(guest().port, public_ipv4="", public_ipv6=""))
    made = tree.record(alone)
    assert made is not None and made.addresses == ("127.0.0.10",)
    assert not [path for path in made.leaves if "public-ip" in path or "ipv6" in path or "associations" in path]
    assert tree.record(msgspec.structs.replace(guest(), metadata=None)) is None
    assert tree.record(msgspec.structs.replace(guest(), role="gone")) is None


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.builds(
    lambda method, path, fields: f"{method} {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode(),
    st.sampled_from(["GET", "PUT", "get", ""]), st.text(max_size=30), st.text(max_size=60)))
def test_no_head_is_too_strange(head: bytes) -> None:
    """A request is read or refused, and nothing else happens."""
    with contextlib.suppress(Refused):
        asked = Request(head)
        assert asked.body_bytes >= 0
        assert Told(msgspec.to_builtins(record())).find(asked.path) is None or asked.path.startswith("/")


# --- the process

class Desk:
    """The engine over one listener on loopback."""

    def __init__(self, folder: Path) -> None:
        self.listener = self.socket()
        self.loop = asyncio.Runner()
        self.mark = f"skysail-metadata-test:{folder}"
        self.key_file = folder / "metadata.key"
        self.engine = self.another()

    def socket(self) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", 0))
        made.listen()
        return made

    def another(self) -> Answerer:
        return Answerer(self.listen, mark=self.mark, uid=UID, key=lambda: kept_key(self.key_file))

    async def listen(self) -> tuple[socket.socket, ...]:
        return (self.listener,)

    def apply(self, *records: Record) -> None:
        self.loop.run(self.engine.apply(records))

    def kill(self) -> None:
        """kill -9, and it is dead."""
        (pid,) = self.pids()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.pids())

    def pids(self) -> list[int]:
        return list(holders(self.mark))

    def tokenless(self) -> dict[str, int]:
        return self.loop.run(self.engine.tokenless()).counts

    def connect(self, number: int = 10) -> socket.socket:
        made = socket.socket()
        made.settimeout(30)
        made.bind((f"127.0.0.{number}", 0))
        made.connect(self.listener.getsockname())
        return made

    def says(self, raw: bytes, number: int = 10) -> tuple[int, dict[str, str], str]:
        """Status, fields and text of the answer to these bytes."""
        with self.connect(number) as one:
            with contextlib.suppress(OSError):
                one.sendall(raw)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while more := one.recv(65536):
                    answer += more
        if not answer:
            return 0, {}, ""
        head, _, text = answer.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        return int(line.split()[1]), {name.lower(): value for name, value in (
            field.split(": ", 1) for field in fields)}, text.decode()

    def ask(self, path: str, number: int = 10, method: str = "GET", **fields: str) -> tuple[int, dict[str, str], str]:
        head = f"{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        return self.says(head.encode(), number)

    def get(self, path: str = "/latest/meta-data/local-ipv4", number: int = 10, token: str = "") -> tuple[int, str]:
        status, _, text = self.ask(path, number, **({TOKEN: token} if token else {}))
        return status, text

    def token(self, seconds: object = 60, number: int = 10) -> str:
        status, fields, text = self.ask("/latest/api/token", number, "PUT", **{TTL: str(seconds)})
        assert status == 200 and fields[TTL.lower()] == str(seconds), text
        return text


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    try:
        yield made
    finally:
        made.loop.run(made.engine.close())
        made.listener.close()
        made.loop.close()


@pytest.mark.real
@needs_root
def test_each_is_told_of_itself_alone(desk: Desk) -> None:
    desk.apply(record(10), record(11))
    for number in (10, 11):
        assert desk.get(number=number) == (200, f"127.0.0.{number}")
    assert desk.get(number=12)[0] == 503, "it is not known yet, or not any more"
    desk.apply(record(11))
    assert desk.get(number=10)[0] == 503 and desk.get(number=11)[0] == 200
    moved = msgspec.structs.replace(record(11), addresses=("127.0.0.10",))
    desk.apply(moved)
    assert desk.get(number=10) == (200, "127.0.0.11") and desk.get(number=11)[0] == 503
    assert desk.get("/latest/none")[0] == 404


@pytest.mark.real
@needs_root
def test_tokens(desk: Desk) -> None:
    desk.apply(record(10), record(11), record(12, http_tokens="required"), record(13, http_endpoint="disabled"))
    token = desk.token()
    status, fields, text = desk.ask("/latest/meta-data/local-ipv4", **{TOKEN: token})
    assert (status, text) == (200, "127.0.0.10") and 50 <= int(fields[TTL.lower()]) <= 60
    assert desk.get(number=11, token=token) == (401, "Unauthorized\n"), "another instance's token"
    assert desk.get(token=token[:-5] + "AAAA=")[0] == 401
    for wrong in ("x", "é", "A" * 64, base64.urlsafe_b64encode(bytes(48)).decode(), token + token):
        assert desk.get(token=wrong)[0] in (400, 401), wrong
    assert desk.get(number=12)[0] == 401 and desk.get(number=12, token=desk.token(number=12))[0] == 200
    assert desk.get(number=13)[0] == 403 and desk.ask("/latest/api/token", 13, "PUT", **{TTL: "60"})[0] == 403
    for seconds in ("0", "21601", "-1", "", "1.5", "ten", "9" * 40):
        assert desk.ask("/latest/api/token", method="PUT", **{TTL: seconds})[0] == 400, seconds
    assert desk.token(21600)
    assert desk.ask("/latest/api/token", method="PUT")[0] == 400
    assert desk.ask("/latest/api/token", method="PUT", **{TTL: "60", "X-Forwarded-For": "192.0.2.1"})[0] == 403
    assert desk.ask("/latest/api/token")[0] == 405 and desk.ask("/latest/meta-data/", method="PUT")[0] == 405
    assert desk.ask("/latest/meta-data/", method="POST")[0] == 405
    short = desk.token(1)
    eventually(lambda: desk.get(token=short)[0] == 401, 10)
    assert desk.tokenless() == {}, "refused ones are not counted, nor those with a token"


@pytest.mark.real
@needs_root
def test_requests_without_a_token_are_counted(desk: Desk) -> None:
    desk.apply(record(10), record(11))
    for _ in range(3):
        desk.get()
    desk.get(number=11)
    assert desk.tokenless() == {"g-10": 3, "g-11": 1}
    desk.kill()
    desk.apply(record(10), record(11))
    desk.get()
    assert desk.tokenless() == {"g-10": 4, "g-11": 1}


@pytest.mark.real
@needs_root
def test_a_head_and_a_small_body_are_taken(desk: Desk) -> None:
    desk.apply(record(10))
    status, fields, text = desk.ask("/latest/meta-data/local-ipv4", method="HEAD")
    assert (status, fields["content-length"], text) == (200, "10", "")
    assert desk.says(b"GET /latest/meta-data/local-ipv4?x HTTP/1.0\r\n\r\n")[2] == "127.0.0.10"
    assert desk.says(b"PUT /latest/api/token HTTP/1.1\r\nContent-Length: 2\r\n" + TTL.encode() + b": 5\r\n\r\nhi")[0] == 200


HOSTILE = {
    "no head": b"\r\n\r\n", "no HTTP": b"hello\r\n\r\n", "HTTP/2": b"PRI * HTTP/2.0\r\n\r\n",
    "too long": b"GET /" + b"x" * 10000, "many fields": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000 + b"\r\n",
    "folded": b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n",
    "two lengths": b"GET / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n",
    "chunked": b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "large body": b"GET / HTTP/1.1\r\nContent-Length: 99999\r\n\r\n",
    "length": b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "bare space": b"GET  / HTTP/1.1\r\n\r\n", "zero": b"GET /\x00 HTTP/1.1\r\n\r\n",
    "absolute": b"GET http://x/ HTTP/1.1\r\n\r\n",
    "two tokens": b"GET /latest/ HTTP/1.1\r\n" + f"{TOKEN}: a\r\n{TOKEN}: b\r\n\r\n".encode(),
}


@pytest.mark.real
@needs_root
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(desk: Desk, name: str) -> None:
    desk.apply(record(10))
    assert desk.says(HOSTILE[name])[0] in (0, 400, 405, 413, 431, 505)
    assert desk.get() == (200, "127.0.0.10"), "and the next one is served"


@pytest.mark.real
@needs_root
def test_who_says_nothing_holds_up_nobody(desk: Desk) -> None:
    """One guest opens as many connections as it can and dawdles over each; another one is served, and it too in the end."""
    desk.apply(record(10), record(11))
    with contextlib.ExitStack() as held:
        dawdlers = [held.enter_context(desk.connect()) for _ in range(MAX_OPEN_OF_ONE * 3)]
        for number, one in enumerate(dawdlers):
            with contextlib.suppress(OSError):
                one.sendall(b"GET / HTTP/1.1\r\na: " + b"x" * number)
        assert desk.get(number=11) == (200, "127.0.0.11")
        assert desk.get()[0] == 0, "it has enough"
        for one in dawdlers:
            with contextlib.suppress(ConnectionError):
                assert one.recv(100) == b"", "its time was up"
    assert eventually(lambda: desk.get()[0] == 200)


@pytest.mark.real
@needs_root
def test_a_flood_is_slowed_for_its_sender_alone(desk: Desk) -> None:
    desk.apply(record(10), record(11))
    end, seen = time.monotonic() + 30, set()
    while 503 not in seen and time.monotonic() < end:
        seen.add(desk.get()[0])
    assert seen <= {200, 503} and desk.get(number=11)[0] == 200
    if 503 not in seen:
        pytest.skip("this machine is too slow for a flood")
    assert eventually(lambda: desk.get()[0] == 200)


@pytest.mark.real
@needs_root
def test_the_process_has_nothing_but_its_sockets(desk: Desk) -> None:
    desk.apply(record(10))
    (pid,) = desk.pids()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(UID)} and not status["Groups"].strip()
    assert all(int(status[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"))
    assert status["NoNewPrivs"].strip() == "1"
    assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    held = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [name for name in held if not name.startswith(("socket:", "anon_inode:", "/dev/null", "pipe:"))
                and not name.endswith("responder.py") and name not in own_output()], held
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max file size             0 " in limits and "Max processes             0 " in limits


def own_output() -> set[str]:
    """Where our own standard error goes, and its with it."""
    return {str(Path("/proc/self/fd/2").readlink())}


@pytest.mark.real
@needs_root
def test_a_process_that_died_is_followed_by_another(desk: Desk) -> None:
    desk.apply(record(10))
    token, (pid,) = desk.token(), desk.pids()
    desk.kill()
    desk.apply(record(10), record(11))
    assert desk.pids() != [pid] and desk.get(token=token) == (200, "127.0.0.10"), "tokens stay good"
    assert desk.loop.run(desk.engine.observe()) == {one.id: tree.digest(one) for one in (record(10), record(11))}


@pytest.mark.real
@needs_root
def test_a_stuck_process_of_a_former_agent_is_ended(desk: Desk) -> None:
    desk.apply(record(10))
    (pid,) = desk.pids()
    os.kill(pid, signal.SIGSTOP)
    former, desk.engine = desk.engine, desk.another()
    desk.apply(record(10))
    assert desk.pids() != [pid] and desk.get()[0] == 200
    desk.loop.run(former._end())


@pytest.mark.real
@needs_root
def test_it_ends_with_its_agent(desk: Desk) -> None:
    desk.apply(record(10))
    assert desk.engine._streams is not None
    desk.engine._streams[1].transport.abort()
    desk.loop.run(asyncio.sleep(0))
    eventually(lambda: desk.engine._child is not None and desk.engine._child.poll() is not None)
    assert desk.loop.run(desk.engine.observe()) is None


@pytest.mark.real
@needs_root
def test_a_silent_process_is_replaced(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.apply(record(10))
    monkeypatch.setattr(process, "ANSWER_SECONDS", 0.5)
    os.kill(desk.pids()[0], signal.SIGSTOP)
    with pytest.raises(SkysailError, match="does not answer"):
        desk.apply(record(11))
    monkeypatch.undo()
    desk.apply(record(11))
    assert desk.get(number=11)[0] == 200


@pytest.mark.real
@needs_root
def test_the_check_starts_one_and_leaves_nothing(desk: Desk) -> None:
    assert desk.loop.run(desk.engine.check()) == []
    assert not holders(f"{desk.mark}-check") and not desk.key_file.exists()
