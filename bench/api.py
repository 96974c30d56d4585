"""GetInstances with 1,000 instances against moto's DescribeInstances with 1,000, in one run on one machine.

Skysail is a controller over a simulated host (the real agent with engines that hold no guests); moto is its own server,
``moto_server``. Both are one process on loopback, driven by the same client: the same processes, each with one kept-alive
connection, each request signed by botocore, no answer parsed beyond its page token. What is compared is *listings*: one
listing shows every instance once. Lightsail's pages have 100 instances, so that Skysail answers ten requests for it; EC2's
have up to 1,000, so that moto answers one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlencode
from xml.etree import ElementTree

import cyclopts
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cyclopts import Parameter

from clouds import Cloud, eventually, running_cloud
from skysail.cli import show
from skysail.kit.errors import SkysailError
from skysail.resources.instances import MAX_NAMES
from skysail.resources.paging import PAGE_SIZE

# Room for the instances: the default pool of public addresses has 254.
SETTINGS = 'public_pool = "100.116.0.0/16"\n'
JSON = "application/x-amz-json-1.1"
FORM = "application/x-www-form-urlencoded"
REGION = "us-east-1"
PATIENCE_SECONDS = 120


class Peer(NamedTuple):
    """One of the two that are compared: where it listens, who asks, how a listing is asked for."""

    name: str
    port: int
    service: str
    key: str
    secret: str

    def request(self, token: str) -> tuple[bytes, dict[str, str]]:
        """Body and signed headers of the request for the page behind ``token``."""
        if self.service == "lightsail":
            body = json.dumps({"pageToken": token} if token else {}).encode()
            headers = {"Content-Type": JSON, "X-Amz-Target": "Lightsail_20161128.GetInstances"}
        else:
            asked = {"Action": "DescribeInstances", "Version": "2016-11-15", "MaxResults": "1000"}
            body = urlencode(asked | ({"NextToken": token} if token else {})).encode()
            headers = {"Content-Type": FORM}
        made = AWSRequest("POST", f"http://127.0.0.1:{self.port}/", headers, body)
        SigV4Auth(Credentials(self.key, self.secret), self.service, REGION).add_auth(made)
        return body, dict(made.headers)

    def next_token(self, answer: bytes) -> str:
        """The token at the end of an answer, '' on the last page; read without parsing the page."""
        name = b'"nextPageToken":"' if self.service == "lightsail" else b"<nextToken>"
        _, found, rest = answer.rpartition(name)
        return rest.split(b'"' if self.service == "lightsail" else b"<", 1)[0].decode() if found else ""

    def names(self, answer: bytes) -> set[str]:
        """The instances in an answer, read in full: to check that a listing is what it says."""
        if self.service == "lightsail":
            return {one["name"] for one in json.loads(answer)["instances"]}
        return {one.text or "" for one in ElementTree.fromstring(answer).iter() if one.tag.endswith("}instanceId")}


def listing(peer: Peer, connection: http.client.HTTPConnection) -> tuple[list[float], list[bytes]]:
    """Ask for every instance once; the seconds of each request, and the answers. Raises SkysailError on any other answer."""
    seconds, answers, token = [], [], ""
    while True:
        body, headers = peer.request(token)
        began = time.perf_counter()
        connection.request("POST", "/", body, headers)
        response = connection.getresponse()
        answer = response.read()
        seconds.append(time.perf_counter() - began)
        if response.status != 200:
            raise SkysailError(f"{peer.name} answered {response.status}: {answer[:300].decode(errors='replace')}")
        answers.append(answer)
        token = peer.next_token(answer)
        if not token:
            return seconds, answers


class Start:
    """The moment at which all client processes begin; each is handed it when it is made."""

    barrier: Any = None

    @classmethod
    def share(cls, barrier: Any) -> None:
        cls.barrier = barrier


def client(peer: Peer, seconds: float) -> tuple[int, list[float], float]:
    """One client process: listings one after the other, begun within ``seconds``; their number, the seconds of each
    request, and those of all."""
    connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=PATIENCE_SECONDS)
    listing(peer, connection)  # the connection is made, what can be warm is
    Start.barrier.wait(PATIENCE_SECONDS)
    began = time.perf_counter()
    taken: list[float] = []
    listings = 0
    while time.perf_counter() < began + seconds:
        taken += listing(peer, connection)[0]
        listings += 1
    return listings, taken, time.perf_counter() - began


def measure(peer: Peer, instances: int, clients: int, seconds: float) -> dict[str, Any]:
    """The peer's figures under ``clients`` processes; every process finishes its last listing, and its time counts."""
    shown: set[str] = set()
    for answer in listing(peer, http.client.HTTPConnection("127.0.0.1", peer.port, timeout=PATIENCE_SECONDS))[1]:
        shown |= peer.names(answer)
    if len(shown) != instances:
        raise SkysailError(f"{peer.name} lists {len(shown)} instances, not {instances}")
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(clients, fresh, Start.share, (fresh.Barrier(clients),)) as pool:
        answers = list(pool.map(client, [peer] * clients, [seconds] * clients))
    rate = sum(listings / span for listings, _, span in answers)
    requests = sorted(one for _, taken, _ in answers for one in taken)
    return {
        "listings_per_second": rate, "instances_per_second": rate * instances,
        "requests_per_second": sum(len(taken) / span for _, taken, span in answers),
        "instances_per_request": instances * sum(listings for listings, _, _ in answers) / len(requests),
        "request_median_ms": statistics.median(requests) * 1e3,
        "request_p99_ms": requests[min(len(requests) - 1, int(len(requests) * 0.99))] * 1e3,
        "requests": len(requests),
    }


