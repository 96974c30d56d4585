"""What guests' packets may do, shown with real packets on a stage of namespaces; see tests/stage.py."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

import stage as staged
from clouds import eventually, taken_slot
from skysail.contract.document import FirewallRule, Port
from skysail.kit.config import Config
from skysail.network import links
from skysail.network.plan import Layout
from stage import Guest, Stage, arp, frame, udp4, within

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]
IPV4, ARP = 0x0800, 0x0806
DEFAULTS = (FirewallRule(protocol="tcp", from_port=22, to_port=22), FirewallRule(protocol="tcp", from_port=80, to_port=80))
ADA, BOB = 1, 2  # tenants


def port(number: int, network: int, *rules: FirewallRule) -> Port:
    return Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network, private_ipv4=f"172.26.0.{number}",
                public_ipv4=f"100.115.93.{number}", public_ipv6=f"fd53:6b79:7361::{number:x}", firewall=rules)


PORTS = (port(10, ADA, *DEFAULTS), port(11, ADA, *DEFAULTS), port(12, BOB, *DEFAULTS))


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with taken_slot() as slot:
        made = Stage(f"skystage{slot}", msgspec.structs.replace(Layout.of(Config()), namespace=f"skystage{slot}"))
        try:
            made.apply(*PORTS)
            for one in PORTS:
                made.guest(one)
            yield made
        finally:
            made.remove()


@pytest.fixture
def guests(stage: Stage) -> tuple[Guest, Guest, Guest]:
    """Two guests of one tenant and one of another, with the default firewall."""
    stage.apply(*PORTS)
    first, second, other = stage.guests[:3]
    return first, second, other


def public(port: Port, version: int) -> str:
    return port.public_ipv6 if version == 6 else port.public_ipv4


def with_rules(number: int, *rules: FirewallRule) -> tuple[Port, ...]:
    return tuple(msgspec.structs.replace(one, firewall=rules) if one.id == f"g-{number}" else one for one in PORTS)


def test_the_default_ports_are_open_and_no_others(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, _ = guests
    for number in (22, 80):
        with first.serves("0.0.0.0", number):
            assert stage.stranger.reaches(first.port.public_ipv4, number) == staged.STRANGER, "the source is kept"
            assert stage.machine.reaches(first.port.public_ipv4, number), "the machine itself gets in like anyone"
    for number in (21, 23, 443, 8700):
        with first.serves("0.0.0.0", number):
            assert first.reaches("127.0.0.1", number), "it is there"
            assert stage.stranger.cut_off(first.port.public_ipv4, number)
    assert not stage.stranger.pings(first.port.public_ipv4, staged.SILENCE_SECONDS)


def test_a_changed_rule_acts_at_once(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, _ = guests
    address = first.port.public_ipv4
    with first.serves("0.0.0.0", 443), first.serves("0.0.0.0", 80):
        assert stage.stranger.cut_off(address, 443) and stage.stranger.reaches(address, 80)
        stage.apply(*with_rules(10, FirewallRule(protocol="tcp", from_port=443, to_port=443)))
        assert stage.stranger.reaches(address, 443) and stage.stranger.cut_off(address, 80)
        stage.apply(*with_rules(10, FirewallRule(
            protocol="tcp", from_port=1, to_port=65535, cidrs=(f"{staged.STRANGER}/32",))))
        assert stage.stranger.reaches(address, 443) and stage.machine.cut_off(address, 443)
        stage.apply(*with_rules(10))
        assert stage.stranger.cut_off(address, 443)
        stage.apply(*with_rules(10, FirewallRule(protocol="icmp", from_port=8, to_port=-1)))
        assert stage.stranger.pings(address)
        stage.apply(*with_rules(10, FirewallRule(protocol="all", from_port=0, to_port=65535)))
        assert stage.stranger.pings(address) and stage.stranger.reaches(address, 80)


def test_rules_that_another_program_took_are_put_back_by_the_next_change(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, _ = guests
    with first.serves("0.0.0.0", 80):
        assert stage.stranger.reaches(first.port.public_ipv4, 80)
        links.inside(stage.layout.namespace, lambda: links.load("flush ruleset\n"))
        stage.apply(*with_rules(11, FirewallRule(protocol="tcp", from_port=443, to_port=443)))
        assert stage.stranger.reaches(first.port.public_ipv4, 80)
        assert stage.stranger.cut_off(first.port.public_ipv4, 81)
        links.inside(stage.layout.namespace, lambda: links.load("flush ruleset\n"))
        stage.apply(*with_rules(11, FirewallRule(protocol="tcp", from_port=443, to_port=443)))
        assert stage.stranger.reaches(first.port.public_ipv4, 80), "without a change, too"


@pytest.mark.parametrize("version", [4, 6])
def test_flows_survive_a_reload(stage: Stage, guests: tuple[Guest, Guest, Guest], version: int) -> None:
    first, _, other = guests
    world = staged.WORLD6 if version == 6 else staged.WORLD
    with first.serves("::", 80), stage.world.serves(world, 9000), \
            stage.stranger.connects(public(first.port, version), 80) as inward, other.connects(world, 9000) as outward:
        flows = [(flow, flow.makefile()) for flow in (inward, outward)]
        for _, lines in flows:
            assert lines.readline().strip()
        for number in range(5):
            # Another instance's rules change, ports come and go, then the flow's own rules change.
            stage.apply(*with_rules(11, FirewallRule(protocol="tcp", from_port=1000 + number, to_port=1000 + number)))
            stage.apply(*PORTS, port(20 + number, BOB))
            stage.apply(*with_rules(10))
            for flow, lines in flows:
                flow.sendall(b"still here\n")
                assert lines.readline() == "still here\n"


@pytest.mark.parametrize("lost", [4, 6])
def test_what_a_port_keeps_goes_on_when_it_loses_the_other(
        stage: Stage, guests: tuple[Guest, Guest, Guest], lost: int) -> None:
    first, _, _ = guests
    kept = 10 - lost
    less = tuple(msgspec.structs.replace(one, **{f"public_ipv{lost}": ""}) if one.id == "g-10" else one for one in PORTS)
    world = staged.WORLD6 if kept == 6 else staged.WORLD
    with first.serves("::", 80), stage.world.serves(world, 9000), contextlib.ExitStack() as flows:
        going_on = [flows.enter_context(stage.stranger.connects(public(first.port, kept), 80)),
                    flows.enter_context(first.connects(world, 9000))]
        ending = flows.enter_context(stage.stranger.connects(public(first.port, lost), 80))
        lines = [(flow, flow.makefile()) for flow in going_on]
        assert all(told.readline().strip() for _, told in lines) and ending.recv(100)
        stage.apply(*less)
        for flow, told in lines:
            flow.sendall(b"still here\n")
            assert told.readline() == "still here\n"
        ending.sendall(b"and you?\n")
        ending.settimeout(staged.SILENCE_SECONDS)
        with pytest.raises(OSError):
            ending.recv(100)
        assert stage.stranger.cut_off(public(first.port, lost), 80)
        assert stage.stranger.reaches(public(first.port, kept), 80)
        stage.apply(*PORTS)
        assert stage.stranger.reaches(public(first.port, lost), 80), "and back"


def test_a_port_without_a_public_ipv4_address_is_among_its_own(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, second, other = guests
    stage.apply(*(msgspec.structs.replace(one, public_ipv4="") if one.id == "g-10" else one for one in PORTS))
    try:
        with stage.world.serves(staged.WORLD, 9000), second.serves("0.0.0.0", 80), other.serves("0.0.0.0", 80), \
                first.serves("0.0.0.0", 5432):
            for address, number in ((staged.WORLD, 9000), (second.port.public_ipv4, 80), (other.port.public_ipv4, 80)):
                with pytest.raises(OSError) as told:
                    first.connects(address, number).close()
                assert told.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH), "it need not wait"
            assert second.reaches(first.port.private_ipv4, 5432) == second.port.private_ipv4
            assert first.reaches(second.port.private_ipv4, 80) == first.port.private_ipv4
            assert other.cut_off(first.port.private_ipv4, 5432)
            assert stage.stranger.cut_off("100.115.93.10", 80)
        with stage.world.serves(staged.WORLD6, 9000):
            assert first.reaches(staged.WORLD6, 9000)
    finally:
        stage.apply(*PORTS)


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_goes_takes_its_flows_along(
        stage: Stage, guests: tuple[Guest, Guest, Guest], version: int) -> None:
    """The next owner of its addresses must not get packets of connections that were none of his."""
    newcomer = port(20, ADA, *DEFAULTS)
    stage.apply(*PORTS, newcomer)
    guest = stage.guest(newcomer)
    with guest.serves("::", 80), stage.stranger.connects(public(newcomer, version), 80) as flow:
        lines = flow.makefile()
        assert lines.readline().strip().endswith(staged.STRANGER6 if version == 6 else staged.STRANGER)
        stage.apply(*PORTS)
        heir = msgspec.structs.replace(newcomer, network=BOB, id="g-heir", firewall=())
        stage.leave(guest)
        stage.apply(*PORTS, heir)
        second = stage.guest(heir)
        with second.hears(second.card) as heard:
            flow.sendall(b"is this still you?\n")
        assert not [one for one in heard if b"is this still you?" in one]
        stage.leave(second)


def test_tenants_are_apart_and_their_own_guests_together(guests: tuple[Guest, Guest, Guest]) -> None:
    first, second, other = guests
    with first.serves("0.0.0.0", 5432):
        assert second.reaches(first.port.private_ipv4, 5432) == second.port.private_ipv4, "no firewall among one's own"
        assert second.pings(first.port.private_ipv4)
        assert other.cut_off(first.port.private_ipv4, 5432)
        assert not other.pings(first.port.private_ipv4, staged.SILENCE_SECONDS)


def test_another_tenant_does_not_get_in_by_the_gateway_or_by_a_known_mac(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, other = guests
    text = b"past the bridge"
    packet = udp4(other.port.private_ipv4, first.port.private_ipv4, 5000, text)
    with first.hears(first.card) as heard:
        other.says(frame(stage.layout.gateway_mac, other.port.mac, IPV4, packet))
        other.says(frame(first.port.mac, other.port.mac, IPV4, packet))
        other.says(frame("ff:ff:ff:ff:ff:ff", other.port.mac, IPV4, packet))
        other.says(frame("01:00:5e:00:00:01", other.port.mac, IPV4, packet))
        other.says(frame("ff:ff:ff:ff:ff:ff", other.port.mac, ARP, arp(
            1, other.port.mac, other.port.private_ipv4, "00:00:00:00:00:00", first.port.private_ipv4)))
    assert heard == []


def test_forged_senders_are_dropped(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    """From a guest to another of the same tenant, to which its honest packets do get."""
    first, second, other = guests
    stolen = "172.26.0.99"
    honest = udp4(first.port.private_ipv4, second.port.private_ipv4, 5000, b"honest")
    mine, theirs, to = first.port.mac, other.port.mac, second.port.mac
    forged = {
        "source MAC": frame(to, theirs, IPV4, honest),
        "source IP": frame(to, mine, IPV4, udp4(stolen, second.port.private_ipv4, 5000, b"forged")),
        "a neighbour's IP": frame(to, mine, IPV4, udp4(other.port.private_ipv4, second.port.private_ipv4, 5000, b"forged")),
        "the gateway's IP": frame(to, mine, IPV4, udp4(str(stage.layout.gateway), second.port.private_ipv4, 5000, b"forged")),
        "no IP": frame(to, mine, IPV4, udp4("0.0.0.0", second.port.private_ipv4, 5000, b"forged")),
        "ARP sender IP": frame(to, mine, ARP, arp(2, mine, stolen, to, second.port.private_ipv4)),
        "ARP for the gateway": frame("ff:ff:ff:ff:ff:ff", mine, ARP, arp(
            2, mine, str(stage.layout.gateway), to, second.port.private_ipv4)),
        "ARP sender MAC": frame(to, mine, ARP, arp(2, theirs, first.port.private_ipv4, to, second.port.private_ipv4)),
        "ARP source MAC": frame(to, theirs, ARP, arp(2, mine, first.port.private_ipv4, to, second.port.private_ipv4)),
        "gratuitous ARP": frame("ff:ff:ff:ff:ff:ff", mine, ARP, arp(1, mine, stolen, "00:00:00:00:00:00", stolen)),
        "VLAN": frame(to, mine, 0x8100, b"\0\x01\x08\0" + honest),
        "VLAN with a forged source": frame(to, mine, 0x8100, b"\0\x01\x08\0" + udp4(
            stolen, second.port.private_ipv4, 5000, b"forged")),
        "STP": frame("01:80:c2:00:00:00", mine, 0x0026, b"\x42\x42\x03" + bytes(35)),
        "LLDP": frame("01:80:c2:00:00:0e", mine, 0x88CC, bytes(40)),
        "802.3": frame(to, mine, 0x0026, b"\xaa\xaa\x03\0\0\0\x08\0" + honest),
    }
    with second.hears(second.card) as heard:
        for bad in forged.values():
            first.says(bad)
        first.says(frame(to, mine, IPV4, honest))
        eventually(lambda: frame(to, mine, IPV4, honest) in heard, staged.PATIENCE_SECONDS, "the honest packet arrives")
    passed = [name for name, bad in forged.items() if bad in heard]
    assert passed == []
    assert first.pings(second.port.private_ipv4) and other.pings(str(stage.layout.gateway)), "and nobody was harmed"


def test_a_forged_source_does_not_leave_the_machine(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, other = guests
    with stage.world.hears("eth0") as heard:
        for source in ("8.8.8.8", other.port.private_ipv4, other.port.public_ipv4, staged.MACHINE, "127.0.0.1"):
            first.says(frame(stage.layout.gateway_mac, first.port.mac, IPV4, udp4(source, staged.WORLD, 53, b"forged")))
        first.says(frame(stage.layout.gateway_mac, first.port.mac, IPV4, udp4(
            first.port.private_ipv4, staged.WORLD, 53, b"honest")))
        eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if b"forged" in one]


def test_a_guest_reaches_nothing_of_the_machine(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, _ = guests
    machine, layout = stage.machine, stage.layout
    machine.address("lo", "169.254.169.254", 32)
    addresses = [str(layout.machine_address), staged.MACHINE, "203.0.113.1", "169.254.169.254", "127.0.0.1"]
    for number in (22, 8700):  # a service of the machine, and the controller's own port
        with machine.serves("0.0.0.0", number):
            for address in addresses:
                assert machine.reaches(address, number), "it is there"
                assert first.cut_off(address, number), f"{address} port {number} answered a guest"
    assert stage.stranger.reaches(staged.MACHINE, 8700) == "", "nothing is left over"
    for address in addresses[:-1]:
        assert not first.pings(address, staged.SILENCE_SECONDS)
    with stage.machine.hears(layout.link) as heard:
        for target in (str(layout.machine_address), staged.MACHINE):
            first.says(frame(layout.gateway_mac, first.port.mac, IPV4, udp4(first.port.private_ipv4, target, 53, b"dns?")))
    assert [one for one in heard if b"dns?" in one], "it came as far as the machine's door"


def test_a_machines_metadata_is_not_for_guests(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    """Where the machine is itself somebody's guest, its credentials are at 169.254.169.254."""
    first, _, _ = guests
    stage.world.address("lo", "169.254.169.254", 32)
    with stage.machine.netlink() as ipr:
        for index in ipr.link_lookup(ifname="lo"):
            ipr.flush_addr(index=index, address="169.254.169.254")
        ipr.route("replace", dst="169.254.169.254/32", gateway=staged.WORLD)
    with stage.world.serves("169.254.169.254", 80):
        assert stage.machine.reaches("169.254.169.254", 80) == staged.MACHINE
        assert first.cut_off("169.254.169.254", 80)


