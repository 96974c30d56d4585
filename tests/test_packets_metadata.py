"""169.254.169.254 with real packets, on a stage of namespaces (tests/stage.py): the real process answers, and nobody but the
instance itself reaches its own metadata."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import stage as staged
from clouds import eventually, taken_slot
from skysail.contract.document import Guest, Metadata, MetadataOptions, Personality, Port, Volume
from skysail.kit.config import Config
from skysail.metadata import tree
from skysail.metadata.process import Answerer
from skysail.network import links
from skysail.network.plan import BRIDGE, GATEWAY_IPV6, METADATA, METADATA_IPV6, Layout
from stage import Place, Stage, arp, frame, udp4
from test_packets import ADA, BOB, IPV4, port

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]
PORTS = (port(10, ADA), port(11, ADA), port(12, BOB))
ADDRESS, ADDRESS6 = str(METADATA), str(METADATA_IPV6)
OWN = "/latest/meta-data/local-ipv4"


def told(one: Port, **options: Any) -> Guest:
    return Guest(id=one.id, instance=one.id, role="run", starts=1, reboots=0, vcpus=1, memory_mib=512, port=one,
                 volume=Volume(id=one.id, image="0" * 64, size_gib=20),
                 personality=Personality(hostname=one.id, user="admin"),
                 metadata=Metadata(instance_id=one.id, account="1", region="us-east-1", zone="a", bundle="nano_3_0",
                                   key_name="k", launched_at=0.0, options=MetadataOptions(**options)))


class House:
    """A stage with a process that answers."""

    def __init__(self, slot: int) -> None:
        self.loop = asyncio.Runner()
        self.stage = Stage(f"skymeta{slot}", msgspec.structs.replace(Layout.of(Config()), namespace=f"skymeta{slot}"))
        self.engine = Answerer(self.stage.fabric.listen, mark=f"skysail-metadata-stage:{slot}", uid=3_900_100 + slot,
                               key=lambda: bytes(32))
        self.stage.apply(*PORTS)
        for one in PORTS:
            self.stage.guest(one)
        self.tell()

    def tell(self, **options: Any) -> None:
        """Every guest is told of itself, with these options."""
        records = [made for one in PORTS if (made := tree.record(told(one, **options))) is not None]
        self.loop.run(self.engine.apply(records))

    def remove(self) -> None:
        self.loop.run(self.engine.close())
        self.loop.close()
        self.stage.remove()


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with taken_slot() as slot:
        made = House(slot)
        try:
            yield made
        finally:
            made.remove()


def ask(place: Place, path: str = OWN, address: str = ADDRESS, *, method: str = "GET", seconds: float = 20.0,
        source: str = "", **fields: str) -> str:
    """The text of the answer, or its status; empty when there is none within ``seconds``."""
    with contextlib.suppress(OSError), place.connects(address, 80, seconds, source) as one:
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        one.sendall(f"{head}\r\n".encode())
        answer = b""
        while more := one.recv(65536):
            answer += more
        head, _, text = answer.decode().partition("\r\n\r\n")
        return text if " 200 " in head.splitlines()[0] else head.split()[1]
    return ""


def token(place: Place, address: str = ADDRESS, seconds: float = 20.0) -> str:
    return ask(place, "/latest/api/token", address, method="PUT", seconds=seconds,
               **{"X-aws-ec2-metadata-token-ttl-seconds": "60"})


def test_each_guest_reads_its_own(house: House) -> None:
    for guest in house.stage.guests:
        assert ask(guest) == guest.port.private_ipv4
        held = token(guest)
        assert ask(guest, **{"X-aws-ec2-metadata-token": held}) == guest.port.private_ipv4
        others = [one for one in house.stage.guests if one is not guest]
        assert [ask(one, **{"X-aws-ec2-metadata-token": held}) for one in others] == ["401", "401"]


def test_a_route_of_the_link_leads_there_too(house: House) -> None:
    """Some systems take all of 169.254.0.0/16 for their link, and ask who has the address."""
    first = house.stage.guests[0]
    with first.netlink() as ipr:
        index = ipr.link_lookup(ifname=first.card)[0]
        ipr.route("add", dst="169.254.0.0/16", oif=index, scope=253)
        try:
            assert ask(first) == first.port.private_ipv4
        finally:
            ipr.route("del", dst="169.254.0.0/16", oif=index, scope=253)


def test_nothing_else_is_reached_there(house: House) -> None:
    first = house.stage.guests[0]
    inner = Place.__new__(Place)
    inner.namespace = house.stage.layout.namespace
    for number in (22, 443, 8080):
        with inner.serves("0.0.0.0", number):
            assert inner.reaches(ADDRESS, number), "it is there"
            assert first.cut_off(ADDRESS, number)
    assert not first.pings(ADDRESS, staged.SILENCE_SECONDS)
    # The machine's own link-local world, and what lies behind it.
    for address in ("169.254.169.253", "169.254.170.2", "169.254.1.1"):
        house.stage.machine.address("lo", address, 32)
        house.stage.world.address("lo", address, 32)
        with house.stage.machine.serves(address, 80), house.stage.world.serves(address, 80):
            assert first.cut_off(address, 80)


def test_from_outside_nobody_reaches_it(house: House) -> None:
    layout = house.stage.layout
    for place, gateway in ((house.stage.machine, str(layout.namespace_address)), (house.stage.stranger, "203.0.113.1")):
        with place.netlink() as ipr:
            ipr.route("add", dst=f"{ADDRESS}/32", gateway=gateway)
            assert place.cut_off(ADDRESS, 80)
            ipr.route("del", dst=f"{ADDRESS}/32", gateway=gateway)
    assert house.stage.stranger.cut_off(house.stage.guests[0].port.public_ipv4, 80)


def test_a_forged_source_gets_nothing(house: House) -> None:
    """Neither an answer for itself nor one for the guest that it claims to be."""
    first, second, _ = house.stage.guests
    with first.netlink() as ipr:
        index = ipr.link_lookup(ifname=first.card)[0]
        for address in (second.port.private_ipv4, "172.26.0.99", "127.0.0.9"):
            ipr.addr("add", index=index, address=address, prefixlen=32)
    try:
        for address in (second.port.private_ipv4, "172.26.0.99"):
            assert ask(first, source=address, seconds=staged.SILENCE_SECONDS) == ""
    finally:
        with first.netlink() as ipr:
            for address in (second.port.private_ipv4, "172.26.0.99", "127.0.0.9"):
                ipr.addr("del", index=index, address=address, prefixlen=32)
    assert ask(first) == first.port.private_ipv4 and ask(second) == second.port.private_ipv4


def test_a_guest_cannot_pose_as_the_metadata(house: House) -> None:
    first, second, _ = house.stage.guests
    mine, broad = first.port.mac, "ff:ff:ff:ff:ff:ff"
    me, them = first.port.private_ipv4, second.port.private_ipv4
    with second.hears(second.card) as heard:
        first.says(frame(broad, mine, 0x0806, arp(2, mine, ADDRESS, second.port.mac, them)))
        first.says(frame(second.port.mac, mine, IPV4, udp4(ADDRESS, them, 5000, b"forged")))
        first.says(frame(second.port.mac, mine, IPV4, udp4(me, them, 5000, b"honest")))
        eventually(lambda: [one for one in heard if b"honest" in one], staged.PATIENCE_SECONDS)
    assert not [one for one in heard if b"forged" in one or socket.inet_aton(ADDRESS) in one]


def test_a_token_does_not_travel_further_than_its_hops(house: House) -> None:
    """A container behind its host's own NAT: one hop more."""
    first = house.stage.guests[0]
    box = Place(f"{house.stage.mark}box")
    try:
        with first.netlink() as ipr:
            ipr.link("add", ifname="veth", kind="veth", peer={"ifname": "eth0", "net_ns_fd": box.namespace})
        first.address("veth", "10.88.0.1", 24)
        box.address("eth0", "10.88.0.2", 24)
        with box.netlink() as ipr:
            ipr.route("add", dst="0.0.0.0/0", gateway="10.88.0.1")
        first.setting("ipv4/ip_forward", "1")
        links.inside(first.namespace, lambda: links.load(
            "table ip nat {\nchain postrouting { type nat hook postrouting priority 100; "
            f'oifname "{first.card}" masquerade\n}}\n}}\n'))
        assert ask(box) == first.port.private_ipv4, "without a token it travels"
        assert token(box, seconds=3.0) == "" and token(first)
        house.tell(http_put_response_hop_limit=2)
        held = token(box)
        assert len(held) > 20 and ask(box, **{"X-aws-ec2-metadata-token": held}) == first.port.private_ipv4
        house.tell(http_put_response_hop_limit=2, http_tokens="required")
        assert ask(box) == "401"
    finally:
        house.tell()
        links.inside(first.namespace, lambda: subprocess.run(["nft", "flush", "ruleset"], check=True))
        with first.netlink() as ipr:
            ipr.link("del", index=ipr.link_lookup(ifname="veth")[0])
        box.remove()


