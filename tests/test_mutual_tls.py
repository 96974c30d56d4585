"""Controller and agents by mutual TLS: who comes in, who is refused, and certificates that are renewed under way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from sqlalchemy import delete, update

import stores
from clouds import Cloud, eventually, running_cloud
from fleets import Machine, authority, machine, row, told, write
from skysail.agent.identity import Identity
from skysail.contract.identity import CONTROLLER, host_name
from skysail.hosts.authority import Authority
from skysail.hosts.client import AgentClient
from skysail.hosts.credentials import Credentials, show
from skysail.kit import certificates
from skysail.kit.clock import HandClock, SystemClock
from skysail.kit.errors import SkysailError
from skysail.store.database import Database
from skysail.store.schema import host_zones, hosts
from skysail.store.vault import Vault

DAY = 86400.0


def caller(by: Authority, name: str, chain: bytes | None) -> httpx.Client:
    """Somebody who trusts this authority, expects ``name`` at the other end, and shows ``chain``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=by.pem.decode())
    if chain is not None:
        show(context, chain)
    return httpx.Client(verify=context, timeout=20, trust_env=False, headers={"host": name})


def ask(machine: Machine, by: Authority, chain: bytes | None, name: str = "") -> int:
    """The status of the answer to a health question; raises httpx.TransportError when there is none."""
    name = name or host_name(machine.identity)
    with caller(by, name, chain) as http:
        return http.get(f"https://127.0.0.1:{machine.agent_port}/healthz", extensions={"sni_hostname": name}).status_code


def controllers(by: Authority, now: float | None = None) -> bytes:
    key = certificates.new_key()
    return by.certify_controller(key, now or time.time()) + certificates.key_pem(key)


def strangers(folder: Path) -> Authority:
    """The authority of another cloud."""
    folder.mkdir()
    database = Database(folder / "other.sqlite")
    database.migrate()
    with database.transaction() as connection:
        made = Authority.ensure(connection, Vault.at(folder / "master.key"), time.time(), 7 * DAY)
    database.close()
    return made


@contextlib.contextmanager
def credentials(cloud: Cloud) -> Iterator[Credentials]:
    """A controller's own, of this cloud."""
    database = Database.of(cloud.config)
    try:
        yield Credentials(database, Vault.at(cloud.config.master_key), SystemClock(), cloud.config.certificate_seconds)
    finally:
        database.close()


async def facts_at(address: str, shown: Credentials) -> str:
    """Which host answers at the address."""
    client = AgentClient(address, shown)
    try:
        found = await client.facts()
        assert found is not None
        return found.host
    finally:
        await client.close()


def test_a_host_at_another_address_is_given_instances(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30, "a blueprint")
    write(cloud, delete(host_zones).where(host_zones.c.host_id == "host-1", host_zones.c.zone == "b"))
    with machine(cloud, zones=("b",)) as other:
        eventually(lambda: row(cloud, "host-2").vcpus, 60, "it reports")
        client.create_instances(instanceNames=["there"], availabilityZone="us-east-1b", blueprintId="debian_12",
                                bundleId="nano_3_0")
        eventually(lambda: client.get_instance_state(instanceName="there")["state"]["name"] == "running", 60, "it runs")
        found = {one["id"]: one for one in told(cloud, "host", "list")}
        assert found["host-2"]["guests"] == 1 and found["host-1"]["guests"] == 0
        assert found["host-2"]["facts"]["host"] == "host-2" and found["host-2"]["facts"]["certificate_until"] > time.time()
        assert not (other.folder / "controller").exists(), "it has neither the database nor a key that opens it"


def test_only_a_controller_of_this_cloud_comes_in(cloud: Cloud, tmp_path: Path) -> None:
    by, other = authority(cloud), strangers(tmp_path / "other")
    with machine(cloud, known=False) as first, machine(cloud, "host-3", known=False) as second:
        assert ask(first, by, controllers(by)) == 200
        names = host_name(first.identity)
        key = certificates.new_key()
        refused = {
            "no certificate": None,
            "one of another cloud's controller": controllers(other),
            "one that ran out": controllers(by, time.time() - 8 * DAY),
            "another host's": second.certificate.read_bytes(),
            "its own": first.certificate.read_bytes(),
            "one by itself": certificates.pem(certificates.authority(key, CONTROLLER, time.time(), DAY))
            + certificates.key_pem(key),
        }
        for what, chain in refused.items():
            with pytest.raises(httpx.TransportError):
                pytest.fail(f"{what}: let in with {ask(first, by, chain, names)}")
        assert ask(first, by, controllers(by)) == 200, "it still listens"


