"""What guests' IPv6 packets may do: routed to their own public addresses, and no neighbours but the gateway."""

from __future__ import annotations

import os
import socket

import msgspec
import pytest

import stage as staged
from clouds import eventually, taken_slot
from skysail.contract.document import FirewallRule
from skysail.kit.config import Config
from skysail.network import links
from skysail.network.linux import LinuxFabric
from skysail.network.plan import GATEWAY_IPV6, Layout, link_local
from stage import Guest, Stage, advert6, frame, packet6, router6, solicit6, udp6
from test_packets import ADA, PORTS, guests, port, stage, with_rules

__all__ = ["guests", "stage"]  # the fixtures
pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]
IPV6 = 0x86DD
Three = tuple[Guest, Guest, Guest]


def opened(protocol: str, first: int, last: int, *blocks: str) -> FirewallRule:
    """Open to these IPv6 blocks, and to nobody in IPv4."""
    return FirewallRule(protocol=protocol, from_port=first, to_port=last, cidrs=(), ipv6_cidrs=blocks)


def test_the_default_ports_are_open_and_no_others(stage: Stage, guests: Three) -> None:
    first, _, _ = guests
    address = first.port.public_ipv6
    with first.serves("::", 22), first.serves("::", 443):
        assert stage.stranger.reaches(address, 22) == staged.STRANGER6, "the source is kept"
        assert stage.machine.reaches(address, 22) == str(stage.layout.machine_ipv6)
        assert first.reaches("::1", 443), "it is there"
        assert stage.stranger.cut_off(address, 443) and stage.machine.cut_off(address, 443)
    assert not stage.stranger.pings(address, staged.SILENCE_SECONDS)


def test_rules_of_ipv6_are_their_own(stage: Stage, guests: Three) -> None:
    first, _, _ = guests
    address = first.port.public_ipv6
    with first.serves("::", 443):
        stage.apply(*with_rules(10, opened("tcp", 443, 443, "::/0")))
        assert stage.stranger.reaches(address, 443) and stage.stranger.cut_off(first.port.public_ipv4, 443)
        stage.apply(*with_rules(10, FirewallRule(protocol="tcp", from_port=443, to_port=443, ipv6_cidrs=())))
        assert stage.stranger.cut_off(address, 443) and stage.stranger.reaches(first.port.public_ipv4, 443)
        stage.apply(*with_rules(10, opened("tcp", 1, 65535, f"{staged.STRANGER6}/128")))
        assert stage.stranger.reaches(address, 443) and stage.machine.cut_off(address, 443)
        stage.apply(*with_rules(10, opened("icmpv6", 128, -1, "::/0")))
        assert stage.stranger.pings(address) and stage.stranger.cut_off(address, 443)
        stage.apply(*with_rules(10, opened("icmpv6", 1, -1, "::/0"), opened("udp", 0, 65535, "::/0")))
        assert not stage.stranger.pings(address, staged.SILENCE_SECONDS) and stage.stranger.cut_off(address, 443)
        stage.apply(*with_rules(10, opened("all", 0, 65535, "2001:db8::/32")))
        assert stage.stranger.pings(address) and stage.stranger.reaches(address, 443)


def test_a_guest_reaches_the_world_by_the_machines_address(stage: Stage, guests: Three) -> None:
    first, _, other = guests
    with stage.world.serves(staged.WORLD6, 9000), stage.stranger.serves(staged.STRANGER6, 9000):
        assert first.reaches(staged.WORLD6, 9000) == staged.MACHINE6, "a unique local address means nothing out there"
        assert other.reaches(staged.STRANGER6, 9000) == "2001:db8:2::1"
    assert first.pings(staged.WORLD6) and first.pings(str(stage.layout.namespace_ipv6))


def test_guests_meet_through_the_firewall_alone(stage: Stage, guests: Three) -> None:
    """IPv6 addresses are public ones: those of one's own tenant too."""
    first, second, other = guests
    address = first.port.public_ipv6
    with second.hears(second.card) as heard, first.serves("::", 80), first.serves("::", 443):
        for guest in (second, other):
            assert guest.reaches(address, 80) == guest.port.public_ipv6
            assert guest.cut_off(address, 443)
            assert not guest.pings(address, staged.SILENCE_SECONDS)
        for _ in range(5):
            assert second.reaches(address, 80)
        assert first.reaches(address, 80)
        stage.apply(*with_rules(10, opened("tcp", 443, 443, f"{other.port.public_ipv6}/128")))
        assert other.reaches(address, 443) and second.cut_off(address, 443)
    redirects = [one for one in heard if one[12:14] == b"\x86\xdd" and one[20] == socket.IPPROTO_ICMPV6 and one[54] == 137]
    assert redirects == [], "nobody is told a way past the gateway"