def test_a_guest_reaches_the_world_by_the_machines_address(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, other = guests
    with stage.world.serves(staged.WORLD, 9000), stage.stranger.serves(staged.STRANGER, 9000):
        assert first.reaches(staged.WORLD, 9000) == staged.MACHINE
        assert other.reaches(staged.STRANGER, 9000) == "203.0.113.1"
    assert first.pings(staged.WORLD)


def test_guests_meet_by_their_public_addresses_through_the_firewall(
        stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, second, other = guests
    with first.serves("0.0.0.0", 80), first.serves("0.0.0.0", 443):
        assert other.reaches(first.port.public_ipv4, 80) == other.port.public_ipv4
        assert second.reaches(first.port.public_ipv4, 80) == second.port.public_ipv4
        assert first.reaches(first.port.public_ipv4, 80) == first.port.public_ipv4, "also to itself"
        assert other.cut_off(first.port.public_ipv4, 443)
        # A rule names its clients by the addresses that the world sees them by.
        stage.apply(*with_rules(10, FirewallRule(
            protocol="tcp", from_port=443, to_port=443, cidrs=(f"{other.port.public_ipv4}/32",))))
        assert other.reaches(first.port.public_ipv4, 443) == other.port.public_ipv4
        assert second.cut_off(first.port.public_ipv4, 443)
        stage.apply(*with_rules(10, FirewallRule(
            protocol="tcp", from_port=443, to_port=443, cidrs=(stage.layout.private_network,))))
        assert other.cut_off(first.port.public_ipv4, 443)


def test_the_gateway_answers_pings_and_nothing_else(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, _, _ = guests
    gateway = str(stage.layout.gateway)
    inner = staged.Place.__new__(staged.Place)
    inner.namespace = stage.layout.namespace
    with inner.serves("0.0.0.0", 179):
        assert first.pings(gateway)
        assert inner.reaches(gateway, 179), "it is there"
        for address in (gateway, str(stage.layout.namespace_address)):
            assert first.cut_off(address, 179)
        assert stage.machine.cut_off(str(stage.layout.namespace_address), 179)


def test_nobody_outside_passes_for_a_guest(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, second, _ = guests
    stage.apply(*with_rules(10, FirewallRule(
        protocol="udp", from_port=5000, to_port=5000, cidrs=(f"{second.port.public_ipv4}/32", f"{staged.STRANGER}/32"))))
    with stage.stranger.netlink() as ipr:
        mine = ipr.get_links(ipr.link_lookup(ifname="eth0")[0])[0].get_attr("IFLA_ADDRESS")
    with stage.machine.netlink() as ipr:
        theirs = ipr.get_links(ipr.link_lookup(ifname="out-s")[0])[0].get_attr("IFLA_ADDRESS")
    with first.hears(first.card) as heard, \
            staged.socket_in(stage.stranger.namespace, socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind(("eth0", 0))
        for source in (second.port.public_ipv4, second.port.private_ipv4):
            mouth.send(frame(theirs, mine, IPV4, udp4(source, first.port.public_ipv4, 5000, b"forged")))
        mouth.send(frame(theirs, mine, IPV4, udp4(staged.STRANGER, first.port.public_ipv4, 5000, b"honest")))
        eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if b"forged" in one]


def test_bytes_are_counted_as_the_guest_sees_them(stage: Stage, guests: tuple[Guest, Guest, Guest]) -> None:
    first, second, _ = guests

    def counted(guest: Guest) -> tuple[int, int]:
        seen = within(stage.machine.namespace, stage.fabric.observe)[guest.port.id]
        return seen.rx_bytes, seen.tx_bytes

    with stage.world.serves(staged.WORLD, 9000), first.connects(staged.WORLD, 9000) as flow:
        lines = flow.makefile()
        assert lines.readline()
        before, idle = counted(first), counted(second)
        flow.sendall(b"x" * 300_000 + b"\n")
        assert len(lines.readline()) == 300_001
        after, still = counted(first), counted(second)
    assert 300_000 <= after[1] - before[1] < 400_000, "sent"
    assert 300_000 <= after[0] - before[0] < 400_000, "received"
    assert still[0] - idle[0] < 10_000 and still[1] - idle[1] < 10_000