def test_a_certificate_of_a_caller_with_another_name_is_refused(cloud: Cloud) -> None:
    """Should the authority ever certify callers that are no controllers."""
    by = authority(cloud)
    with machine(cloud, known=False) as host:
        key = certificates.new_key()
        issuer = x509.load_pem_x509_certificate(by.pem)
        made = certificates.issue(issuer, by._key, key.public_key(), [host_name(host.identity)],
                                  time.time(), DAY, {"client"})
        with pytest.raises(httpx.TransportError):
            ask(host, by, certificates.pem(made) + certificates.key_pem(key))


def test_a_controller_speaks_to_nobody_but_the_host_that_it_means(cloud: Cloud, tmp_path: Path) -> None:
    other = strangers(tmp_path / "other")
    with machine(cloud, known=False) as first, machine(cloud, "host-3", known=False) as second, credentials(cloud) as shown:
        assert asyncio.run(facts_at(first.address, shown)) == "host-2"
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            asyncio.run(facts_at(first.address.replace(first.identity, second.identity), shown))
        first.kill("agent")
        by = authority(cloud)
        for what, issuer, at in (("of another cloud", other, time.time()), ("that ran out", by, time.time() - 8 * DAY)):
            own = Identity(tmp_path / what)
            own.begin(first.identity, issuer.certify_host(first.identity, own.request(), at), issuer.pem)
            chain = tmp_path / what / "host.pem"
            with impostor(first.agent_port, chain), pytest.raises(httpx.ConnectError, match="certificate"):
                asyncio.run(facts_at(first.address, shown))
        with socket.create_server(("127.0.0.1", first.agent_port)) as plain:  # speaks no TLS
            plain.listen()
            with pytest.raises(httpx.TransportError):
                asyncio.run(asyncio.wait_for(_answered(plain, first.address, shown), 30))


