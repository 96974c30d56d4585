"""A running instance that goes from host to host and back, against plain QEMU with its defaults, in one run on one machine.

Skysail: a controller and two hosts, each a network namespace of this machine with the real agent, its own data plane and
QEMU; `skysail migrate`, with the disk mirrored and everything encrypted. Plain QEMU: the same image, processors, memory and
devices in two processes with one disk between them, `migrate` with no parameter set, on a bridge.

A guest is idle, or a program in it writes to 64 MiB of its memory at 30 MiB/s, or it answers HTTP requests on four
connections and on new ones. The pause is what QEMU counts (`downtime`), and what a client sees who asks the guest's address
for an echo every ten milliseconds, in a process and a network namespace of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json as jsons
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from sqlalchemy import select

import stores
from bench.launch import BLUEPRINT, BUNDLE
from clouds import CACHE, Cloud, ensure_image, eventually, taken_slot
from fleets import Station, stations
from skysail.cli import show
from skysail.hypervisor import guest_agent, qemu
from skysail.hypervisor.accelerator import probe
from skysail.hypervisor.process import PROGRAM, plug_network
from skysail.hypervisor.qmp import Monitor
from skysail.images.library import Library
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root, run
from skysail.network.taps import attach
from skysail.network.underlay import Underlay
from skysail.resources.catalog import BUNDLES
from skysail.serve import migrate as migrations
from skysail.serve.probe import Probe
from skysail.store.schema import guests, hosts, moves

CONDITIONS = ("idle", "dirtying", "serving")
PATIENCE_SECONDS = 300.0
CLIENT = 3
REQUEST_SECONDS, EVERY_SECONDS = 10.0, 0.02
# Around each move, so that what the client saw before and after is there to be held against it.
AROUND_SECONDS = 0.5
SERVE = """
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "6"); self.end_headers(); self.wfile.write(b"hello\\n")
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("", 80), Answer).serve_forever()
"""
DIRTY = """
import time
memory, number = bytearray(64 << 20), 0
while True:
    for start in range(0, len(memory), 1 << 20):
        for page in range(start, start + (1 << 20), 4096):
            memory[page] = number & 255
        time.sleep(1 / 30)
    number += 1
"""
Figures = dict[str, Any]


# --- the client


def watch(address: str, serving: bool) -> None:
    """Ask the guest until standard input ends; then say, as JSON, for how long it did not answer at the longest, and how many
    connections and requests were lost. Runs in the client's namespace."""
    lost, asked, over = [0, 0], [0], threading.Event()

    def ask(new: bool) -> None:
        held: http.client.HTTPConnection | None = None
        while not over.is_set():
            try:
                if held is None:
                    held = http.client.HTTPConnection(address, 80, timeout=REQUEST_SECONDS)
                held.request("GET", "/")
                if held.getresponse().read() != b"hello\n":
                    raise OSError("another answer")
            except (OSError, http.client.HTTPException):
                if held is not None:
                    held.close()
                held, lost[new] = None, lost[new] + 1
            asked[0] += 1
            if new and held is not None:
                held.close()
                held = None
            time.sleep(EVERY_SECONDS)

    workers = [threading.Thread(target=ask, args=(number == 4,)) for number in range(5 if serving else 0)]
    with Probe(address) as echo:
        for one in workers:
            one.start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.read()
        over.set()
        for one in workers:
            one.join()
        broken = echo.broken()
        sys.stdout.write(jsons.dumps({"outside_ms": echo.longest_ms(), "lost_connections": lost[0] + broken,
                                      "lost_requests": sum(lost), "requests": asked[0]}) + "\n")


@contextlib.contextmanager
def watched(namespace: str, address: str, serving: bool) -> Iterator[Figures]:
    """What a client in ``namespace`` sees meanwhile; filled in when the context ends."""
    client = subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-P", "-c",
         f"from bench.migrate import watch; watch({address!r}, {serving})"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert client.stdin is not None and client.stdout is not None
    seen: Figures = {}
    try:
        if client.stdout.readline() != "ready\n":
            raise SkysailError(f"the guest does not answer a client at {address}")
        time.sleep(AROUND_SECONDS)
        yield seen
        time.sleep(AROUND_SECONDS)
        seen.update(jsons.loads(client.communicate("", timeout=60)[0]))
    finally:
        client.kill()
        client.wait()


