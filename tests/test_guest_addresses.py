"""How a guest is given its addresses: by the personaliser in a clone, by a NoCloud seed in a cold boot."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clouds import taken_slot
from skysail.contract.document import Guest, Personality, Port, Volume
from skysail.hypervisor import addressing, personality
from skysail.hypervisor.personality import Surroundings
from skysail.images.guest import personalise
from skysail.kit.config import Config
from skysail.network import links
from skysail.serve.agent import resolvers, surroundings
from stage import Place

AROUND = Surroundings(prefix=16, gateway="172.26.0.1", gateway_ipv6="fe80::1", resolvers=("192.0.2.53",))
GUEST = Guest(
    id="g-1", instance="one", role="run", starts=1, reboots=0, vcpus=1, memory_mib=512,
    volume=Volume(id="g-1", image="0" * 64, size_gib=20), personality=Personality(hostname="one", user="admin"),
    port=Port(id="g-1", mac="52:54:00:00:00:0a", network=1, private_ipv4="172.26.0.10", public_ipv4="192.0.2.10",
              public_ipv6="fd53::a"))
IPV4_GUEST = msgspec.structs.replace(GUEST, port=msgspec.structs.replace(GUEST.port, public_ipv6=""))
IDENTITY = personality.make()


def told(guest: Guest, around: Surroundings = AROUND) -> dict[str, Any]:
    """What the personaliser reads: a line of JSON."""
    read: dict[str, Any] = json.loads(json.dumps(personality.message(guest, IDENTITY, around)))
    return read


def test_guests_have_the_gateway_of_the_prefix() -> None:
    assert surroundings(Config()).gateway_ipv6 == "fe80::1"
    assert surroundings(Config(public_ipv6="")).gateway_ipv6 == ""


@pytest.mark.parametrize(("guest", "around"), [
    (IPV4_GUEST, AROUND), (GUEST, msgspec.structs.replace(AROUND, gateway_ipv6=""))])
def test_without_an_address_or_a_prefix_there_is_no_ipv6(guest: Guest, around: Surroundings, tmp_path: Path) -> None:
    assert told(guest, around)["ipv6"] == ""
    personalise.files(told(guest, around), str(tmp_path))
    network = (tmp_path / "etc/systemd/network/10-skysail.network").read_text()
    assert "LinkLocalAddressing=no" in network and "fd53" not in network and "fe80" not in network
    seed = personality.seed(guest, IDENTITY, around)["network-config"]
    assert "fd53" not in seed and "fe80" not in seed and "172.26.0.10/16" in seed


@pytest.mark.parametrize("guest", [GUEST, IPV4_GUEST])
def test_what_a_guest_is_told_later_is_what_it_wrote_at_first(guest: Guest, tmp_path: Path) -> None:
    personalise.files(told(guest), str(tmp_path))
    assert (tmp_path / addressing.FILE.removeprefix("/")).read_text() == addressing.network(guest, AROUND)


def test_a_clone_has_its_addresses_in_networkds_configuration(tmp_path: Path) -> None:
    personalise.files(told(GUEST), str(tmp_path))
    sections = (tmp_path / "etc/systemd/network/10-skysail.network").read_text().split("\n\n")
    assert sections[1].splitlines()[0] == "[Network]" and "Address=172.26.0.10/16" in sections[1]
    assert "LinkLocalAddressing=ipv6" in sections[1] and "IPv6AcceptRA=no" in sections[1]
    assert sections[2].splitlines() == ["[Address]", "Address=fd53::a/128", "DuplicateAddressDetection=none"]
    assert sections[3].splitlines() == ["[Route]", "Gateway=fe80::1", "GatewayOnLink=yes"]


def test_a_seed_has_both_addresses_and_routes() -> None:
    network = json.loads(personality.seed(GUEST, IDENTITY, AROUND)["network-config"])["ethernets"]["primary"]
    assert network["addresses"] == ["172.26.0.10/16", "fd53::a/128"]
    assert [(route["to"], route["via"]) for route in network["routes"]] == [("0.0.0.0/0", "172.26.0.1"), ("::/0", "fe80::1")]
    assert network["match"] == {"macaddress": GUEST.port.mac} and network["accept-ra"] is False


@pytest.fixture
def place() -> Iterator[Place]:
    """Where a network card is plugged in, as in a clone."""
    with taken_slot() as slot:
        made = Place(f"skycard{slot}")
        with made.netlink() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer={"ifname": "other"})
            ipr.link("set", index=ipr.link_lookup(ifname="other")[0], state="up")
        try:
            yield made
        finally:
            made.remove()


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_card_is_configured_at_once(place: Place) -> None:
    def work() -> str:
        route = personalise.Route()
        for _ in range(2):
            route.configure("eth0", "172.26.0.10/16", "172.26.0.1")
            route.configure_ipv6("eth0", "fd53::a/128", "fe80::1")
        # Looked at in the same breath: an address that still probes for its double would be of no use yet.
        return "".join(subprocess.run(["ip", *argv], capture_output=True, text=True, check=True).stdout for argv in (
            ["-o", "address", "show", "dev", "eth0"], ["route"], ["-6", "route"]))

    place.setting("ipv6/conf/eth0/accept_dad", "1")
    shown = links.inside(place.namespace, work)
    (address,) = [line for line in shown.splitlines() if "fd53::a/128" in line and "inet6" in line]
    assert "scope global" in address and "tentative" not in address
    assert "172.26.0.10/16" in shown
    assert shown.count("default via 172.26.0.1 dev eth0") == 1 and shown.count("default via fe80::1 dev eth0") == 1


@pytest.mark.parametrize(("text", "four", "six"), [
    ("nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n", ["192.0.2.1", "192.0.2.2", "192.0.2.3"],
     ["192.0.2.1", "192.0.2.2", "192.0.2.3"]),
    ("nameserver 2001:db8::1\nnameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n",
     ["192.0.2.1", "192.0.2.2", "192.0.2.3"], ["192.0.2.1", "192.0.2.2", "2001:db8::1"]),
    ("nameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver ::1\nnameserver\nnameserver x\n", [], []),
    ("nameserver 2001:db8::1\n", [], ["2001:db8::1"])])
def test_guests_are_told_resolvers_that_they_reach(text: str, four: list[str], six: list[str], tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    assert list(resolvers(4, (str(path),))) == four and list(resolvers(6, (str(path),))) == six