async def _answered(plain: socket.socket, address: str, shown: Credentials) -> str:
    plain.setblocking(False)

    async def answer() -> None:
        taken, _ = await asyncio.get_running_loop().sock_accept(plain)
        await asyncio.get_running_loop().sock_sendall(taken, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        taken.close()

    answering = asyncio.create_task(answer())
    try:
        return await facts_at(address, shown)
    finally:
        await answering


@contextlib.contextmanager
def impostor(port: int, chain: Path) -> Iterator[None]:
    """Answers with this certificate, and takes any caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    loop = asyncio.new_event_loop()

    async def taken(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def begin() -> asyncio.Server:
        return await asyncio.start_server(taken, "127.0.0.1", port, ssl=context)

    server = loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_certificates_are_renewed_under_way_and_nothing_breaks_off() -> None:
    # Good for ninety seconds, which a busy machine may take to start the two, and renewed long before they are over.
    often = "from skysail.hosts import credentials\ncredentials.RENEW_AFTER = 0.05"
    with running_cloud("certificate_hours = 0.025\n", before=often) as cloud, machine(cloud) as host:
        eventually(lambda: row(cloud, "host-2").facts, 60, "it tells its facts")
        seen: set[float] = set()

        def renewed() -> bool:
            if row(cloud, "host-2").facts:
                seen.add(row(cloud, "host-2").facts["certificate_until"])
            return len(seen) >= 3 and min(seen) < time.time()

        eventually(renewed, 600, "several certificates, and that the first one ran out")
        text = (cloud.folder / "controller.log").read_text()
        assert "host-2 broke off" not in text and "not renewed" not in text and "host-2 is refused" not in text
        assert row(cloud, "host-2").away_since is None
        # A controller that starts now has a new one too, and meets the renewed one.
        cloud.kill("controller")
        cloud.start("controller", often)
        before = row(cloud, "host-2").seen_at
        eventually(lambda: row(cloud, "host-2").seen_at > before, 60, "it is spoken to again")
        host.kill("agent")
        host.start("agent")
        eventually(lambda: row(cloud, "host-2").away_since is None, 60)


def test_a_host_takes_only_a_certificate_that_it_asked_for(tmp_path: Path, cloud: Cloud) -> None:
    by, other = authority(cloud), strangers(tmp_path / "other")
    own = Identity(tmp_path / "own")
    identity, another = "0" * 32, "1" * 32
    first = by.certify_host(identity, own.request(), time.time())
    with pytest.raises(SkysailError, match="not by the cloud's authority"):
        own.begin(identity, first, other.pem)
    with pytest.raises(SkysailError, match="another host's"):
        own.begin(another, first, by.pem)
    own.begin(identity, first, by.pem)
    with pytest.raises(SkysailError, match="no certificate was asked for"):
        own.take(first)
    asked = own.request()
    own.request()
    with pytest.raises(SkysailError, match="another key"):
        own.take(by.certify_host(identity, asked, time.time()))
    with pytest.raises(SkysailError, match="not by the cloud's authority"):
        own.take(other.certify_host(identity, own.request(), time.time()))
    with pytest.raises(SkysailError, match="another host's"):
        own.take(by.certify_host(another, own.request(), time.time()))
    with pytest.raises(SkysailError, match="not by the cloud's authority"):
        own.take(b"nothing")
    own.take(by.certify_host(identity, own.request(), time.time() + 60))
    held = x509.load_pem_x509_certificate((tmp_path / "own" / "host.pem").read_bytes())
    assert held.not_valid_after_utc.timestamp() == own.until > time.time()
    assert (tmp_path / "own" / "host.pem").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "own" / "next.key").exists()
    with pytest.raises(SkysailError, match="no request"):
        by.certify_host(identity, b"nothing", time.time())


def test_a_controllers_own_certificate_is_renewed(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    clock = HandClock(time.time() - 100 * DAY)
    own = Credentials(database, Vault.at(tmp_path / "master.key"), clock, 7 * DAY)
    context = own.context()
    assert own.due_in(clock.now() + 7 * DAY) == pytest.approx(7 * DAY / 3)

    def shown_runs_out() -> float:
        """What the context shows, as another end sees it."""
        held: list[dict[str, object]] = []
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        key = certificates.new_key()
        show(server, own.authority().certify_host("0" * 32, certificates.pem(certificates.request(key)), time.time())
             + certificates.key_pem(key))
        server.verify_mode = ssl.CERT_OPTIONAL
        server.load_verify_locations(cadata=own.authority().pem.decode())
        server.verify_flags |= ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME: years pass in this test
        here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
        client_end = context.wrap_bio(here, there, server_hostname=host_name("0" * 32))
        server_end = server.wrap_bio(there, here, server_side=True)
        for _ in range(4):
            for end in (client_end, server_end):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        held.append(server_end.getpeercert() or {})
        return ssl.cert_time_to_seconds(str(held[0]["notAfter"]))

    first = shown_runs_out()
    clock.advance(2 * DAY)
    assert own.context() is context and shown_runs_out() == first
    clock.advance(DAY)
    assert own.context() is context and shown_runs_out() == first + 3 * DAY
    database.close()


def test_an_agent_that_no_controller_can_call_looks_after_its_guests(cloud: Cloud) -> None:
    with machine(cloud) as host:
        eventually(lambda: row(cloud, "host-2").vcpus, 60, "it reports")
        host.kill("agent")
        with socket.create_server(("127.0.0.1", host.agent_port)):
            host.start("agent")  # healthy at its own socket, with the document that it has
            eventually(lambda: "no controller reaches this host" in host.log("agent"), 60)
            freed = time.time()
        eventually(lambda: row(cloud, "host-2").seen_at > freed, 60, "it is called once the port is free again")
        host.kill("agent")
        (host.certificate).unlink()
        host.start("agent")
        eventually(lambda: "this host has no certificate" in host.log("agent"), 60)


def test_another_machine_of_a_hosts_name_is_not_taken_for_it(cloud: Cloud) -> None:
    with machine(cloud) as host:
        eventually(lambda: row(cloud, "host-2").vcpus, 60, "it reports")
        stranger = host.address.replace(host.identity, "0" * 32)
        write(cloud, update(hosts).where(hosts.c.id == "host-2").values(address=stranger))
        eventually(lambda: "Hostname mismatch" in (cloud.folder / "controller.log").read_text(), 60, "it is refused")
