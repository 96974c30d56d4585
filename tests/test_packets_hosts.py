"""Private networks that span hosts, shown with real packets: three machines on an underlay, each with its own data plane and
its own FRR."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import stage as staged
from clouds import eventually, taken_slot
from skysail.contract.document import FirewallRule, Network, Overlay, Port
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.network import links
from skysail.network.frr import PROGRAMS, USER, Frr, problems
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from stage import Guest, Stage, Underlay, arp, frame, udp4

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
              pytest.mark.skipif(bool(problems()), reason="FRR is not installed")]
IPV4, ARP = 0x0800, 0x0806
ADA, BOB, CAT, DAN = 1, 2, 3, 4
VNIS = {ADA: 101, BOB: 102, CAT: 103, DAN: 104}
WEB = (FirewallRule(protocol="tcp", from_port=80, to_port=80),)
HOSTS = (1, 2, 3)
SETTLE_SECONDS = 90.0


def underlay(host: int) -> str:
    return f"192.0.2.{host}"


def port(number: int, network: int, address: int = 0, **more: Any) -> Port:
    """A port whose addresses end in ``number``, unless the private one ends in ``address``."""
    return Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network,
                private_ipv4=f"172.26.0.{address or number}", public_ipv4=f"100.115.93.{number}",
                public_ipv6=f"fd53:6b79:7361::{number:x}", firewall=WEB, **more)


def overlay(host: int, *hosts: int, reflectors: tuple[str, ...] = ()) -> Overlay:
    return Overlay(hosts=tuple(underlay(one) for one in hosts or HOSTS if one != host), reflectors=reflectors)


NETWORKS = tuple(Network(number=number, vni=vni) for number, vni in VNIS.items())


class Fleet:
    """Stages on one underlay, three unless told, whose layouts have ``more``. ``ports`` has what each host holds."""

    def __init__(self, mark: str, folder: Path, hosts: tuple[int, ...] = HOSTS, **more: Any) -> None:
        self.underlay = Underlay(f"{mark}u")
        self.hosts = hosts
        self.routers: dict[int, Frr] = {}
        self.stages: dict[int, Stage] = {}
        self.ports: dict[int, list[Port]] = {host: [] for host in hosts}
        self.guests: dict[str, Guest] = {}
        self.networks = NETWORKS
        self.folder = folder
        self.overlays = {host: overlay(host, *hosts) for host in hosts}
        for host in hosts:
            layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"{mark}h{host}", underlay=underlay(host),
                                             **({"segment": "under"} | more))
            self.routers[host] = self.router(host, layout)
            self.stages[host] = Stage(f"{mark}{host}", layout, self.routers[host])
            self.underlay.joins(self.stages[host].machine, "under", underlay(host))
            self.stages[host].machine.address("under", f"2001:db8:9::{host}", 64)
        # Somebody on the same link, to whom the pool is there.
        self.beside = staged.Place(f"{mark}b")
        self.underlay.joins(self.beside, "eth0", "192.0.2.200")
        with self.beside.netlink() as ipr:
            index = ipr.link_lookup(ifname="eth0")[0]
            ipr.route("add", dst="100.115.93.0/24", oif=index)
            ipr.addr("add", index=index, address="2001:db8:9::200", prefixlen=64, family=socket.AF_INET6)
            ipr.route("add", dst="fd53:6b79:7361::/64", oif=index, family=socket.AF_INET6)

    def router(self, host: int, layout: Layout) -> Frr:
        return Frr(self.folder / str(host), layout.namespace, self.folder / f"log{host}")

    def apply(self, host: int) -> None:
        self.stages[host].apply(*self.ports[host], networks=self.networks, overlay=self.overlays[host])

    def guest(self, host: int, one: Port) -> Guest:
        """A guest that starts on the host."""
        self.ports[host].append(one)
        self.apply(host)
        made = self.stages[host].guest(one)
        self.guests[one.id] = made
        return made

    def moves(self, guest: Guest, source: int, target: int) -> Guest:
        """As a live migration does it: the port is awaited at the target until the guest runs there; the source's document
        changes long after."""
        self.ports[target].append(msgspec.structs.replace(guest.port, awaited=True))
        self.apply(target)
        self.stages[source].hands(guest, self.stages[target])
        return guest

    def settles(self) -> None:
        """All routers speak with all."""
        for host in self.hosts:
            eventually(lambda host=host: self.sessions(host), SETTLE_SECONDS)

    def sessions(self, host: int) -> bool:
        with contextlib.suppress(SkysailError):
            held = self.routers[host].sessions()
            return bool(held) and all(held.values())
        return False

    def remove(self) -> None:
        for made in self.stages.values():
            with contextlib.suppress(Exception):
                made.remove()
        self.beside.remove()
        self.underlay.remove()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="skyfrr-"))
    folder.chmod(0o755)
    with taken_slot() as slot:
        made = Fleet(f"skyo{slot}", folder)
        try:
            made.guest(1, port(10, ADA))
            made.guest(2, port(11, ADA))
            # Another customer's, with the same private addresses on other hosts.
            made.guest(2, port(20, BOB, 10))
            made.guest(3, port(21, BOB, 11))
            made.guest(3, port(12, ADA))
            made.settles()
            yield made
        finally:
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)


def guests(fleet: Fleet) -> tuple[Guest, Guest, Guest]:
    """Guests of one network, on the hosts 1, 2 and 3."""
    first, second, third = (fleet.guests[f"g-{number}"] for number in (10, 11, 12))
    return first, second, third


def test_guests_of_one_network_reach_each_other_across_hosts(fleet: Fleet) -> None:
    first, second, third = guests(fleet)
    for server in (second, third):
        with server.serves("0.0.0.0", 5432):
            assert first.reaches(server.port.private_ipv4, 5432) == first.port.private_ipv4
            with first.connects(server.port.private_ipv4, 5432) as flow:
                lines = flow.makefile()
                assert lines.readline()
                flow.sendall(b"x" * 300_000 + b"\n")
                assert len(lines.readline()) == 300_001, "big packets, over an underlay that takes no bigger ones"


def test_public_addresses_of_other_hosts_are_reached_through_their_firewall(fleet: Fleet) -> None:
    first, second, third = guests(fleet)
    for server in (second, third):
        with server.serves("::", 80), server.serves("::", 443):
            assert first.reaches(server.port.public_ipv6, 80) == first.port.public_ipv6
            assert first.reaches(server.port.public_ipv4, 80).removeprefix("::ffff:") == first.port.public_ipv4
            assert first.cut_off(server.port.public_ipv6, 443) and first.cut_off(server.port.public_ipv4, 443)
            with first.connects(server.port.public_ipv6, 80) as flow:
                lines = flow.makefile()
                assert lines.readline()
                flow.sendall(b"x" * 300_000 + b"\n")
                assert len(lines.readline()) == 300_001


def test_public_addresses_are_answered_for_where_they_are(fleet: Fleet) -> None:
    for guest in guests(fleet):
        with guest.serves("::", 80):
            for address in (guest.port.public_ipv4, guest.port.public_ipv6):
                assert fleet.beside.reaches(address, 80)
    seen = subprocess.run(["ip", "-n", fleet.beside.namespace, "neigh"], capture_output=True, text=True).stdout
    macs = {host: links.inside(fleet.stages[host].machine.namespace, lambda: links.find("under")) for host in HOSTS}
    for guest, host in zip(guests(fleet), HOSTS, strict=True):
        link = macs[host]
        assert link is not None and f"{guest.port.public_ipv4} dev eth0 lladdr {link.mac}" in seen


def test_networks_with_the_same_addresses_do_not_meet(fleet: Fleet) -> None:
    """Ada has .10 on host 1 and .11 on host 2, Bob .10 on host 2 and .11 on host 3."""
    first, second, _ = guests(fleet)
    others = fleet.guests["g-20"], fleet.guests["g-21"]
    with second.serves("0.0.0.0", 7001), others[1].serves("0.0.0.0", 7002):
        assert first.reaches("172.26.0.11", 7001) == "172.26.0.10" and first.cut_off("172.26.0.11", 7002)
        assert others[0].reaches("172.26.0.11", 7002) == "172.26.0.10" and others[0].cut_off("172.26.0.11", 7001)
    with others[1].hears("eth0") as heard, second.hears("eth0") as hearing:
        first.says(frame("ff:ff:ff:ff:ff:ff", first.port.mac, IPV4, udp4("172.26.0.10", "172.26.255.255", 5000, b"to Ada's")))
        eventually(lambda: [one for one in hearing if b"to Ada's" in one], staged.PATIENCE_SECONDS)
        # Straight to the other's card, which answers to anybody of its network.
        first.says(frame(others[1].port.mac, first.port.mac, IPV4, udp4("172.26.0.10", "172.26.0.11", 5000, b"astray")))
    assert not [one for one in heard if b"to Ada's" in one or b"astray" in one]


def test_spoofed_frames_do_not_leave_their_host(fleet: Fleet) -> None:
    first, second, third = guests(fleet)
    mine, theirs, text = first.port.mac, second.port.mac, b"this must not arrive"
    gateway = fleet.stages[1].layout.gateway_mac
    bad = {
        "a stolen address": frame(theirs, mine, IPV4, udp4(third.port.private_ipv4, second.port.private_ipv4, 5000, text)),
        "a stolen card": frame(theirs, third.port.mac, IPV4, udp4("172.26.0.10", second.port.private_ipv4, 5000, text)),
        "the gateway's address": frame(theirs, mine, IPV4, udp4("172.26.0.1", second.port.private_ipv4, 5000, text)),
        "the gateway's card": frame(theirs, gateway, IPV4, udp4("172.26.0.10", second.port.private_ipv4, 5000, text)),
        "an announcement of another's address": frame("ff:ff:ff:ff:ff:ff", mine, ARP, arp(
            1, mine, third.port.private_ipv4, "00:00:00:00:00:00", third.port.private_ipv4)),
        "an answer for the gateway": frame(theirs, mine, ARP, arp(2, mine, "172.26.0.1", theirs, "172.26.0.11")),
        "a question for the gateway": frame("ff:ff:ff:ff:ff:ff", mine, ARP, arp(
            1, mine, "172.26.0.10", "00:00:00:00:00:00", "172.26.0.1")),
        "IPv6 past the gateway": frame(theirs, mine, 0x86DD, staged.udp6(
            first.port.public_ipv6, second.port.public_ipv6, 5000, text)),
    }
    with second.hears("eth0") as heard:
        for one in bad.values():
            first.says(one)
        first.says(frame(theirs, mine, IPV4, udp4("172.26.0.10", second.port.private_ipv4, 5000, b"this arrives")))
        eventually(lambda: [one for one in heard if b"this arrives" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if one in bad.values() or text in one]


def test_the_underlay_carries_no_questions_for_known_addresses(fleet: Fleet) -> None:
    """The host answers for guests on other hosts; for an address that nobody has, all are asked."""
    first, second, third = guests(fleet)
    with Wire(fleet, 1) as wire:
        for other in (second, third):
            subprocess.run(["ip", "-n", first.namespace, "neigh", "flush", "dev", "eth0"], check=True)
            for _ in range(3):
                first.says(frame("ff:ff:ff:ff:ff:ff", first.port.mac, ARP, arp(
                    1, first.port.mac, "172.26.0.10", "00:00:00:00:00:00", other.port.private_ipv4)))
            assert first.pings(other.port.private_ipv4)
        time.sleep(staged.SILENCE_SECONDS)
        asked = wire.carried(ARP)
        assert wire.carried(IPV4), "the tunnel is what is looked at"
        first.says(frame("ff:ff:ff:ff:ff:ff", first.port.mac, ARP, arp(
            1, first.port.mac, "172.26.0.10", "00:00:00:00:00:00", "172.26.0.99")))
        eventually(lambda: wire.carried(ARP), staged.PATIENCE_SECONDS)
        unknown = wire.carried(ARP)
    print(f"ARP on the underlay: {len(asked)} frames for 2 known addresses asked for 8 times, {len(unknown)} for an unknown")
    assert asked == [] and len(unknown) == 2, "one to each other host"
    assert wire.carried(0x86DD, vni=VNIS[ADA]) == [], "and there is no neighbour discovery between guests at all"


class Wire:
    """What a machine puts on the underlay for its tunnels."""

    def __init__(self, fleet: Fleet, host: int) -> None:
        self._namespace = fleet.stages[host].machine.namespace
        self._frames: list[bytes] = []
        self._ended = threading.Event()

    def __enter__(self) -> Wire:
        self._ear = staged.socket_in(self._namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._ear.bind(("under", 3))
        self._ear.settimeout(0.05)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                taken, told = self._ear.recvfrom(65536)
                if told[2] == socket.PACKET_OUTGOING:
                    self._frames.append(taken)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._ear.close()

    def carried(self, kind: int, vni: int = 0) -> list[bytes]:
        """The inner frames of this type so far (of one network): behind Ethernet, IPv4, UDP and VXLAN, 50 bytes."""
        whole = [one for one in list(self._frames) if one[12:14] == b"\x08\0" and one[23] == socket.IPPROTO_UDP
                 and one[36:38] == struct.pack("!H", 4789) and one[62:64] == struct.pack("!H", kind)]
        return [one[50:] for one in whole if not vni or int.from_bytes(one[46:49]) == vni]


class Probe:
    """Asks a guest at a steady pace, and knows when it did not answer."""

    PAUSE_SECONDS = 0.01

    def __init__(self, asker: staged.Place, address: str, port: int) -> None:
        self._asker = staged.socket_in(asker.namespace, staged.family_of(address), socket.SOCK_DGRAM)
        self._target = (address, port)
        self._ended = threading.Event()
        self._answers: list[float] = []

    def __enter__(self) -> Probe:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._hear)]
        self._asker.settimeout(0.2)
        for thread in self._threads:
            thread.start()
        eventually(lambda: self._answers, staged.PATIENCE_SECONDS, f"an answer from {self._target}")
        return self

    def _ask(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                self._asker.sendto(b"there?", self._target)
            time.sleep(self.PAUSE_SECONDS)

    def _hear(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                self._asker.recv(100)
                self._answers.append(time.monotonic())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._asker.close()

    def answers_since(self, moment: float) -> int:
        return sum(1 for one in list(self._answers) if one > moment)

    def longest_silence(self, since: float) -> float:
        """In seconds, between two answers, from a moment on."""
        heard = [one for one in self._answers if one >= since]
        before = max((one for one in self._answers if one < since), default=since)
        return max(b - a for a, b in zip([before, *heard], heard, strict=False)) if heard else float("inf")


@contextlib.contextmanager
def echoes(guest: Guest, port: int) -> Iterator[None]:
    """The guest answers datagrams."""
    ended = threading.Event()
    with staged.socket_in(guest.namespace, socket.AF_INET6, socket.SOCK_DGRAM) as ear:
        ear.bind(("::", port))
        ear.settimeout(0.2)

        def answer() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    said, asker = ear.recvfrom(100)
                    ear.sendto(said, asker)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def test_a_guest_moves_under_a_steady_probe(fleet: Fleet) -> None:
    """From host 1 to host 3: asked by its neighbours on each of the hosts, by private and public addresses, and from beside.
    Nothing but the target's announcement says where it is."""
    _, second, third = guests(fleet)
    open_ = (*WEB, FirewallRule(protocol="udp", from_port=7, to_port=7))
    moving = fleet.guest(1, msgspec.structs.replace(port(30, ADA), firewall=open_))
    left = fleet.guest(1, port(31, ADA))
    there = moving.port
    asked = {
        "host 1, private": (left, there.private_ipv4), "host 2, private": (second, there.private_ipv4),
        "host 3, private": (third, there.private_ipv4), "host 1, public IPv4": (left, there.public_ipv4),
        "host 3, public IPv4": (third, there.public_ipv4),
        "host 2, public IPv4": (second, there.public_ipv4), "host 3, public IPv6": (third, there.public_ipv6),
        "host 1, public IPv6": (left, there.public_ipv6), "host 2, public IPv6": (second, there.public_ipv6),
        "beside, public IPv4": (fleet.beside, there.public_ipv4), "beside, public IPv6": (fleet.beside, there.public_ipv6)}
    with moving.serves("::", 80), echoes(moving, 7), contextlib.ExitStack() as stack:
        probes = {name: stack.enter_context(Probe(asker, address, 7)) for name, (asker, address) in asked.items()}
        flows = {name: stack.enter_context(asker.connects(address, 80)) for name, (asker, address) in asked.items()}
        lines = {name: flow.makefile() for name, flow in flows.items()}
        for said in lines.values():
            assert said.readline()
        for source, target in ((1, 3), (3, 1)):
            time.sleep(1)
            began = time.monotonic()
            fleet.moves(moving, source, target)
            moved = time.monotonic()
            for probe in probes.values():
                eventually(lambda probe=probe, moved=moved: probe.answers_since(moved) > 100, staged.PATIENCE_SECONDS)
            for name, probe in probes.items():
                print(f"host {source} to {target}, asked from {name}: {1000 * probe.longest_silence(began):.0f} ms")
            for name, flow in flows.items():
                flow.sendall(b"still here\n")
                assert lines[name].readline() == "still here\n", name
            # The documents follow.
            fleet.ports[target] = [msgspec.structs.replace(one, awaited=False) if one.id == there.id else one
                                   for one in fleet.ports[target]]
            fleet.ports[source] = [one for one in fleet.ports[source] if one.id != there.id]
            fleet.apply(target)
            fleet.apply(source)
            settled = time.monotonic()
            for probe in probes.values():
                eventually(lambda probe=probe, since=settled: probe.answers_since(since) > 50, SETTLE_SECONDS)