def fill(cloud: Cloud, instances: int) -> None:
    """Create instances by the API, and wait until the simulated host runs them all."""
    api = cloud.client()
    eventually(lambda: api.get_blueprints()["blueprints"], 30, "a blueprint is ready")
    names = [f"instance-{number:04}" for number in range(instances)]
    for first in range(0, instances, MAX_NAMES):
        api.create_instances(instanceNames=names[first:first + MAX_NAMES], availabilityZone="us-east-1a",
                             blueprintId="debian_12", bundleId="nano_3_0")

    def states() -> set[str]:
        pages = api.get_paginator("get_instances").paginate()
        return {one["state"]["name"] for page in pages for one in page["instances"]}

    eventually(lambda: states() == {"running"}, 600, "all instances run")


@contextlib.contextmanager
def moto(instances: int) -> Iterator[Peer]:
    """moto's server with as many EC2 instances, from the environment that the launcher made for it."""
    program = Path(os.environ.get("SKYSAIL_BENCH_VENV", "")) / "bin" / "moto_server"
    if not program.is_file():
        raise SkysailError("moto is not installed here", "run: sudo ./skysail bench api")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=said, stderr=said)
        try:
            peer = Peer("moto", port, "ec2", "AKIAMOTO", "secret")
            eventually(lambda: process.poll() is not None or _listens(port), 60, "moto listens")
            run = urlencode({"Action": "RunInstances", "Version": "2016-11-15", "ImageId": "ami-12c6146b",
                             "InstanceType": "t3.nano", "MinCount": instances, "MaxCount": instances})
            made = AWSRequest("POST", f"http://127.0.0.1:{port}/", {"Content-Type": FORM}, run)
            SigV4Auth(Credentials(peer.key, peer.secret), "ec2", REGION).add_auth(made)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
            connection.request("POST", "/", run, dict(made.headers))
            answer = connection.getresponse()
            if answer.status != 200:
                raise SkysailError(f"moto made no instances: {answer.read()[:300].decode(errors='replace')}")
            answer.read()
            yield peer
        finally:
            process.terminate()
            process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def bench(*, instances: int = 1000, clients: int = 4, seconds: float = 5.0, rounds: int = 3,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Compare whole listings per second, after creating INSTANCES on either side. The two take turns, ROUNDS times, so that
    what else the machine does meets both; figures are medians of the rounds."""
    with running_cloud(SETTINGS) as cloud:
        show.step(f"skysail: creating {instances} instances on a simulated host")
        began = time.monotonic()
        fill(cloud, instances)
        filled = time.monotonic() - began
        ours = Peer("Skysail", cloud.port, "lightsail", *cloud.credentials())
        show.step(f"moto: creating {instances} instances")
        with moto(instances) as theirs:
            taken = []
            for number in range(rounds):
                show.step(f"round {number + 1} of {rounds}: {clients} clients list all from each, {seconds:.0f} s or longer")
                taken.append({"skysail": measure(ours, instances, clients, seconds),
                              "moto": measure(theirs, instances, clients, seconds)})
    show.finish()
    ratio = statistics.median(one["skysail"]["listings_per_second"] / one["moto"]["listings_per_second"] for one in taken)
    figures = {peer: {name: statistics.median(one[peer][name] for one in taken) for name in taken[0][peer]}
               for peer in ("skysail", "moto")}
    show.table([{"": name.replace("_", " "), "Skysail GetInstances": f"{value:,.1f}",
                 "moto DescribeInstances": f"{figures['moto'][name]:,.1f}"}
                for name, value in figures["skysail"].items()], ["", "Skysail GetInstances", "moto DescribeInstances"])
    show.line(f"{instances} instances were running {filled:.1f} s after the first CreateInstances; {clients} clients")
    show.line(f"ratio {ratio:.1f}: listings of all {instances} instances per second, Skysail's against moto's")
    if json:
        show.as_json({"bench": "api", "ratio": ratio, "instances": instances, "clients": clients, "rounds": rounds,
                      "page_size": PAGE_SIZE, "fill_seconds": filled, **figures})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
