"""Changes of DNS records, from the request until the name server answers with them, against PowerDNS's own REST API.

Skysail is a controller over a simulated host with a real PowerDNS behind it: CreateDomainEntry is checked, committed with its
Operation (SQLite, synced to the disk), compiled into the host's document, kept by its agent, and patched into PowerDNS. The
peer is another PowerDNS with the same settings, changed by PATCH, which does the last of these steps and no other.

Client processes send requests that were signed before; this process asks the name server for each new name until it is there.
A *change* is one request that makes one record set. The peer has one client, for with several it refuses some changes: its
SQLite backend takes one at a time. The two take turns. Beside the rate, changes are made one by one in a small and in a large
zone, and the time until each is seen is told.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import cyclopts
import dns.message
import dns.query
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cyclopts import Parameter

from clouds import Cloud, eventually
from name_servers import NameServer, free_port
from skysail.cli import show
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.resources import zone_files
from skysail.serve import zones

PATIENCE_SECONDS = 120.0
LOOK_SECONDS = 0.002
REGION = "us-east-1"


class Change(NamedTuple):
    """A request that gives ``name`` an address."""

    name: str
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Peer(NamedTuple):
    """One of the two that are compared: where it takes changes, and where it answers for them."""

    name: str
    port: int
    dns_port: int
    key: str
    secret: str

    def change(self, name: str, zone: str) -> Change:
        """The request, ready to send."""
        if not self.secret:
            body = json.dumps({"rrsets": [{"name": f"{name}.", "type": "A", "ttl": 60, "changetype": "REPLACE", "records": [
                {"content": "192.0.2.1", "disabled": False}]}]}).encode()
            return Change(name, "PATCH", f"/api/v1/servers/localhost/zones/{zone}.", body, {"X-API-Key": self.key})
        body = json.dumps({"domainName": zone, "domainEntry": {"name": name, "type": "A", "target": "192.0.2.1"}}).encode()
        made = AWSRequest("POST", f"http://127.0.0.1:{self.port}/", {
            "Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "Lightsail_20161128.CreateDomainEntry"}, body)
        SigV4Auth(Credentials(self.key, self.secret), "lightsail", REGION).add_auth(made)
        return Change(name, "POST", "/", body, dict(made.headers))

    def answers(self, name: str) -> bool:
        """Does the name server know the name?"""
        with contextlib.suppress(dns.exception.DNSException, OSError):
            return bool(dns.query.udp(dns.message.make_query(name, "A"), "127.0.0.1", 2, self.dns_port).answer)
        return False


def send(port: int, changes: Sequence[Change], start: float) -> list[float]:
    """One client process: the changes one after the other over one connection, from ``start`` on; when each was begun.
    Raises SkysailError on any other answer than success."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    time.sleep(max(start - time.monotonic(), 0))
    begun = []
    for one in changes:
        begun.append(time.monotonic())
        connection.request(one.method, one.path, one.body, one.headers)
        answer = connection.getresponse()
        said = answer.read()
        if answer.status not in (200, 204):
            raise SkysailError(f"{one.method} {one.path} was answered {answer.status}: {said[:200].decode(errors='replace')}")
    return begun