def test_over_ipv6_where_it_is_enabled(house: House) -> None:
    first, second, other = house.stage.guests
    assert ask(first, address=ADDRESS6) == "403"
    house.tell(http_protocol_ipv6="enabled")
    try:
        for guest in (first, second, other):
            assert ask(guest, address=ADDRESS6) == guest.port.private_ipv4
            assert len(token(guest, ADDRESS6)) > 20
        assert not first.pings(ADDRESS6, staged.SILENCE_SECONDS)
        assert house.stage.stranger.cut_off(ADDRESS6, 80)
        # A link-local source is good for questions to the gateway alone.
        scoped = links.inside(first.namespace, lambda: subprocess.run(
            ["ip", "-6", "-o", "address", "show", "dev", first.card, "scope", "link"], capture_output=True, text=True)).stdout
        if here := [word.partition("/")[0] for word in scoped.split() if word.startswith("fe80")]:
            assert ask(first, address=ADDRESS6, source=f"{here[0]}%{first.card}", seconds=staged.SILENCE_SECONDS) == ""
    finally:
        house.tell()
    assert str(GATEWAY_IPV6) == "fe80::1"


def test_the_kernel_keeps_no_connections_of_it(house: House) -> None:
    first = house.stage.guests[0]
    with first.connects(ADDRESS, 80):
        table = links.inside(house.stage.layout.namespace, lambda: subprocess.run(
            ["ss", "-Htn", "state", "established", "sport", "=", "80"], capture_output=True, text=True)).stdout
        assert ADDRESS in table, "it is there"
        kept = links.inside(house.stage.layout.namespace, tracked)
    assert not [one for one in kept if ADDRESS in one and first.port.private_ipv4 in one], kept