async def told(agent: Path, script: str) -> str:
    """What a shell in the guest prints."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            async with guest_agent.reached(agent) as channel:
                ended = await guest_agent.run(channel, "/bin/sh", "-ec", script, seconds=60)
            break
        except SkysailError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.5)
    if ended.status:
        raise SkysailError(f"the guest does not do as it is told: {ended.said}")
    return ended.said


def work(agent: Path, condition: str) -> None:
    """Have the guest do this, and nothing else of it."""
    program = {"idle": "", "dirtying": DIRTY, "serving": SERVE}[condition]
    begin = f"cat > /var/tmp/work.py <<'END'\n{program}\nEND\nsetsid python3 /var/tmp/work.py > /dev/null 2>&1 &\nsleep 3"
    asyncio.run(told(agent, "pkill -f '^python3 /var/tmp/work.py' || true\n" + (begin if program else "")))


# --- Skysail


class Fleet:
    """Two hosts, an instance on one of them, and a client."""

    def __init__(self, cloud: Cloud, pair: list[Station], client: str) -> None:
        self._cloud = cloud
        self._stations = {one.host: one for one in pair}
        self.client = client

    def launch(self) -> None:
        api = self._cloud.client()
        eventually(self._ready, 600, "both hosts hold an image and its template")
        api.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId=BLUEPRINT, bundleId=BUNDLE)
        eventually(lambda: api.get_instance_state(instanceName="one")["state"]["name"] == "running", 300, "it runs")
        api.open_instance_public_ports(instanceName="one", portInfo={"protocol": "icmp", "fromPort": 8, "toPort": -1})
        self.address = api.get_instance(instanceName="one")["instance"]["publicIpAddress"]
        eventually(self._answers, 120, "it answers the client")

    def _answers(self) -> bool:
        with contextlib.suppress(SkysailError), watched(self.client, self.address, False):
            return True
        return False

    def _ready(self) -> bool:
        with stores.transaction(self._cloud.config) as connection:
            rows = connection.execute(select(hosts)).all()
        return len(rows) == 2 and all(row.facts and row.memory_mib for row in rows) and bool(
            self._cloud.client().get_blueprints()["blueprints"])

    def agent(self) -> Path:
        with stores.transaction(self._cloud.config) as connection:
            row = connection.execute(select(guests.c.host_id, guests.c.id)).one()
        return self._stations[row.host_id].config.guests_dir / row.id / "run" / "agent.sock"

    def move(self) -> Figures:
        config = self._cloud.config
        done = migrations.migrate(config, "one", "", "admin", "", migrations.terms(config), False, lambda seen: None)
        if done.state != "succeeded":
            raise SkysailError(f"it did not go over: {done.error}")
        report = done.report
        return {"pause_ms": report.pause_ms, "gap_ms": report.gap_ms, "bytes": report.memory_bytes,
                "seconds": report.seconds, "rounds": report.rounds}

    def settle(self) -> None:
        """Nothing of the move is left."""
        def clean() -> bool:
            with stores.transaction(self._cloud.config) as connection:
                return connection.execute(select(moves.c.id)).first() is None
        eventually(clean, 120, "nothing of it is left")


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    cloud = Cloud(folder, 'engines = "sim"\nlocal_host = false\n')
    clients: list[str] = []

    @contextlib.contextmanager
    def beside(underlay: Underlay) -> Iterator[None]:
        """The client is on the same link, to whom the pool is there."""
        underlay.ensure(CLIENT)
        clients.append(underlay.namespace(CLIENT))
        run(["ip", "-n", clients[0], "route", "add", cloud.config.public_pool, "dev", "eth0"])
        yield

    try:
        cloud.start("controller")
        with stations(cloud, 2, CACHE / "images", 'segment = "eth0"\n', beside, CACHE / "templates") as pair:
            yield Fleet(cloud, pair, clients[0])
    finally:
        cloud.stop()
        shutil.rmtree(folder, ignore_errors=True)


# --- plain QEMU


class Plain:
    """A guest of the same image, shape and devices, in one QEMU after the other. They have one disk, and a bridge."""

    address, mac = "192.0.2.10", "52:54:00:00:00:10"

    def __init__(self, folder: Path, name: str, image: Path, accelerator: Any) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self.client = name
        self._number = 0
        self._disk = (str(folder / "disk.qcow2"), str(image))
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), self._disk[0],
             f"{BUNDLES[BUNDLE]['diskSizeInGb']}G"])
        for words in (("netns", "add", name), ("-n", name, "link", "set", "lo", "up"),
                      ("-n", name, "link", "add", "br0", "up", "type", "bridge"),
                      ("-n", name, "address", "add", "192.0.2.1/24", "dev", "br0")):
            run(["ip", *words])
        self._process, self._monitor = self._begin(False)

    def _begin(self, incoming: bool) -> tuple[subprocess.Popen[bytes], Path]:
        """Another process of the guest, which waits for it if it is ``incoming``."""
        self._number += 1
        own = self._folder / str(self._number)
        own.mkdir()
        bundle = BUNDLES[BUNDLE]
        machine = qemu.Machine(
            id="plain", accelerator=self._accelerator, vcpus=bundle["cpuCount"],
            memory_mib=round(bundle["ramSizeInGb"] * 1024), folder=str(own), disk=self._disk,
            generation_id="5c0a5c0a-0000-4000-8000-000000000002", pluggable=True, incoming=incoming)
        process = subprocess.Popen([PROGRAM, *qemu.argv(machine)], stdin=subprocess.DEVNULL)

        async def plug() -> None:
            monitor = await Monitor.connect(own / "qmp.sock", 60)
            tap = f"tap{self._number}"
            made: list[int] = []
            thread = threading.Thread(target=lambda: made.append(_tap_in(self.client, tap)))
            thread.start()
            thread.join()
            await plug_network(monitor, made[0], self.mac)
            os.close(made[0])
            run(["ip", "-n", self.client, "link", "set", tap, "master", "br0", "up"])
            if not incoming:
                await monitor.execute("cont")
            await monitor.close()

        asyncio.run(plug())
        return process, own / "qmp.sock"

    def launch(self) -> None:
        asyncio.run(told(self.agent(), f"ip address add {self.address}/24 dev $(ls /sys/class/net | grep -v lo | head -n 1)\n"
                                       "ip link set $(ls /sys/class/net | grep -v lo | head -n 1) up"))

    def agent(self) -> Path:
        return self._monitor.with_name("agent.sock")

    def move(self) -> Figures:
        began = time.monotonic()
        process, waiting = self._begin(True)

        async def go() -> Figures:
            source, target = await Monitor.connect(self._monitor, 60), await Monitor.connect(waiting, 60)
            way = f"unix:{waiting.with_name('move.sock')}"
            await target.execute("migrate-incoming", {"uri": way})
            await source.execute("migrate", {"uri": way})
            with target.listening("RESUME"):
                while (seen := await source.execute("query-migrate"))["status"] != "completed":
                    if seen["status"] == "failed":
                        raise SkysailError(f"plain QEMU did not migrate: {seen.get('error-desc')}")
                    await asyncio.sleep(0.02)
            # Started by Skysail's arguments it waits for the word.
            while (await target.execute("query-status"))["status"] == "inmigrate":
                await asyncio.sleep(0.001)
            await target.execute("cont")
            seen = await source.execute("query-migrate")
            await source.close()
            await target.close()
            return {"pause_ms": float(seen["downtime"]), "bytes": seen["ram"]["transferred"],
                    "rounds": seen["ram"]["dirty-sync-count"]}

        figures = asyncio.run(go())
        self._process.kill()
        self._process.wait()
        self._process, self._monitor = process, waiting
        return figures | {"seconds": time.monotonic() - began}

    def settle(self) -> None:
        """Nothing is left of a move once it is over."""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        run(["ip", "netns", "delete", self.client])


def _tap_in(namespace: str, name: str) -> int:
    """A tap in a namespace, which the calling thread enters for good."""
    from pyroute2 import netns

    netns.setns(namespace)
    return attach(name, persist=False)


# --- figures


def measure(who: Fleet | Plain, name: str, condition: str, rounds: int) -> list[Figures]:
    """Move it so often, under the client's eyes."""
    work(who.agent(), condition)
    taken = []
    for number in range(rounds):
        show.step(f"{name}, {condition}: {number + 1} of {rounds}")
        with watched(who.client, who.address, condition == "serving") as seen:
            figures = who.move()
        who.settle()
        taken.append(figures | seen)
        # A run takes minutes, on a busy machine many: what it has seen is not lost with its end.
        sys.stderr.write(f"{name}, {condition}: {jsons.dumps(taken[-1])}\n")
    return taken


