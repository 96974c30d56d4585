"""Moving a static IP from one instance to another under a stream of new connections, against iproute2 and gratuitous ARP.

The data plane is the real one, on the stage of namespaces that the tests use: a client outside opens a new connection to the
static IP every few milliseconds, and keeps one open to each of some other instances. A move is what DetachStaticIp and
AttachStaticIp lead to on a host: two rulesets, one after the other. The *gap* is the longest time between two answers, from
the last one of the former instance to the first one of the next.

The peer moves an address as keepalived and pacemaker do: `ip address del` on one machine, `ip address add` on the other, and
a gratuitous ARP (RFC 5227, 3), over a plain bridge, under the same stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import cyclopts
import msgspec
from cyclopts import Parameter

from clouds import eventually, taken_slot
from skysail.cli import show
from skysail.contract.document import FirewallRule, Port
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root, run
from skysail.network.plan import Layout
from stage import Place, Stage, arp, frame, socket_in, within

SERVICE = 80
FIXED = "100.115.93.200"
EVERY_SECONDS = 0.004
# How long the stream goes on around a move, and how long an attempt is waited for.
AROUND_SECONDS, PATIENCE_SECONDS = 0.6, 1.5
OPEN = (FirewallRule(protocol="tcp", from_port=SERVICE, to_port=SERVICE),)


class Answer(NamedTuple):
    """One connection that was answered: when, and by whom."""

    at: float
    who: str


@contextlib.contextmanager
def answering(place: Place, name: str) -> Iterator[None]:
    """A service in ``place`` that tells each client ``name``, then echoes until the client leaves."""
    ready, loops = threading.Event(), []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(name.encode() + b"\n")
            while said := await reader.read(256):
                writer.write(said)
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(one, "0.0.0.0", SERVICE, backlog=1024):
            loops.append((asyncio.get_running_loop(), asyncio.current_task()))
            ready.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    thread = threading.Thread(target=within, args=(place.namespace, serve), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield
    finally:
        loop, task = loops[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def stream(address: str, until: float) -> tuple[list[Answer], int]:
    """Open a connection to ``address`` every few milliseconds until the clock says so: those that were answered, and how many
    were opened in all."""
    answers: list[Answer] = []

    async def attempt() -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                reader, writer = await asyncio.open_connection(address, SERVICE)
                who = (await reader.readline()).decode().strip()
                if who:
                    answers.append(Answer(time.monotonic(), who))
                writer.close()

    attempts = []
    while time.monotonic() < until:
        attempts.append(asyncio.create_task(attempt()))
        await asyncio.sleep(EVERY_SECONDS)
    await asyncio.gather(*attempts)
    return sorted(answers), len(attempts)


def stream_from(namespace: str, address: str, until: float) -> tuple[list[Answer], int]:
    """:func:`stream`, by a client in ``namespace``."""
    return within(namespace, lambda: stream(address, until))


def move_under_stream(pool: ProcessPoolExecutor, client: Place, address: str, move: Callable[[], None], former: str,
                      next_: str) -> dict[str, float]:
    """Move the address while ``client`` asks for it from a process of its own, which the move does not keep from asking;
    raises SkysailError when the next instance never answers."""
    began = time.monotonic() + AROUND_SECONDS
    asking = pool.submit(stream_from, client.namespace, address, began + 2 * AROUND_SECONDS)
    time.sleep(max(began - time.monotonic(), 0))
    move()
    moved = time.monotonic() - began
    answers, asked = asking.result()
    heard = sorted({one.who for one in answers})
    if heard != sorted((former, next_)):
        raise SkysailError(f"{former} and {next_} should have answered at {address}, {heard} did")
    gap = max(later.at - earlier.at for earlier, later in pairwise(answers))
    return {"gap_ms": gap * 1e3, "move_ms": moved * 1e3, "asked": asked, "unanswered": asked - len(answers)}


class Held:
    """Established connections that are spoken on all the time; ``broken`` names those that ended."""

    def __init__(self, client: Place, addresses: list[str]) -> None:
        self._connections = {address: client.connects(address, SERVICE) for address in addresses}
        self.broken: list[str] = []
        self.longest_seconds = 0.0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._speak, args=one, daemon=True) for one in self._connections.items()]
        for thread in self._threads:
            thread.start()

    def _speak(self, address: str, connection: socket.socket) -> None:
        try:
            lines = connection.makefile()
            lines.readline()
            while not self._ended.is_set():
                began = time.monotonic()
                connection.sendall(b"still here\n")
                if lines.readline() != "still here\n":
                    raise OSError("the connection ended")
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                time.sleep(0.02)
        except OSError:
            self.broken.append(address)

    def leave(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for connection in self._connections.values():
            connection.close()


def port(number: int, public: str = "") -> Port:
    return Port(id=f"g-{number}", mac=f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}", network=1,
                private_ipv4=f"172.26.{number >> 8}.{number & 255}", public_ipv4=public or f"100.115.93.{number}",
                firewall=OPEN)


def ours(pool: ProcessPoolExecutor, slot: int, moves: int, instances: int,
         others: int) -> tuple[list[dict[str, float]], Held]:
    """The figures of each move of Skysail's data plane, and what became of the others' connections."""
    layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"skybench{slot}", public_ipv6="")
    stage = Stage(f"skybench{slot}", layout)
    try:
        ports = {one.id: one for one in (port(10 + number) for number in range(instances))}
        first, second, *rest = list(ports)
        ports[first] = msgspec.structs.replace(ports[first], public_ipv4=FIXED)
        stage.apply(*ports.values())
        with contextlib.ExitStack() as services:
            for name in (first, second, *rest[:others]):
                services.enter_context(answering(stage.guest(ports[name]), name))
            eventually(lambda: stage.stranger.reaches(FIXED, SERVICE), 30, "the static IP answers")
            held = Held(stage.stranger, [ports[name].public_ipv4 for name in rest[:others]])
            taken = []
            for _ in range(moves):
                own = port(int(first[2:]))

                def move(former: str = first, next_: str = second, own: Port = own) -> None:
                    ports[former] = own
                    stage.apply(*ports.values())
                    ports[next_] = msgspec.structs.replace(ports[next_], public_ipv4=FIXED)
                    stage.apply(*ports.values())

                taken.append(move_under_stream(pool, stage.stranger, FIXED, move, first, second))
                first, second = second, first
            held.leave()
        return taken, held
    finally:
        stage.remove()


def theirs(pool: ProcessPoolExecutor, slot: int, moves: int) -> list[dict[str, float]]:
    """The figures of each move by iproute2 and gratuitous ARP."""
    address, macs = "192.0.2.200", ("52:54:00:00:01:01", "52:54:00:00:01:02")
    middle, client = Place(f"skybench{slot}b"), Place(f"skybench{slot}c")
    machines = [Place(f"skybench{slot}{letter}") for letter in "de"]
    try:
        inside = ["ip", "-n", middle.namespace]
        run([*inside, "link", "add", "br0", "type", "bridge"])
        run([*inside, "link", "set", "br0", "up"])
        for number, place in enumerate((client, *machines)):
            run([*inside, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", place.namespace])
            run([*inside, "link", "set", f"p{number}", "master", "br0", "up"])
            place.address("eth0", f"192.0.2.{number + 1}", 24)
        for place, mac in zip(machines, macs, strict=True):
            run(["ip", "-n", place.namespace, "link", "set", "eth0", "address", mac])
        machines[0].address("eth0", address, 32)
        with answering(machines[0], "0"), answering(machines[1], "1"):
            eventually(lambda: client.reaches(address, SERVICE), 30, "the peer's address answers")
            taken, first = [], 0
            for _ in range(moves):
                def move(first: int = first) -> None:
                    run(["ip", "-n", machines[first].namespace, "address", "del", f"{address}/32", "dev", "eth0"])
                    run(["ip", "-n", machines[1 - first].namespace, "address", "add", f"{address}/32", "dev", "eth0"])
                    mac = macs[1 - first]
                    with socket_in(machines[1 - first].namespace, socket.AF_PACKET, socket.SOCK_RAW) as card:
                        card.bind(("eth0", 0))
                        card.send(frame("ff:ff:ff:ff:ff:ff", mac, 0x0806, arp(1, mac, address, "00:00:00:00:00:00", address)))

                taken.append(move_under_stream(pool, client, address, move, str(first), str(1 - first)))
                first = 1 - first
        return taken
    finally:
        for place in (client, *machines, middle):
            place.remove()


def figures(taken: list[dict[str, float]]) -> dict[str, Any]:
    gaps = [one["gap_ms"] for one in taken]
    return {"gap_ms_median": statistics.median(gaps), "gap_ms_max": max(gaps),
            "move_ms_median": statistics.median(one["move_ms"] for one in taken),
            "asked": sum(one["asked"] for one in taken), "unanswered": sum(one["unanswered"] for one in taken)}


def bench(*, moves: int = 20, instances: int = 50, others: int = 8,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Move a static IP MOVES times on a host of INSTANCES, with an established connection to each of OTHERS."""
    require_root()
    if not 0 <= others <= instances - 2 <= 180:
        raise SkysailError("instances takes 2 to 182, others at most two less")
    fresh = multiprocessing.get_context("spawn")
    with taken_slot() as slot, ProcessPoolExecutor(1, fresh) as pool:
        pool.submit(time.monotonic).result()
        show.step(f"Skysail: {moves} moves on a host of {instances} instances")
        taken, held = ours(pool, slot, moves, instances, others)
        show.step(f"iproute2 and gratuitous ARP: {moves} moves")
        measured = {"skysail": figures(taken), "iproute2": figures(theirs(pool, slot, moves))}
    show.finish()
    show.table([{"": name.replace("_", " "), "Skysail": f"{value:,.1f}",
                 "iproute2 and ARP": f"{measured['iproute2'][name]:,.1f}"}
                for name, value in measured["skysail"].items()], ["", "Skysail", "iproute2 and ARP"])
    show.line(f"established connections to {others} other instances: {len(held.broken)} broke, "
              f"longest wait for an echo {held.longest_seconds * 1e3:.0f} ms")
    longest = measured["skysail"]["gap_ms_max"]
    ratio = measured["iproute2"]["gap_ms_max"] / longest
    show.line(f"longest gap {longest:.0f} ms (target 300), ratio {ratio:.2f}: iproute2's against ours")
    if json:
        show.as_json({"bench": "address", "ratio": ratio, "gap_ms_max": longest, "moves": moves,
                      "instances": instances, "established": others, "broken": len(held.broken),
                      "longest_echo_ms": held.longest_seconds * 1e3, **measured})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