def together(pool: ProcessPoolExecutor, peer: Peer, zone: str, mark: str, changes: int, clients: int) -> dict[str, float]:
    """So many changes by so many clients at once: how many a second, and how long each took to be seen."""
    wanted = [[peer.change(f"{mark}-{client}-{number}.{zone}", zone) for number in range(changes // clients)]
              for client in range(clients)]
    start = time.monotonic() + 0.5
    sending = [pool.submit(send, peer.port, portion, start) for portion in wanted]
    # Each client's next name is the one to look for: changes of one client are seen in their order.
    seen: list[list[float]] = [[] for _ in wanted]
    while (missing := [number for number in range(clients) if len(seen[number]) < len(wanted[number])]):
        if time.monotonic() > start + PATIENCE_SECONDS:
            raise SkysailError(f"{peer.name} does not answer with what it was told")
        time.sleep(LOOK_SECONDS)  # who only looks shall not take the processors from those that are measured
        for number in missing:
            while len(seen[number]) < len(wanted[number]) and peer.answers(wanted[number][len(seen[number])].name):
                seen[number].append(time.monotonic())
        for one in sending:
            if one.done():
                one.result()
    begun = [one.result() for one in sending]
    took = sorted(after - before for client in zip(begun, seen, strict=True) for before, after in zip(*client, strict=True))
    last = max(max(one) for one in seen)
    first = min(min(one) for one in begun)
    return {"changes_per_second": len(took) / (last - first), "seen_median_ms": statistics.median(took) * 1e3,
            "seen_max_ms": took[-1] * 1e3}


def alone(peer: Peer, zone: str, mark: str, changes: int) -> float:
    """Changes one by one: the median of the milliseconds until each is seen."""
    took = []
    for number in range(changes):
        one = peer.change(f"{mark}-{number}.{zone}", zone)
        began = send(peer.port, [one], 0.0)[0]
        while not peer.answers(one.name):
            time.sleep(LOOK_SECONDS)
            if time.monotonic() > began + PATIENCE_SECONDS:
                raise SkysailError(f"{peer.name} does not answer with what it was told")
        took.append(time.monotonic() - began)
    return statistics.median(took) * 1e3


def filled(zone: str, entries: int) -> str:
    """A zone file with so many entries."""
    lines = (f"held-{number} A 192.0.2.{number % 250 + 1}\n" for number in range(entries))
    return f"$ORIGIN {zone}.\n$TTL 60\n" + "".join(lines)


@contextlib.contextmanager
def skysail(small: str, large: str, entries: int) -> Iterator[Peer]:
    """A cloud with both zones, on a simulated host with a name server of its own."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    cloud = Cloud(folder, f'engines = "sim"\ndns = "powerdns"\ndns_port = {free_port()}\ndns_api_port = {free_port()}\n')
    server = NameServer(cloud.config)
    try:
        server.start()
        cloud.start("agent")
        cloud.start("controller")
        for name, count in ((small, 1), (large, entries)):
            file = folder / "zone"
            file.write_text(filled(name, count))
            zones.bring_in(cloud.config, file, name, False)
        peer = Peer("Skysail", cloud.port, cloud.config.dns_port, *cloud.credentials())
        eventually(lambda: peer.answers(f"held-{entries - 1}.{large}"), 120, "the large zone is served")
        yield peer
    finally:
        cloud.stop()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def powerdns(small: str, large: str, entries: int) -> Iterator[Peer]:
    """A PowerDNS with both zones, and nobody else behind it."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    server = NameServer(Config(data=str(folder), dns_port=free_port(), dns_api_port=free_port()))
    try:
        server.start()
        key = server.config.dns_key_file.read_text()
        peer = Peer("PowerDNS", server.config.dns_api_port, server.config.dns_port, key, "")
        connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=PATIENCE_SECONDS)
        for name, count in ((small, 1), (large, entries)):
            connection.request("POST", "/api/v1/servers/localhost/zones", json.dumps({
                "name": f"{name}.", "kind": "Native", "nameservers": ["ns1.skysail.internal."], "soa_edit_api": "",
                "api_rectify": False, "rrsets": [
                    {"name": f"{entry.name}.", "type": entry.type, "ttl": entry.ttl, "records": [
                        {"content": entry.record, "disabled": False}]} for entry in zone_files.read(filled(name, count))[1]],
            }), {"X-API-Key": peer.key})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 201:
                raise SkysailError(f"PowerDNS made no zone: {answer.status} {said[:200].decode(errors='replace')}")
        yield peer
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def bench(*, changes: int = 400, clients: int = 4, single: int = 20, entries: int = 9500, rounds: int = 3,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Make CHANGES by CLIENTS in a small zone, ROUNDS times, and SINGLE ones in it and in a zone of ENTRIES."""
    require_root()
    small, large = "small.example.com", "large.example.com"
    show.step(f"two name servers, with a small zone and one of {entries} entries")
    with skysail(small, large, entries) as ours, powerdns(small, large, entries) as theirs, \
            ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.2] * clients))  # the processes are there
        taken = []
        for number in range(rounds):
            show.step(f"round {number + 1} of {rounds}: {changes} changes by {clients} clients, then {single} by one")
            taken.append({peer.name.lower(): {
                **together(pool, peer, small, f"r{number}", changes, clients if peer is ours else 1),
                "small_zone_ms": alone(peer, small, f"s{number}", single),
                "large_zone_ms": alone(peer, large, f"l{number}", single)} for peer in (ours, theirs)})
    show.finish()
    figures = {peer: {name: statistics.median(one[peer][name] for one in taken) for name in taken[0][peer]}
               for peer in ("skysail", "powerdns")}
    show.table([{"": name.replace("_", " "), "Skysail": f"{value:,.1f}", "PowerDNS": f"{figures['powerdns'][name]:,.1f}"}
                for name, value in figures["skysail"].items()], ["", "Skysail", "PowerDNS"])
    ratio = figures["skysail"]["changes_per_second"] / figures["powerdns"]["changes_per_second"]
    show.line(f"ratio {ratio:.2f}: changes per second, Skysail's against PowerDNS's alone (target 1,000 per second)")
    if json:
        show.as_json({"bench": "dns", "ratio": ratio, "changes": changes, "clients": clients, "entries": entries,
                      "rounds": rounds, **figures})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