def p99(values: list[float]) -> float:
    """The value that one in a hundred exceeds: of fewer, the largest."""
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


def summed(taken: list[Figures]) -> Figures:
    def all_of(name: str) -> list[float]:
        return [one[name] for one in taken]
    return {"moves": len(taken),
            "pause_ms_median": statistics.median(all_of("pause_ms")), "pause_ms_p99": p99(all_of("pause_ms")),
            "outside_ms_median": statistics.median(all_of("outside_ms")), "outside_ms_p99": p99(all_of("outside_ms")),
            "mib_median": statistics.median(all_of("bytes")) / (1 << 20),
            "seconds_median": statistics.median(all_of("seconds")), "requests": sum(all_of("requests")),
            "lost_requests": sum(all_of("lost_requests")), "lost_connections": sum(all_of("lost_connections"))}


def bench(*, rounds: Annotated[int, Parameter(name=("--rounds", "-n"))] = 20,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Move an instance ROUNDS times in each condition."""
    require_root()
    show.step(f"image {BLUEPRINT}: looking for the one that this tree builds")
    digest = ensure_image(BLUEPRINT, show.step)
    image, accelerator = Library(CACHE / "images").path(digest), probe(CACHE / "accelerator.json").accelerator
    ours: dict[str, list[Figures]] = {}
    theirs: dict[str, list[Figures]] = {}
    show.step("two hosts and an instance")
    with fleet() as two:
        two.launch()
        for condition in CONDITIONS:
            ours[condition] = measure(two, "Skysail", condition, rounds)
    show.step("plain QEMU: booting the same image")
    with taken_slot() as slot, tempfile.TemporaryDirectory(prefix="sky") as folder:
        plain = Plain(Path(folder), f"skyplain{slot}", image, accelerator)
        try:
            plain.launch()
            for condition in CONDITIONS:
                theirs[condition] = measure(plain, "plain QEMU", condition, rounds)
        finally:
            plain.close()
    every = [one for condition in CONDITIONS for one in ours[condition]]
    others = [one for condition in CONDITIONS for one in theirs[condition]]
    whole, peer = summed(every), summed(others)
    figures = {"bench": "migrate", "accelerator": accelerator, "ratio": peer["pause_ms_median"] / whole["pause_ms_median"],
               **{name: whole[name] for name in ("pause_ms_median", "pause_ms_p99", "outside_ms_p99", "lost_connections")},
               "skysail": {name: summed(taken) for name, taken in ours.items()} | {"all": whole},
               "plain": {name: summed(taken) for name, taken in theirs.items()} | {"all": peer},
               # As QEMU counts its pause, and the rest until the target's guest runs.
               "gap_ms_median": statistics.median(one["gap_ms"] for one in every)}
    show.finish()
    if json:
        show.as_json(figures)
        return
    show.table([{"": f"{who}, {condition}", "pause ms": f"{one['pause_ms_median']:.0f}", "p99": f"{one['pause_ms_p99']:.0f}",
                 "outside ms": f"{one['outside_ms_median']:.0f}", "p99 ": f"{one['outside_ms_p99']:.0f}",
                 "memory MiB": f"{one['mib_median']:.0f}", "seconds": f"{one['seconds_median']:.1f}",
                 "requests": one["requests"], "lost": one["lost_requests"], "connections lost": one["lost_connections"]}
                for who, all_of in (("Skysail", figures["skysail"]), ("plain QEMU", figures["plain"]))
                for condition, one in all_of.items()],
               ["", "pause ms", "p99", "outside ms", "p99 ", "memory MiB", "seconds", "requests", "lost", "connections lost"])


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