def test_nothing_but_honest_packets_for_the_gateway_leaves_a_guest(stage: Stage, guests: Three) -> None:
    first, second, other = guests
    stage.apply(*with_rules(11, FirewallRule(protocol="all", from_port=0, to_port=65535)))
    mine, me, mine_here = first.port.mac, first.port.public_ipv6, str(link_local(first.port.mac))
    to, them, them_here = second.port.mac, second.port.public_ipv6, str(link_local(second.port.mac))
    gateway, door = stage.layout.gateway_mac, str(GATEWAY_IPV6)
    text = b"this must not arrive"
    bad = {
        "a stolen source": frame(gateway, mine, IPV6, udp6(other.port.public_ipv6, them, 5000, text)),
        "an unknown source": frame(gateway, mine, IPV6, udp6("fd53:6b79:7361::99", them, 5000, text)),
        "a source from elsewhere": frame(gateway, mine, IPV6, udp6(staged.STRANGER6, them, 5000, text)),
        "no source": frame(gateway, mine, IPV6, udp6("::", them, 5000, text)),
        "the machine's source": frame(gateway, mine, IPV6, udp6(str(stage.layout.machine_ipv6), them, 5000, text)),
        "a link-local source": frame(gateway, mine, IPV6, udp6(mine_here, them, 5000, text)),
        "a stolen MAC": frame(gateway, other.port.mac, IPV6, udp6(me, them, 5000, text)),
        "past the gateway": frame(to, mine, IPV6, udp6(me, them, 5000, text)),
        "past the gateway, link-local": frame(to, mine, IPV6, udp6(mine_here, them_here, 5000, text)),
        "to everybody": frame("33:33:00:00:00:01", mine, IPV6, udp6(mine_here, "ff02::1", 5000, text)),
        "to everybody by broadcast": frame("ff:ff:ff:ff:ff:ff", mine, IPV6, udp6(me, them, 5000, text)),
        "mDNS": frame("33:33:00:00:00:fb", mine, IPV6, udp6(mine_here, "ff02::fb", 5353, text)),
        "a VLAN": frame(gateway, mine, 0x8100, b"\0\x01\x86\xdd" + udp6(me, them, 5000, text)),
        "an advertisement of the gateway": frame(to, mine, IPV6, advert6(mine_here, them_here, door, mine)),
        "an advertisement to all": frame("33:33:00:00:00:01", mine, IPV6, advert6(mine_here, "ff02::1", door, mine)),
        "an advertisement of a neighbour": frame(gateway, mine, IPV6, advert6(mine_here, door, them, mine)),
        "the same, from a public address": frame(gateway, mine, IPV6, advert6(me, door, them, mine)),
        "a router advertisement": frame("33:33:00:00:00:01", mine, IPV6, router6(mine_here, "ff02::1")),
        "one to a neighbour": frame(to, mine, IPV6, router6(mine_here, them_here)),
        "one as the gateway": frame("33:33:00:00:00:01", mine, IPV6, router6(door, "ff02::1")),
        "a question for a neighbour": frame(f"33:33:ff:00:00:{second.port.mac[-2:]}", mine, IPV6, solicit6(
            mine_here, f"ff02::1:ff00:{int(second.port.mac[-2:], 16):x}", them, mine)),
        "a question for the gateway": frame("33:33:ff:00:00:01", mine, IPV6, solicit6(
            mine_here, "ff02::1:ff00:1", door, mine)),
        "a redirect": frame(to, mine, IPV6, packet6(door, them_here, socket.IPPROTO_ICMPV6, bytes((137,)) + bytes(39))),
    }
    good = frame(gateway, mine, IPV6, udp6(me, them, 5000, b"this arrives"))
    with second.hears(second.card) as heard, stage.world.hears("eth0") as outside:
        for one in bad.values():
            first.says(one)
        for source in (other.port.public_ipv6, "fd53:6b79:7361::99", staged.STRANGER6, mine_here):
            first.says(frame(gateway, mine, IPV6, udp6(source, staged.WORLD6, 5000, text)))
        first.says(good)
        first.says(frame(gateway, mine, IPV6, udp6(me, staged.WORLD6, 5000, b"this arrives")))
        eventually(lambda: [one for one in heard if b"this arrives" in one], staged.PATIENCE_SECONDS)
        eventually(lambda: [one for one in outside if b"this arrives" in one], staged.PATIENCE_SECONDS)
    mine_heard = [one for one in heard if one[6:12] == staged.octets(mine) and one[12:14] in (b"\x86\xdd", b"\x81\x00")]
    assert mine_heard == [], "a guest hears IPv6 from its gateway alone"
    assert not [one for one in (*heard, *outside) if text in one]
    with second.serves("::", 80):
        assert stage.stranger.reaches(them, 80), "and nobody was harmed"
    stage.apply(*PORTS)