def cut_off(guest: Guest, other: Guest) -> bool:
    return not guest.pings(other.port.private_ipv4, staged.SILENCE_SECONDS)


def killed(fleet: Fleet, host: int, name: str) -> None:
    """kill -9 of one of the host's FRR."""
    (pid,) = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and runs(
        entry, f"{fleet.folder}/{host}/{name}/")]
    os.kill(pid, signal.SIGKILL)


def runs(process: Path, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return mark in (process / "cmdline").read_bytes().decode(errors="replace")
    return False


def known(fleet: Fleet, host: int, guest: Guest) -> bool:
    """Has the host's data plane the guest for one that is elsewhere?"""
    layout = fleet.stages[host].layout
    told = subprocess.run(["bridge", "-n", layout.namespace, "fdb", "show", "dev", f"vx{VNIS[ADA]}"], capture_output=True,
                          text=True).stdout
    return f"{guest.port.mac} dst" in told


def test_a_zebra_that_is_killed_leaves_what_the_kernel_knows_and_comes_back(fleet: Fleet) -> None:
    first, second, third = guests(fleet)
    with second.serves("0.0.0.0", 5432), first.connects(second.port.private_ipv4, 5432) as flow:
        lines = flow.makefile()
        assert lines.readline()
        killed(fleet, 1, "zebra")
        assert known(fleet, 1, second)
        flow.sendall(b"on we go\n")
        assert lines.readline() == "on we go\n"
        eventually(lambda: "FRRouting" in answer(fleet, 1, "zebra"), SETTLE_SECONDS)
        # It tells what comes from now on.
        later = fleet.guest(3, port(40, ADA))
        eventually(lambda: first.pings(later.port.private_ipv4, 2.0), SETTLE_SECONDS)
        eventually(lambda: known(fleet, 1, second) and first.pings(third.port.private_ipv4, 2.0), SETTLE_SECONDS)
        flow.sendall(b"still\n")
        assert lines.readline() == "still\n"


def answer(fleet: Fleet, host: int, name: str) -> str:
    with contextlib.suppress(SkysailError):
        return fleet.routers[host].ask(name, "show version")
    return ""


def test_a_bgpd_that_is_killed_comes_back_with_all(fleet: Fleet) -> None:
    """Until then the host's guests have each other alone: what its zebra and the other hosts were told goes with it."""
    first, second, _ = guests(fleet)
    beside = fleet.guest(1, port(41, ADA))
    assert first.pings(second.port.private_ipv4)
    with echoes(second, 7), echoes(beside, 7), Probe(first, second.port.private_ipv4, 7) as far, \
            Probe(first, beside.port.private_ipv4, 7) as near:
        began = time.monotonic()
        killed(fleet, 1, "bgpd")
        eventually(lambda: fleet.sessions(1) and known(fleet, 1, second), SETTLE_SECONDS)
        back = time.monotonic()
        eventually(lambda: far.answers_since(back) > 20 and near.answers_since(back) > 20, SETTLE_SECONDS)
        print(f"bgpd killed: {far.longest_silence(began):.1f} s without a guest on another host, "
              f"{near.longest_silence(began):.1f} s without one beside")
    assert first.pings(second.port.private_ipv4) and second.pings(beside.port.private_ipv4)


def established(fleet: Fleet, host: int) -> dict[str, int]:
    """How often each session of the host's came about."""
    told = msgspec.json.decode(fleet.routers[host].ask("bgpd", "show bgp neighbors json"))
    return {name: one.get("connectionsEstablished", 0) for name, one in told.items()}


def test_another_agent_finds_all_as_it_was_and_sessions_outlive_hosts_that_come_and_go(fleet: Fleet) -> None:
    first, second, _ = guests(fleet)
    stage = fleet.stages[1]
    fleet.settles()
    before = established(fleet, 1)
    fleet.routers[1]._wanted = None  # the agent that looked after its FRR is dead
    fleet.routers[1] = fleet.router(1, stage.layout)
    stage.fabric = LinuxFabric(stage.layout, fleet.routers[1])
    with second.serves("0.0.0.0", 5432), first.connects(second.port.private_ipv4, 5432) as flow:
        lines = flow.makefile()
        assert lines.readline()
        fleet.apply(1)
        # A fourth host, which is not there yet; then it is none any more.
        fleet.overlays[1] = overlay(1, *HOSTS, 4)
        fleet.apply(1)
        eventually(lambda: underlay(4) in fleet.routers[1].sessions(), SETTLE_SECONDS)
        during = established(fleet, 1)
        fleet.overlays[1] = overlay(1)
        fleet.apply(1)
        eventually(lambda: set(fleet.routers[1].sessions()) == set(before), SETTLE_SECONDS)
        assert {name: during[name] for name in before} == before == established(fleet, 1)
        flow.sendall(b"still here\n")
        assert lines.readline() == "still here\n"


def test_peered_networks_reach_each_other_across_hosts_until_they_part(fleet: Fleet) -> None:
    here, there, other = fleet.guest(1, port(50, CAT)), fleet.guest(3, port(51, DAN)), fleet.guests["g-21"]
    try:
        assert cut_off(here, there)
        fleet.networks = (*NETWORKS[:2], Network(number=CAT, vni=VNIS[CAT], peers=(DAN,)),
                          Network(number=DAN, vni=VNIS[DAN], peers=(CAT,)))
        for host in HOSTS:
            fleet.apply(host)
        eventually(lambda: here.pings(there.port.private_ipv4, 2.0), SETTLE_SECONDS)
        assert there.pings(here.port.private_ipv4) and cut_off(here, other)
    finally:
        fleet.networks = NETWORKS
        for host in HOSTS:
            fleet.apply(host)
    assert cut_off(here, there) and cut_off(there, here)


def test_a_stranger_on_the_underlay_sends_no_frames_and_a_guest_reaches_no_host(fleet: Fleet) -> None:
    first, second, _ = guests(fleet)
    inner = frame(second.port.mac, first.port.mac, IPV4, udp4("172.26.0.10", second.port.private_ipv4, 5000, b"forged"))
    tunnelled = struct.pack("!II", 1 << 27, VNIS[ADA] << 8) + inner
    with second.hears("eth0") as heard:
        for mouth in (fleet.beside, first):
            with staged.socket_in(mouth.namespace, socket.AF_INET, socket.SOCK_DGRAM) as wire:
                wire.sendto(tunnelled, (underlay(2), 4789))
        assert first.cut_off(underlay(2), 179) and fleet.beside.cut_off(underlay(2), 179)
        first.says(frame(second.port.mac, first.port.mac, IPV4, udp4(
            first.port.private_ipv4, second.port.private_ipv4, 5000, b"honest")))
        eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
        # The same frame from the host that may send it: it is whole.
        with staged.socket_in(fleet.stages[1].machine.namespace, socket.AF_INET, socket.SOCK_DGRAM) as wire:
            wire.sendto(tunnelled, (underlay(2), 4789))
        eventually(lambda: [one for one in heard if b"forged" in one], staged.PATIENCE_SECONDS)
        assert len([one for one in heard if b"forged" in one]) == 1


def test_with_a_reflector_hosts_speak_with_it_alone(fleet: Fleet) -> None:
    first, second, third = guests(fleet)
    fleet.overlays = {host: overlay(host, reflectors=(underlay(2),)) for host in HOSTS}
    try:
        for host in HOSTS:
            fleet.apply(host)
        eventually(lambda: set(fleet.routers[1].sessions()) == {underlay(2)} and fleet.sessions(1), SETTLE_SECONDS)
        eventually(lambda: set(fleet.routers[3].sessions()) == {underlay(2)} and fleet.sessions(3), SETTLE_SECONDS)
        eventually(lambda: first.pings(third.port.private_ipv4, 2.0), SETTLE_SECONDS)
        assert third.pings(second.port.private_ipv4)
    finally:
        fleet.overlays = {host: overlay(host) for host in HOSTS}
        for host in HOSTS:
            fleet.apply(host)
        fleet.settles()


class Router:
    """The operator's, on the underlay: an FRR that speaks BGP with the hosts and puts into its kernel what they tell."""

    SYSTEM, ADDRESS = 64513, "192.0.2.254"

    def __init__(self, fleet: Fleet, mark: str) -> None:
        self.place = staged.Place(f"{mark}r")
        fleet.underlay.joins(self.place, "eth0", self.ADDRESS)
        # Whoever is beside the hosts sends by the router, each time.
        for setting, value in (("ip_forward", "1"), ("conf/all/send_redirects", "0"), ("conf/eth0/send_redirects", "0")):
            self.place.setting(f"ipv4/{setting}", value)
        with fleet.beside.netlink() as ipr:
            ipr.route("replace", dst=Layout.of(Config()).public_pool, gateway=self.ADDRESS)
        folder, account = fleet.folder / "router", pwd.getpwnam(USER)
        folder.mkdir()
        os.chown(folder, account.pw_uid, account.pw_gid)
        settings = [f"router bgp {self.SYSTEM}", f" bgp router-id {self.ADDRESS}", " no bgp ebgp-requires-policy"]
        settings += [f" neighbor {underlay(host)} remote-as {Overlay().autonomous_system}" for host in fleet.hosts]
        (folder / "bgpd.conf").write_text("\n".join(settings) + "\n")
        (folder / "zebra.conf").touch()
        self._running = [subprocess.Popen(
            ["ip", "netns", "exec", self.place.namespace, str(PROGRAMS / name), "-f", str(folder / f"{name}.conf"),
             "-i", f"{folder}/{name}.pid", "-z", f"{folder}/zserv.sock", "--vty_socket", str(folder), "-P", "0",
             "-u", USER, "-g", USER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in ("zebra", "bgpd")]

    def way(self, address: str) -> str:
        """By which host it reaches the address; '' when by none."""
        told = subprocess.run(["ip", "-n", self.place.namespace, "route", "show", f"{address}/32"], capture_output=True,
                              text=True).stdout
        return told.partition(" via ")[2].partition(" ")[0]

    def remove(self) -> None:
        for process in self._running:
            process.terminate()
            process.wait()
        self.place.remove()


@pytest.fixture
def routed() -> Iterator[tuple[Fleet, Router]]:
    """Two hosts whose guests are known by nothing but BGP, with the operator's router beside them."""
    folder = Path(tempfile.mkdtemp(prefix="skyfrr-"))
    folder.chmod(0o755)
    with taken_slot() as slot, contextlib.ExitStack() as stack:
        mark = f"skyp{slot}"
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        made = Fleet(mark, folder, (1, 2), segment="", routers=((Router.ADDRESS, Router.SYSTEM),))
        stack.callback(made.remove)
        router = Router(made, mark)
        stack.callback(router.remove)
        yield made, router


def test_the_operators_router_learns_where_an_address_is_and_follows_it(routed: tuple[Fleet, Router]) -> None:
    fleet, router = routed
    open_ = (*WEB, FirewallRule(protocol="udp", from_port=7, to_port=7))
    stays = fleet.guest(1, port(10, ADA))
    moving = fleet.guest(1, msgspec.structs.replace(port(11, ADA), firewall=open_))
    fleet.apply(2)
    fleet.settles()
    there = moving.port.public_ipv4
    eventually(lambda: router.way(there) == underlay(1), SETTLE_SECONDS)
    assert router.way(stays.port.public_ipv4) == underlay(1), "one route for each"
    with moving.serves("::", 80), echoes(moving, 7), Probe(fleet.beside, there, 7) as probe, \
            fleet.beside.connects(there, 80) as flow:
        lines = flow.makefile()
        assert lines.readline().strip().removeprefix("::ffff:") == "192.0.2.200", "nothing is translated on the way"
        for source, target in ((1, 2), (2, 1)):
            began = time.monotonic()
            fleet.moves(moving, source, target)
            moved = time.monotonic()
            eventually(lambda target=target: router.way(there) == underlay(target), SETTLE_SECONDS)
            eventually(lambda moved=moved: probe.answers_since(moved) > 100, staged.PATIENCE_SECONDS)
            print(f"host {source} to {target}, asked by the router: {1000 * probe.longest_silence(began):.0f} ms")
            flow.sendall(b"still here\n")
            assert lines.readline() == "still here\n"
            fleet.ports[target] = [msgspec.structs.replace(one, awaited=False) for one in fleet.ports[target]]
            fleet.ports[source] = [one for one in fleet.ports[source] if one.id != moving.port.id]
            fleet.apply(target)
            fleet.apply(source)
        assert router.way(stays.port.public_ipv4) == underlay(1)
        # What the guest says first goes out as itself, too.
        with fleet.beside.serves("0.0.0.0", 8080):
            assert moving.reaches("192.0.2.200", 8080) == there
    fleet.ports[1] = [stays.port]
    fleet.apply(1)
    eventually(lambda: router.way(there) == "", SETTLE_SECONDS, "an address that nobody has is told no more")


def test_a_host_that_dies_takes_its_own_guests_alone_and_they_may_begin_anew_elsewhere(fleet: Fleet) -> None:
    """Last: host 3 is off the underlay from here on. Another host has its guest before anybody gave the dead one up."""
    first, second, third = guests(fleet)
    fleet.underlay.cuts(fleet.stages[3].machine)
    assert cut_off(first, third) and first.pings(second.port.private_ipv4)
    with second.serves("::", 80):
        assert first.reaches(second.port.public_ipv6, 80)
    fleet.stages[3].leave(third)
    anew = fleet.guest(2, third.port)
    with anew.serves("::", 80):
        for address in (third.port.private_ipv4, third.port.public_ipv4, third.port.public_ipv6):
            eventually(lambda address=address: first.reaches(address, 80, 2.0), SETTLE_SECONDS)
