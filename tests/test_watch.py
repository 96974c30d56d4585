"""What a controller makes of a host that falls silent, answers without end, or cannot be called at all."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import delete, insert, select, update

import stores
from skysail import contract
from skysail.contract.report import HostReport, ImageReport
from skysail.hosts import client as clients
from skysail.hosts import watch
from skysail.hosts.client import AgentClient
from skysail.hosts.fleet import Fleet
from skysail.hosts.intake import Intake
from skysail.hosts.watch import Watch
from skysail.kit.clock import HandClock
from skysail.serve.customer import login
from skysail.store.database import Database
from skysail.store.leases import Lease
from skysail.store.schema import hosts
from skysail.store.vault import Vault

HOST = "host-2"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = stores.fresh(tmp_path)
    made.migrate()
    with made.transaction() as connection:
        connection.execute(insert(hosts).values(id=HOST, address=f"unix:{tmp_path / 'socket'}"))
    yield made
    made.close()


def away(database: Database) -> float | None:
    with database.transaction(write=False) as connection:
        return connection.execute(select(hosts.c.away_since).where(hosts.c.id == HOST)).scalar_one()


@contextlib.asynccontextmanager
async def agent(path: Path, answer: bytes, more: bytes = b"") -> AsyncIterator[None]:
    """Somebody who answers whatever is asked so, and then goes on with ``more`` for ever."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            while more:
                writer.write(more)
                await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield


def body(content: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status.encode(), len(content), content)


