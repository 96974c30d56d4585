"""Private networks apart and joined, shown with real packets: with each other, and with a subnet beyond the machine."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

import stage as staged
from clouds import eventually, taken_slot
from skysail.contract.document import FirewallRule, Network, Port
from skysail.kit.config import Config
from skysail.network import Joined, links
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from stage import Guest, Stage, frame, udp4, within

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]
IPV4 = 0x0800
# One account in two regions, and somebody else.
HERE, THERE, ELSE = 1, 2, 3
SUBNET, GATEWAY = "203.0.113.0/24", "203.0.113.1"  # the stranger's


def port(number: int, network: int) -> Port:
    return Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network, private_ipv4=f"172.26.0.{number}",
                public_ipv4=f"100.115.93.{number}", firewall=(FirewallRule(protocol="tcp", from_port=80, to_port=80),))


PORTS = (port(10, HERE), port(11, THERE), port(12, ELSE))
PEERED = (Network(number=HERE, peers=(THERE,), routed=True), Network(number=THERE, peers=(HERE,), routed=True))


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with taken_slot() as slot:
        layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"skystage{slot}", peer_subnets=(SUBNET,))
        made = Stage(f"skystage{slot}", layout)
        try:
            made.apply(*PORTS)
            for one in PORTS:
                made.guest(one)
            for outside, gateway in ((made.stranger, GATEWAY), (made.world, staged.MACHINE)):
                with outside.netlink() as ipr:
                    ipr.route("add", dst=layout.private_network, gateway=gateway)
            yield made
        finally:
            made.remove()


@pytest.fixture
def guests(stage: Stage) -> tuple[Guest, Guest, Guest]:
    """A guest here, one of the same account there, and somebody else's; nothing is peered."""
    stage.apply(*PORTS)
    here, there, other = stage.guests
    return here, there, other


