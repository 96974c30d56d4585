"""A controller with as many simulated hosts and instances as a hoster has: what each size costs, and how that grows.

The controller is the real one, in a process of its own, over a database on the disk. The hosts are real agents with engines
that hold no guests, many in few processes (see tests/swarm.py). Most instances are put into the rows by the code of
CreateInstances itself, many in one transaction, and then run by the hosts; what is measured goes over the wire, signed by
botocore, no answer parsed beyond what the next request needs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cyclopts
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cyclopts import Parameter
from sqlalchemy import Connection, func, insert, select, update

from clouds import Cloud, eventually
from skysail.cli import show
from skysail.hosts import placement
from skysail.kit.clock import SystemClock
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import accounts, catalog, placing, regions
from skysail.resources.instances import MAX_NAMES, Instances
from skysail.resources.request import Request
from skysail.store.database import Database
from skysail.store.schema import hosts, images, instances, operations
from skysail.store.vault import Vault
from swarm import Swarm, swarm

REGION, ZONES = "us-east-1", "ab"
# Room for every instance of the largest fleet.
SETTINGS = 'engines = "sim"\nprivate_network = "10.0.0.0/10"\npublic_pool = "100.64.0.0/10"\n'
BUNDLE, BLUEPRINT = "nano_3_0", "debian_12"
# How many instances an account has, and how many are put into the rows in one transaction.
ACCOUNT_INSTANCES, SEEDED_TOGETHER = 1000, 500
# The target of both, as their 99th percentile.
TARGET_MS = 100.0
PATIENCE_SECONDS = 3600.0
TICKS = os.sysconf("SC_CLK_TCK")


class Owner(NamedTuple):
    """An account: its key, and the names of its instances, ``prefix`` and a number below ``count``."""

    account: str
    key: str
    secret: str
    prefix: str
    count: int

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number:05}"


class Caller:
    """One client with one connection that is kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)

    def ask(self, owner: Owner, action: str, **asked: Any) -> tuple[float, bytes]:
        """Seconds from the signed request's first byte to the answer's last, and the answer. Raises SkysailError on any but
        200, OSError where nobody listens."""
        body = json.dumps(asked).encode()
        made = AWSRequest("POST", f"http://127.0.0.1:{self._port}/", {
            "Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"Lightsail_20161128.{action}"}, body)
        SigV4Auth(Credentials(owner.key, owner.secret), "lightsail", REGION).add_auth(made)
        began = time.perf_counter()
        try:
            self._connection.request("POST", "/", body, dict(made.headers))
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as broken:
            self._connection.close()
            raise OSError(f"{action} was not answered: {broken}") from broken
        if response.status != 200:
            raise SkysailError(f"{action} was answered {response.status}: {answer[:300].decode(errors='replace')}")
        return time.perf_counter() - began, answer


def getting(port: int, owners: Sequence[Owner], seconds: float, seed: int) -> list[float]:
    """One client: GetInstance of any instance, again and again; the seconds of each."""
    caller, chance, taken = Caller(port), random.Random(seed), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        owner = chance.choice(owners)
        taken.append(caller.ask(owner, "GetInstance", instanceName=owner.name(chance.randrange(owner.count)))[0])
    return taken


def listing(port: int, owners: Sequence[Owner], seconds: float, seed: int) -> list[float]:
    """One client: every page of GetInstances of any account, again and again; the seconds of each page."""
    caller, chance, taken, token = Caller(port), random.Random(seed), list[float](), b""
    end = time.monotonic() + seconds
    owner = chance.choice(owners)
    while time.monotonic() < end:
        took, answer = caller.ask(owner, "GetInstances", **({"pageToken": token.decode()} if token else {}))
        taken.append(took)
        _, found, rest = answer.rpartition(b'"nextPageToken":"')
        token = rest.split(b'"', 1)[0] if found else b""
        if not token:
            owner = chance.choice(owners)
    return taken


def launching(port: int, owners: Sequence[Owner], names: Sequence[str], seed: int) -> list[float]:
    """One client: CreateInstances of one name after the other; the seconds of each."""
    caller, chance = Caller(port), random.Random(seed)
    return [caller.ask(chance.choice(owners), "CreateInstances", instanceNames=[name], blueprintId=BLUEPRINT, bundleId=BUNDLE,
                       availabilityZone=REGION + chance.choice(ZONES))[0] for name in names]


def place(connection: Connection, config: Config, owner: Owner, zone: str) -> list[str]:
    """The host that would take one more instance."""
    bundle = catalog.get_bundle(BUNDLE)
    return placing.choose(connection, config, owner.account, time.time(), placement.Need(
        zone=zone, blueprint=BLUEPRINT, vcpus=bundle["cpuCount"], memory_mib=round(bundle["ramSizeInGb"] * 1024),
        disk_gib=bundle["diskSizeInGb"]))


class Fleet:
    """A cloud whose hosts are a swarm."""

    def __init__(self, cloud: Cloud, members: Swarm) -> None:
        self.cloud = cloud
        self._swarm = members
        self._database = Database.of(cloud.config)

    def close(self) -> None:
        self._database.close()

    def start(self) -> float:
        """Start the controller; seconds until it answers."""
        began = time.monotonic()
        self.cloud.start("controller")
        return time.monotonic() - began

    def meet(self) -> float:
        """Put every host into the rows, and start; seconds until all have reported."""
        self.start()
        self.cloud.stop()
        with self._database.transaction() as connection:
            for number, member in enumerate(self._swarm.members):
                if not connection.execute(update(hosts).where(hosts.c.id == member.id).values(
                        address=member.address)).rowcount:
                    connection.execute(insert(hosts).values(id=member.id, address=member.address))
                regions.serve(connection, member.id, {REGION: ZONES[number % len(ZONES)]})
        began = time.monotonic()
        self.start()
        self.until(select(func.count()).select_from(hosts).where(~hosts.c.id.in_(select(images.c.host_id))), "hosts to meet")
        return time.monotonic() - began

    def seed(self, count: int) -> list[Owner]:
        """Put ``count`` instances into the rows, as CreateInstances does; their owners."""
        vault, clock = Vault.at(self.cloud.config.master_key), SystemClock()
        nouns, owners = Instances(self.cloud.config, clock, vault), []
        for first in range(0, count, ACCOUNT_INSTANCES):
            prefix = f"a{first // ACCOUNT_INSTANCES}"
            with self._database.transaction() as connection:
                account = accounts.create_account(connection, prefix, clock.now())
                owners.append(Owner(account, *accounts.create_access_key(connection, vault, account, clock.now()), prefix,
                                    min(ACCOUNT_INSTANCES, count - first)))
        wanted = [(owner, range(begin, min(begin + MAX_NAMES, owner.count)))
                  for owner in owners for begin in range(0, owner.count, MAX_NAMES)]
        together = SEEDED_TOGETHER // MAX_NAMES
        for begin in range(0, len(wanted), together):
            with self._database.transaction() as connection:
                for number, (owner, numbers) in enumerate(wanted[begin:begin + together]):
                    nouns.create(connection, Request(owner.account, REGION, "CreateInstances", {
                        "instanceNames": [owner.name(one) for one in numbers], "blueprintId": BLUEPRINT, "bundleId": BUNDLE,
                        "availabilityZone": REGION + ZONES[(begin + number) % len(ZONES)]}))
            show.detail(f"{min(begin + together, len(wanted)) * MAX_NAMES} of {count}")
        return owners

    def until_settled(self) -> float:
        """Seconds until no operation is open, and every instance runs."""
        began = time.monotonic()
        self.until(select(func.count()).select_from(operations).where(operations.c.done.is_(False)), "operations to end")
        self.until(select(func.count()).select_from(instances).where(instances.c.state != "running"), "instances to run")
        return time.monotonic() - began

    def until(self, left: Any, what: str) -> None:
        """Until the query finds none."""
        def none() -> bool:
            found = self.read(lambda connection: connection.execute(left).scalar_one())
            if found:
                show.detail(f"{found} {what}")
                time.sleep(0.2)  # the question itself takes a while where there are many
            return not found

        eventually(none, PATIENCE_SECONDS, what)

    def read(self, look: Callable[[Connection], Any]) -> Any:
        with self._database.transaction(write=False) as connection:
            return look(connection)

    def placement(self, owners: Sequence[Owner], times: int) -> list[float]:
        """Seconds that it takes to read what hosts have and to choose one, each time."""
        taken = []
        for number in range(times):
            zone = REGION + ZONES[number % len(ZONES)]
            with self._database.transaction(write=False) as connection:
                began = time.perf_counter()
                place(connection, self.cloud.config, owners[number % len(owners)], zone)
                taken.append(time.perf_counter() - began)
        return taken

    def restart(self, owners: Sequence[Owner], names: Sequence[str]) -> dict[str, float]:
        """Kill the controller with launches of ``names`` on their way, start another one, and wait until it has done what
        there was to do, and listens to every host: what that took, and what clients saw meanwhile."""
        launching(self.cloud.port, owners, names, 1)
        self.cloud.kill("controller")
        before, began = self._swarm.asked(), time.monotonic()
        answers = self.start()
        with self.probed(owners) as seen:
            settled = self.until_settled() + answers
            while (heard := self._swarm.asked() - before)["GET /reports"] < len(self._swarm.members):
                show.detail(f"{heard['GET /reports']} of {len(self._swarm.members)} hosts listened to")
                time.sleep(0.2)
                _refuse_to_wait(began)
            listens = time.monotonic() - began
        return {"restart_answers_seconds": answers, "restart_settled_seconds": settled, "restart_listens_seconds": listens,
                "restart_documents": heard["PUT /document"], "restart_get_p99_ms": quantile(seen, 0.99) * 1e3,
                "restart_get_max_ms": max(seen) * 1e3}

    @contextlib.contextmanager
    def probed(self, owners: Sequence[Owner]) -> Iterator[list[float]]:
        """A client that asks for instances within the context; the seconds of each answer."""
        seen, over = list[float](), threading.Event()

        def probe() -> None:
            number = 0
            while not over.is_set() or not seen:
                number += 1
                seen.extend(getting(self.cloud.port, owners, 0.2, number))

        thread = threading.Thread(target=probe)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()

    def memory_mib(self) -> float:
        """What the controller's process has in memory (proc(5), VmRSS)."""
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise SkysailError("the controller has ended")

    def busy(self, seconds: float) -> float:
        """Percent of a processor that the controller uses when nobody asks for anything."""
        before, began = self._used(), time.monotonic()
        time.sleep(seconds)
        return (self._used() - before) / (time.monotonic() - began) * 100

    def _used(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def _pid(self) -> int:
        return self.cloud.processes["controller"].pid


def _refuse_to_wait(began: float) -> None:
    if time.monotonic() > began + PATIENCE_SECONDS:
        raise SkysailError(f"the fleet did not settle within {PATIENCE_SECONDS:.0f} s")


def quantile(taken: Sequence[float], part: float) -> float:
    """The value that ``part`` of them do not exceed."""
    ordered = sorted(taken)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


@contextlib.contextmanager
def fleet(count: int, processes: int) -> Iterator[Fleet]:
    """A cloud of ``count`` hosts, whose controller is not started yet."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    cloud = Cloud(folder, SETTINGS)
    try:
        with swarm(count, processes) as members:
            made = Fleet(cloud, members)
            try:
                yield made
            finally:
                made.close()
    finally:
        cloud.stop()
        shutil.rmtree(folder, ignore_errors=True)


def measure(count: int, per_host: int, clients: int, seconds: float, launches: int, processes: int) -> dict[str, float]:
    """All figures of one size."""
    instances = count * per_host
    show.step(f"{count} hosts: their agents start")
    with fleet(count, processes) as made, ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool:
        show.step(f"{count} hosts: the controller meets them")
        met = made.meet()
        show.step(f"{count} hosts: {instances} instances are put into the rows")
        made.cloud.stop()
        began = time.monotonic()
        owners = made.seed(instances)
        seeded = time.monotonic() - began
        show.step(f"{count} hosts: they run {instances} instances")
        ran = made.start() + made.until_settled()

        def together(work: Callable[..., list[float]], *arguments: Any) -> list[float]:
            each = [pool.submit(work, made.cloud.port, owners, *arguments, seed) for seed in range(clients)]
            return [one for answered in each for one in answered.result()]

        show.step(f"{count} hosts: nobody asks for anything, {seconds:.0f} s")
        busy = made.busy(seconds)
        show.step(f"{count} hosts: GetInstance by {clients} clients, {seconds:.0f} s")
        gets = together(getting, seconds)
        show.step(f"{count} hosts: pages of GetInstances by {clients} clients, {seconds:.0f} s")
        lists = together(listing, seconds)
        show.step(f"{count} hosts: {launches} launches by {clients} clients")
        began = time.monotonic()
        names = [[f"l{client}-{one}" for one in range(-(-launches // clients))] for client in range(clients)]
        answered = [pool.submit(launching, made.cloud.port, owners, names[client], client) for client in range(clients)]
        launched = [one for answers in answered for one in answers.result()]
        made.until_settled()
        launch_seconds = time.monotonic() - began
        placements = made.placement(owners, 20)
        memory = made.memory_mib()
        show.step(f"{count} hosts: the controller is killed with launches on their way, and started again")
        restarted = made.restart(owners, [f"r-{number}" for number in range(clients * 5)])
    return {
        "hosts": count, "instances": instances, "met_seconds": met, "seeded_seconds": seeded, "ran_seconds": ran,
        "get_p50_ms": statistics.median(gets) * 1e3, "get_p99_ms": quantile(gets, 0.99) * 1e3,
        "gets_per_s": len(gets) / seconds, "list_p50_ms": statistics.median(lists) * 1e3,
        "list_p99_ms": quantile(lists, 0.99) * 1e3, "lists_per_s": len(lists) / seconds,
        "launch_p50_ms": statistics.median(launched) * 1e3, "launch_p99_ms": quantile(launched, 0.99) * 1e3,
        "launches_per_s": len(launched) / launch_seconds, "placement_ms": statistics.median(placements) * 1e3,
        "idle_processor_percent": busy, "memory_mib": memory, **restarted}


def slopes(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """By which power of the number of hosts each figure grows: 0 where it stays, 1 where it grows as they do."""
    grown = math.log(large["hosts"] / small["hosts"])
    return {name: math.log(large[name] / small[name]) / grown for name in large if small[name] > 0 and large[name] > 0}


def bench(*, hosts: Annotated[list[int], Parameter(consume_multiple=True)] = [10, 100, 1000],  # noqa: B006
          per_host: int = 10, clients: int = 2, seconds: float = 10.0, launches: int = 100, processes: int = 0,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Measure a fleet of each number of HOSTS with PER_HOST instances each: requests by CLIENTS for SECONDS, then LAUNCHES.
    The hosts' agents share PROCESSES (0: one for every 1,000 of them)."""
    sizes = []
    for count in hosts:
        size = measure(count, per_host, clients, seconds, launches, processes or -(-count // 1000))
        sizes.append(size)
        # The next size may take very long.
        show.line(f"{count} hosts, {size['instances']:.0f} instances: p99 of GetInstance {size['get_p99_ms']:.0f} ms, "
                  f"of a page {size['list_p99_ms']:.0f} ms; {size['launches_per_s']:.1f} launches/s")
    show.finish()
    largest = sizes[-1]
    show.table([{"": name.replace("_", " "), **{f"{size['hosts']}": f"{size[name]:,.1f}" for size in sizes}}
                for name in largest if name != "hosts"], ["", *(f"{size['hosts']}" for size in sizes)])
    show.line(f"p99 of GetInstance and of a page of GetInstances: target {TARGET_MS:.0f} ms; {clients} clients")
    grown = slopes(sizes[0], largest) if len(sizes) > 1 else {}
    if grown:
        show.table([{"": name.replace("_", " "), "power": f"{power:.2f}"} for name, power in grown.items()
                    if name not in ("hosts", "instances")], ["", "power"])
        show.line(f"power: by which power of the number of hosts it grew from {sizes[0]['hosts']} to {largest['hosts']}")
    if json:
        show.as_json({"bench": "fleet", "ratio": TARGET_MS / max(largest["get_p99_ms"], largest["list_p99_ms"]), **largest,
                      "clients": clients, "sizes": sizes, "slopes": grown})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