@contextlib.asynccontextmanager
async def watched(database: Database, tmp_path: Path) -> AsyncIterator[Watch]:
    made = Watch(HOST, AgentClient(f"unix:{tmp_path / 'socket'}"), database, HandClock(), Vault.at(tmp_path / "key"),
                 lambda resources: None)
    work = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def until(seen: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not seen():
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_SECONDS", "FOREIGN_SECONDS"):
        monkeypatch.setattr(watch, name, 0.05)


def test_silence_is_written_however_often_that_fails(database: Database, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may be away for the same reason as the host."""
    written, failures = Watch._write, [OSError("no database"), OSError("still none")]

    def failing(self: Watch, values: dict[str, object]) -> None:
        if failures:
            raise failures.pop()
        written(self, values)

    async def story() -> None:
        monkeypatch.setattr(Watch, "_write", failing)
        async with watched(database, tmp_path):
            await until(lambda: away(database) is not None)
    asyncio.run(story())
    assert not failures


def test_one_that_answered_once_and_fell_silent_is_away(database: Database, tmp_path: Path) -> None:
    """It said what it is, by which it is not away; it goes before its first report."""
    facts = {"host": HOST, "program": "0", "kernel": "6", "qemu": "10", "accelerator": "tcg", "accelerator_seen": "",
             "cpu": "c", "cpu_flags": [], "cpu_models": [], "machine_types": [], "guest_cpu": "m", "guest_machine": "q35",
             "contract": contract.VERSION}

    async def story() -> None:
        async with watched(database, tmp_path):
            await until(lambda: away(database) is not None)
            with database.transaction() as connection:  # a moment that is not the next one
                connection.execute(update(hosts).where(hosts.c.id == HOST).values(away_since=1.0))
            async with agent(tmp_path / "socket", body(msgspec.json.encode(facts))):
                await until(lambda: away(database) != 1.0)
            await until(lambda: away(database) not in (None, 1.0))
    asyncio.run(story())


def test_one_that_was_refused_and_fell_silent_is_away(database: Database, tmp_path: Path) -> None:
    def refused() -> str:
        with database.transaction(write=False) as connection:
            return str(connection.execute(select(hosts.c.refused).where(hosts.c.id == HOST)).scalar_one())

    async def story() -> None:
        async with watched(database, tmp_path):
            async with agent(tmp_path / "socket", body(b'{"contract": %d}' % (contract.VERSION + 2))):
                await until(refused)
                assert away(database) is None
            await until(lambda: away(database) is not None)
            assert refused() == ""
    asyncio.run(story())


@pytest.mark.parametrize("ask", ["facts", "samples", "reports"])
def test_a_host_that_answers_without_end_is_cut_off(tmp_path: Path, ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEW_BYTES", "MOST_BYTES"):
        monkeypatch.setattr(clients, name, 1 << 20)

    async def story() -> None:
        one = AgentClient(f"unix:{tmp_path / 'socket'}")
        async with agent(tmp_path / "socket", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", bytes(1 << 16)):
            with pytest.raises(httpx.RemoteProtocolError, match="more than"):
                async with asyncio.timeout(60):
                    match ask:
                        case "facts":
                            await one.facts()
                        case "samples":
                            await one.samples("", 0)
                        case _:
                            async for _ in one.reports():
                                pass
        await one.close()
    asyncio.run(story())


def test_a_host_that_packs_its_answer_is_not_unpacked(tmp_path: Path) -> None:
    """Some bytes would become as many thousands."""
    async def story() -> None:
        one = AgentClient(f"unix:{tmp_path / 'socket'}")
        packed = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n"
        async with agent(tmp_path / "socket", packed + bytes.fromhex("1f8b08") + bytes(100)):
            with pytest.raises(msgspec.DecodeError):
                await one.facts()
        await one.close()
    asyncio.run(story())


def test_one_address_that_nobody_can_call_keeps_nobody_from_the_others(database: Database, tmp_path: Path) -> None:
    with database.transaction() as connection:
        connection.execute(insert(hosts).values(id="host-1", address="https://x@10.0.0.256:8703"))
    called: list[str] = []

    def connect(address: str) -> AgentClient:
        called.append(address)
        return AgentClient(address, transport=httpx.AsyncHTTPTransport())

    async def story() -> None:
        fleet = Fleet(database, HandClock(), Vault.at(tmp_path / "key"), lambda name: Lease(name, "a", 1), connect,
                      lambda resources: None, Intake(database, lambda *_: None), 60.0)
        work = asyncio.create_task(fleet.run())
        await until(lambda: HOST in fleet._tended and "host-1" in fleet._unfit)
        for _ in range(10):
            fleet.touch()
            await asyncio.sleep(0.02)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    asyncio.run(story())
    assert sorted(called) == ["https://x@10.0.0.256:8703", f"unix:{tmp_path / 'socket'}"], "each of them once"


@pytest.mark.parametrize("user", ["-oProxyCommand=touch x;#", "a b", "root@elsewhere", "a" * 33, "Admin", "admin\n"])
def test_a_host_does_not_say_what_its_controller_runs(user: str) -> None:
    image = {"digest": "0" * 64, "blueprint": "debian_12", "name": "", "version": "12", "size_gib": 2, "templated": False}
    report = {"host": HOST, "boot": "b", "sequence": 1, "generation": 1, "vcpus": 1, "memory_mib": 1, "disk_gib": 1,
              "accelerator": "sim"}
    good = msgspec.json.encode(report | {"images": [image | {"user": "admin"}]})
    assert msgspec.json.decode(good, type=HostReport).images[0] == ImageReport(**image, user="admin")  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(report | {"images": [image | {"user": user}]}), type=HostReport)


def test_a_user_name_is_no_option_of_ssh(tmp_path: Path) -> None:
    access = {"privateKey": "x", "certKey": "x", "ipAddress": "127.0.0.1", "hostKeys": [],
              "username": f"-oProxyCommand=touch {tmp_path / 'ran'}"}
    folder = tmp_path / "keys"
    folder.mkdir()
    done = subprocess.run(login(access, folder, ["true"], ["ConnectTimeout=5", "Port=1"]), stdin=subprocess.DEVNULL,
                          capture_output=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "ran").exists()


def test_hosts_for_which_something_is_new_are_met_first(database: Database, tmp_path: Path) -> None:
    """Hundreds that hold their documents keep nobody from the one that has to start something."""
    called: list[str] = []
    with database.transaction() as connection:
        for number in range(300):
            connection.execute(insert(hosts).values(id=f"other-{number}", address=f"unix:/nowhere/{number}",
                                                    generation=7, observed_generation=7 + (number == 200)))
        connection.execute(update(hosts).where(hosts.c.id == HOST).values(observed_generation=hosts.c.generation))

    def connect(address: str) -> AgentClient:
        called.append(address)
        return AgentClient(address)

    async def story() -> None:
        fleet = Fleet(database, HandClock(), Vault.at(tmp_path / "key"), lambda name: Lease(name, "a", 1), connect,
                      lambda resources: None, Intake(database, lambda *_: None), 60.0)
        work = asyncio.create_task(fleet.run())
        await until(lambda: len(fleet._tended) == 301)
        with database.transaction() as connection:  # one comes, one goes, one is elsewhere
            connection.execute(insert(hosts).values(id="new", address="unix:/nowhere/new"))
            connection.execute(delete(hosts).where(hosts.c.id == "other-1"))
            connection.execute(update(hosts).where(hosts.c.id == "other-2").values(address="unix:/elsewhere"))
        await until(lambda: "new" in fleet._tended and "other-1" not in fleet._tended
                    and fleet._tended["other-2"].host.address == "unix:/elsewhere")
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    asyncio.run(story())
    assert called[0] == "unix:/nowhere/200" and len(called) == 303