def tracked() -> list[tuple[str, str]]:
    """Source and target of every connection that the kernel tracks here."""
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket
    with NFCTSocket(nfgen_family=socket.AF_INET) as tracker:
        found = [NFCTAttrTuple.from_netlink(socket.AF_INET, entry.get_attr("CTA_TUPLE_ORIG")) for entry in tracker.dump()]
    return [(one.saddr, one.daddr) for one in found]


@pytest.mark.parametrize("harm", ["no bridge", "no rules", "no namespace"])
def test_it_is_there_again_after_harm(house: House, harm: str) -> None:
    namespace, first = house.stage.layout.namespace, house.stage.guests[0]
    argv = {"no bridge": ["ip", "netns", "exec", namespace, "ip", "link", "delete", BRIDGE],
            "no rules": ["ip", "netns", "exec", namespace, "nft", "flush", "ruleset"],
            "no namespace": ["ip", "netns", "delete", namespace]}[harm]
    subprocess.run(argv, check=True)
    house.stage.apply(*PORTS)
    house.tell()
    if harm == "no namespace":
        # Its tap was in the namespace that is gone: only a new guest has one in the new one.
        for guest in list(house.stage.guests):
            house.stage.leave(guest)
        for one in PORTS:
            house.stage.guest(one)
        first = house.stage.guests[0]
    assert eventually(lambda: ask(first, seconds=2.0) == first.port.private_ipv4)