def test_a_guest_reaches_nothing_of_the_machine(stage: Stage, guests: Three) -> None:
    first, _, _ = guests
    addresses = (str(stage.layout.machine_ipv6), staged.MACHINE6, "2001:db8:2::1")
    for number in (22, 8700):
        with stage.machine.serves("::", number):
            for address in addresses:
                assert stage.machine.reaches(address, number), "it is there"
                assert first.cut_off(address, number), f"{address} port {number} answered a guest"
    for address in addresses:
        assert not first.pings(address, staged.SILENCE_SECONDS)
    stage.world.address("lo", "fd00:ec2::254", 128)
    with stage.machine.netlink() as ipr:
        ipr.route("replace", dst="fd00:ec2::254/128", gateway=staged.WORLD6, family=socket.AF_INET6)
    with stage.world.serves("fd00:ec2::254", 80):
        assert stage.machine.reaches("fd00:ec2::254", 80)
        assert first.cut_off("fd00:ec2::254", 80), "a cloud's metadata is the machine's own"


def test_the_gateway_answers_pings_and_nothing_else(stage: Stage, guests: Three) -> None:
    first, _, _ = guests
    inner = staged.Place.__new__(staged.Place)
    inner.namespace = stage.layout.namespace
    address = str(stage.layout.namespace_ipv6)
    with inner.serves("::", 179):
        assert inner.reaches(str(stage.layout.gateway), 179), "it is there"
        assert first.cut_off(address, 179) and stage.stranger.cut_off(address, 179)
        assert first.pings(address) and not stage.stranger.pings(address, staged.SILENCE_SECONDS)


def test_nobody_outside_passes_for_a_guest(stage: Stage, guests: Three) -> None:
    first, second, _ = guests
    stage.apply(*with_rules(10, opened("udp", 5000, 5000, f"{second.port.public_ipv6}/128", f"{staged.STRANGER6}/128")))
    with stage.stranger.netlink() as ipr:
        mine = ipr.get_links(ipr.link_lookup(ifname="eth0")[0])[0].get_attr("IFLA_ADDRESS")
    with stage.machine.netlink() as ipr:
        theirs = ipr.get_links(ipr.link_lookup(ifname="out-s")[0])[0].get_attr("IFLA_ADDRESS")
    with first.hears(first.card) as heard, \
            staged.socket_in(stage.stranger.namespace, socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind(("eth0", 0))
        mouth.send(frame(theirs, mine, IPV6, udp6(second.port.public_ipv6, first.port.public_ipv6, 5000, b"forged")))
        mouth.send(frame(theirs, mine, IPV6, udp6(staged.STRANGER6, first.port.public_ipv6, 5000, b"honest")))
        eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if b"forged" in one]


def test_a_port_without_ipv6_has_none(stage: Stage, guests: Three) -> None:
    first, second, _ = guests
    stage.apply(*(msgspec.structs.replace(one, public_ipv6="") if one.id == "g-10" else one for one in PORTS))
    with first.serves("::", 80), second.hears(second.card) as heard:
        assert stage.stranger.cut_off(first.port.public_ipv6, 80)
        assert stage.stranger.reaches(first.port.public_ipv4, 80)
        first.says(frame(stage.layout.gateway_mac, first.port.mac, IPV6, udp6(
            first.port.public_ipv6, second.port.public_ipv6, 80, b"forged")))
    assert not [one for one in heard if b"forged" in one]
    stage.apply(*PORTS)
    with first.serves("::", 80):
        assert stage.stranger.reaches(first.port.public_ipv6, 80)


def test_ipv6_is_switched_off_and_on(stage: Stage, guests: Three) -> None:
    first, _, _ = guests
    held = stage.fabric
    with first.serves("::", 80), stage.stranger.connects(first.port.public_ipv4, 80) as flow:
        lines = flow.makefile()
        assert lines.readline()
        stage.fabric = LinuxFabric(msgspec.structs.replace(stage.layout, public_ipv6=""))
        stage.apply(*PORTS)
        assert stage.stranger.cut_off(first.port.public_ipv6, 80) and first.cut_off(staged.WORLD6, 80)
        flow.sendall(b"still here\n")
        assert lines.readline() == "still here\n"
        stage.fabric = held
        stage.apply(*PORTS)
        assert stage.stranger.reaches(first.port.public_ipv6, 80)


def test_a_machine_that_learns_its_routes_goes_on_learning() -> None:
    """Linux throws learnt routes away when it becomes a router, and ignores routers from then on, unless told."""
    with taken_slot() as slot:
        machine = staged.Place(f"skylearn{slot}")
        layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"skylearn{slot}n")
        fabric = LinuxFabric(layout)
        try:
            with machine.netlink() as ipr:
                ipr.link("add", ifname="lan", kind="bridge")
            machine.setting("ipv6/conf/lan/accept_ra", "1")
            staged.within(machine.namespace, lambda: fabric.apply([port(10, ADA)]))

            def settings() -> list[str]:
                return [(links.SETTINGS / "ipv6/conf" / name).read_text().strip()
                        for name in ("lan/accept_ra", f"{layout.link}/accept_ra", "all/forwarding")]

            assert links.inside(machine.namespace, settings) == ["2", "0", "1"]
        finally:
            staged.within(machine.namespace, fabric.teardown)
            machine.remove()