def test_networks_are_apart_until_both_are_peered(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, there, other = guests
    with here.serves("0.0.0.0", 5432):
        for networks in ((), (Network(number=HERE, routed=True),), (Network(number=THERE, routed=True),)):
            stage.apply(*PORTS, networks=networks)
            assert there.cut_off(here.port.private_ipv4, 5432) and not there.pings(here.port.private_ipv4, 1.0), networks
        stage.apply(*PORTS, networks=PEERED)
        assert there.reaches(here.port.private_ipv4, 5432) == there.port.private_ipv4
        assert here.pings(there.port.private_ipv4)
        assert other.cut_off(here.port.private_ipv4, 5432) and not other.pings(here.port.private_ipv4, 1.0)
        assert not here.pings(other.port.private_ipv4, staged.SILENCE_SECONDS)


def test_a_peered_network_and_the_subnet_reach_each_other_without_translation(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, there, other = guests
    with here.serves("0.0.0.0", 5432), there.serves("0.0.0.0", 5432), other.serves("0.0.0.0", 5432), \
            stage.stranger.serves(staged.STRANGER, 9000), stage.world.serves(staged.WORLD, 9000):
        assert stage.stranger.cut_off(here.port.private_ipv4, 5432)
        assert here.reaches(staged.STRANGER, 9000) == GATEWAY, "translated, as to anywhere"
        stage.apply(*PORTS, networks=(Network(number=HERE, routed=True),))
        assert stage.stranger.reaches(here.port.private_ipv4, 5432) == staged.STRANGER, "past the firewall"
        assert stage.stranger.pings(here.port.private_ipv4)
        assert here.reaches(staged.STRANGER, 9000) == here.port.private_ipv4
        assert here.pings(staged.STRANGER)
        # Nothing else changes: the public address, other networks, other places.
        assert stage.stranger.cut_off(here.port.public_ipv4, 5432)
        for unpeered in (there, other):
            assert stage.stranger.cut_off(unpeered.port.private_ipv4, 5432)
            assert unpeered.reaches(staged.STRANGER, 9000) == GATEWAY
        assert stage.world.cut_off(here.port.private_ipv4, 5432), "no peer subnet"
        assert here.reaches(staged.WORLD, 9000) == staged.MACHINE
        stage.apply(*PORTS)
        assert stage.stranger.cut_off(here.port.private_ipv4, 5432)
        assert here.reaches(staged.STRANGER, 9000) == GATEWAY


def test_the_public_address_goes_on_as_before(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, there, _ = guests
    stage.apply(*PORTS, networks=PEERED)
    with here.serves("0.0.0.0", 80):
        assert stage.stranger.reaches(here.port.public_ipv4, 80) == staged.STRANGER
        assert there.reaches(here.port.public_ipv4, 80) == there.port.public_ipv4


def test_unpeering_cuts_what_is_open_and_leaves_the_rest(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, there, _ = guests
    stranger, private = stage.stranger, here.port.private_ipv4
    with stranger.serves(staged.STRANGER, 9000), here.serves("0.0.0.0", 5432), here.serves("0.0.0.0", 80), \
            here.connects(staged.STRANGER, 9000) as translated, stranger.connects(here.port.public_ipv4, 80) as public:
        stage.apply(*PORTS, networks=PEERED)
        with stranger.connects(private, 5432) as inward, here.connects(staged.STRANGER, 9000) as outward, \
                there.connects(private, 5432) as sideways:
            lines = {flow: flow.makefile() for flow in (inward, outward, sideways, translated, public)}
            for flow, said in lines.items():
                assert said.readline().strip()
                flow.sendall(b"peered\n")
                assert said.readline() == "peered\n"
            stage.apply(*PORTS)
            for flow in (inward, outward, sideways):
                flow.settimeout(staged.SILENCE_SECONDS)
                with pytest.raises(OSError):  # silence, or a reset
                    flow.sendall(b"parted\n")
                    flow.recv(100)
            for flow in (translated, public):
                flow.sendall(b"still here\n")
                assert lines[flow].readline() == "still here\n"


def test_a_guest_that_goes_on_from_the_same_port_is_translated_again(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, _, _ = guests

    with staged.socket_in(stage.stranger.namespace, socket.AF_INET, socket.SOCK_DGRAM) as ear, \
            staged.socket_in(here.namespace, socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        ear.bind((staged.STRANGER, 9001))
        mouth.bind((here.port.private_ipv4, 123))
        for end in (ear, mouth):
            end.settimeout(staged.PATIENCE_SECONDS)

        def seen() -> str:
            """Who a datagram is from, which is answered."""
            mouth.sendto(b"what time is it?", (staged.STRANGER, 9001))
            _, sender = ear.recvfrom(100)
            ear.sendto(b"late", sender)
            assert mouth.recv(100) == b"late"
            return str(sender[0])
        stage.apply(*PORTS, networks=PEERED)
        assert seen() == here.port.private_ipv4
        stage.apply(*PORTS)
        assert seen() == GATEWAY


def test_a_peered_guest_reaches_nothing_of_the_machine(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, _, _ = guests
    stage.apply(*PORTS, networks=PEERED)
    with stage.machine.serves("0.0.0.0", 8700):
        for address in (GATEWAY, staged.MACHINE, str(stage.layout.machine_address)):
            assert stage.machine.reaches(address, 8700), "it is there"
            assert here.cut_off(address, 8700)


def test_nobody_elsewhere_passes_for_the_subnet(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, there, _ = guests
    stage.apply(*PORTS, networks=PEERED)
    with stage.world.netlink() as ipr:
        mine = ipr.get_links(ipr.link_lookup(ifname="eth0")[0])[0].get_attr("IFLA_ADDRESS")
    with stage.machine.netlink() as ipr:
        theirs = ipr.get_links(ipr.link_lookup(ifname="out-w")[0])[0].get_attr("IFLA_ADDRESS")
    private = here.port.private_ipv4
    with here.hears(here.card) as heard, staged.socket_in(stage.world.namespace, socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind(("eth0", 0))
        for source in (staged.STRANGER, there.port.private_ipv4, staged.WORLD):
            mouth.send(frame(theirs, mine, IPV4, udp4(source, private, 5000, b"forged")))
        with staged.socket_in(stage.stranger.namespace, socket.AF_INET, socket.SOCK_DGRAM) as honest:
            honest.sendto(b"honest", (private, 5000))
            eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if b"forged" in one]


def test_the_fabric_sees_who_is_let_through(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    assert len(guests) == 3

    def seen() -> Joined:
        return within(stage.machine.namespace, stage.fabric.joined)
    assert seen() == Joined(reached_by={"g-10": (HERE,), "g-11": (THERE,), "g-12": (ELSE,)}, routed=())
    stage.apply(*PORTS, networks=PEERED)
    assert seen() == Joined(reached_by={"g-10": (HERE, THERE), "g-11": (HERE, THERE), "g-12": (ELSE,)},
                            routed=("g-10", "g-11"))


def test_without_peer_subnets_the_machine_has_no_route_to_private_addresses(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    here, _, _ = guests

    def routed() -> bool:
        with stage.machine.netlink() as ipr:
            return any(f"{route.get_attr('RTA_DST')}/{route['dst_len']}" == stage.layout.private_network
                       for route in ipr.get_routes(family=socket.AF_INET, table=254))
    stage.apply(*PORTS, networks=PEERED)
    assert routed()
    with here.serves("0.0.0.0", 5432), stage.stranger.connects(here.port.private_ipv4, 5432) as flow:
        flow.makefile().readline()
        bare = LinuxFabric(msgspec.structs.replace(stage.layout, peer_subnets=()))
        links.inside(stage.machine.namespace, lambda: asyncio.run(bare.apply(PORTS, PEERED)))
        assert not routed()
        flow.settimeout(staged.SILENCE_SECONDS)
        flow.sendall(b"parted\n")
        with pytest.raises(OSError, match="timed out"):
            flow.recv(100)
    stage.apply(*PORTS)
    assert routed()
