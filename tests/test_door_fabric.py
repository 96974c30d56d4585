"""The network door: one suite for every engine, then what only a kernel can show. The Linux one works on a machine of
its own, see tests/stage.py."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clouds import eventually, taken_slot
from skysail.contract.document import FirewallRule, Port
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.network import Fabric, links, taps
from skysail.network.linux import LinuxFabric
from skysail.network.plan import BRIDGE, UPLINK, Layout, link_local, tap_name
from skysail.network.sim import SimFabric
from stage import Place, within

real = (pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"))
Call = Callable[[], Coroutine[Any, Any, Any]]


def port(number: int, network: int = 1) -> Port:
    return Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network, private_ipv4=f"172.26.0.{number}",
                public_ipv4=f"100.115.93.{number}", public_ipv6=f"fd53:6b79:7361::{number:x}",
                firewall=(FirewallRule(protocol="tcp", from_port=22, to_port=22),))


ONE, TWO, THREE = port(10), port(11), port(12, 2)


class Door:
    """An engine and the place where it works."""

    def __init__(self, fabric: Fabric, namespace: str, layout: Layout) -> None:
        self.fabric = fabric
        self.namespace = namespace
        self.layout = layout

    def does(self, call: Call) -> Any:
        return within(self.namespace, call) if self.namespace else asyncio.run(call())

    def apply(self, *ports: Port) -> None:
        self.does(lambda: self.fabric.apply(ports))

    def ports(self) -> set[str]:
        return set(self.does(self.fabric.observe))

    def inner(self, call: Callable[[], Any]) -> Any:
        """What ``call`` answers in the data plane's own namespace."""
        return links.inside(self.layout.namespace, call)


@pytest.fixture
def linux() -> Iterator[Door]:
    with taken_slot() as slot:
        layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"skydoor{slot}")
        machine = Place(f"skydoor{slot}m")
        made = Door(LinuxFabric(layout), machine.namespace, layout)
        try:
            yield made
        finally:
            within(machine.namespace, LinuxFabric(layout).teardown)
            machine.remove()


@pytest.fixture(params=["sim", pytest.param("linux", marks=real)])
def door(request: pytest.FixtureRequest) -> Door:
    made: Door = Door(SimFabric(), "", Layout.of(Config())) if request.param == "sim" else request.getfixturevalue("linux")
    return made


def test_ports_come_and_go(door: Door) -> None:
    assert door.ports() == set()
    door.apply(ONE, TWO)
    assert door.ports() == {ONE.id, TWO.id}
    door.apply(TWO, THREE)
    assert door.ports() == {TWO.id, THREE.id}
    door.apply()
    assert door.ports() == set()


def test_apply_is_idempotent(door: Door) -> None:
    for _ in range(3):
        door.apply(ONE, TWO)
        assert door.ports() == {ONE.id, TWO.id}


def test_observe_has_no_effects(door: Door) -> None:
    door.apply(ONE)
    assert door.does(door.fabric.observe) == door.does(door.fabric.observe)


def test_a_new_port_has_carried_nothing(door: Door) -> None:
    door.apply(ONE)
    counted = door.does(door.fabric.observe)[ONE.id]
    assert (counted.rx_bytes, counted.tx_bytes) == (0, 0)


def test_a_port_is_opened_and_opened_again(door: Door) -> None:
    door.apply(ONE)
    for _ in range(2):
        descriptor = door.does(lambda: door.fabric.open_port(ONE))
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_an_open_port_stays_open_over_changes(door: Door) -> None:
    door.apply(ONE)
    descriptor = door.does(lambda: door.fabric.open_port(ONE))
    try:
        door.apply(ONE, TWO)
        door.apply(msgspec.structs.replace(ONE, firewall=()))
        assert os.write(descriptor, bytes(70)) == 70
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("first", [(), (TWO,)])
def test_a_port_that_was_not_applied_is_not_opened(door: Door, first: tuple[Port, ...]) -> None:
    if first:
        door.apply(*first)
    with pytest.raises(SkysailError):
        door.does(lambda: door.fabric.open_port(ONE))
    assert door.ports() == {one.id for one in first}


@pytest.mark.parametrize("wrong", [{"mac": ONE.mac}, {"private_ipv4": ONE.private_ipv4}, {"public_ipv4": ONE.public_ipv4},
                                   {"public_ipv6": ONE.public_ipv6}, {"public_ipv6": ONE.public_ipv4},
                                   {"public_ipv4": "100.115.93.256"}, {"network": 0}])
def test_a_port_that_cannot_be_changes_nothing(door: Door, wrong: dict[str, Any]) -> None:
    door.apply(ONE)
    with pytest.raises(SkysailError):
        door.apply(ONE, msgspec.structs.replace(TWO, **wrong))
    assert door.ports() == {ONE.id}
    door.apply(ONE, TWO)


def test_who_listens_for_questions_does_so_once(door: Door) -> None:
    door.apply(ONE)
    assert door.does(door.fabric.listen) == door.does(door.fabric.listen)


def test_a_healthy_machine_has_no_problems(door: Door) -> None:
    assert door.does(door.fabric.check) == []


# From here on: the kernel's own.


def names(door: Door) -> set[str]:
    return {link.name for link in door.inner(links.every)} - {"lo"}


def whole(door: Door, *ports: Port) -> bool:
    """Everything is in place: devices, their state, rules, routes."""
    held = {link.name: link for link in door.inner(links.every)}
    assert set(held) == {"lo", BRIDGE, UPLINK, *(tap_name(one.id) for one in ports)}
    assert all(link.up for link in held.values())
    assert held[BRIDGE].mac == door.layout.gateway_mac
    taps = [held[tap_name(one.id)] for one in ports]
    assert all(tap.master == held[BRIDGE].index for tap in taps)
    assert {tap.owner.port for tap in taps if tap.owner} == {one.id for one in ports}
    link = links.inside(door.namespace, lambda: links.find(door.layout.link))
    assert link is not None and link.up and (link.peer, held[UPLINK].peer) == (held[UPLINK].index, link.index)
    rules = told(door.layout.namespace, "nft", "list", "ruleset")
    assert all(one.public_ipv4 in rules and one.mac in rules for one in ports)
    for target in ("100.115.93.200", "fd53:6b79:7361::c8"):
        assert door.layout.link in told(door.namespace, "ip", "route", "get", target)
    for target, way in (("192.0.2.9", UPLINK), ("2001:db8::9", UPLINK), (str(door.layout.machine_ipv6), UPLINK),
                        ("172.26.0.10", BRIDGE), ("fd53:6b79:7361::a", BRIDGE)):
        assert f"dev {way} " in told(door.layout.namespace, "ip", "route", "get", target)
    known = told(door.layout.namespace, "ip", "neighbour", "show", "dev", BRIDGE, "nud", "permanent")
    for one in ports:
        for address in (one.private_ipv4, one.public_ipv6, str(link_local(one.mac))):
            assert f"{address} lladdr {one.mac} PERMANENT" in known
    addresses = {name: told(door.layout.namespace, "ip", "-o", "address", "show", "dev", name)
                 for name in (BRIDGE, UPLINK, tap_name(ONE.id)) if name in held}
    assert [addresses[BRIDGE].count(word) for word in (" inet ", " inet6 ")] == [2, 3]
    assert [addresses[UPLINK].count(word) for word in (" inet ", " inet6 ")] == [1, 1]
    assert addresses.get(tap_name(ONE.id), "") == "", "a tap has no address of its own"
    return True


def told(namespace: str, *argv: str) -> str:
    return links.inside(namespace, lambda: subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("call", ["observe", "check"])
@pytest.mark.real
def test_looking_makes_nothing(linux: Door, call: str) -> None:
    linux.does(getattr(linux.fabric, call))
    assert not links.exists(linux.layout.namespace)
    assert {link.name for link in links.inside(linux.namespace, links.every)} == {"lo"}


@pytest.mark.real
def test_without_a_plane_nobody_listens_and_in_another_one_anew(linux: Door) -> None:
    with pytest.raises(SkysailError, match="does not exist"):
        linux.does(linux.fabric.listen)
    linux.apply(ONE)
    first = linux.does(linux.fabric.listen)
    assert [one.getsockname()[:2] for one in first] == [("169.254.169.254", 80), ("fd00:ec2::254", 80)]
    with pytest.raises(SkysailError, match="already in use"):
        linux.does(LinuxFabric(linux.layout).listen)
    no_bridge(linux)
    linux.apply(ONE)
    assert linux.does(linux.fabric.listen) == first, "the address came back"
    lost_name(linux)
    linux.apply(ONE)
    second = linux.does(linux.fabric.listen)
    assert second != first and {one.fileno() for one in first} == {-1}


@pytest.mark.real
def test_teardown_leaves_nothing_and_may_be_repeated(linux: Door) -> None:
    linux.apply(ONE, TWO)
    for _ in range(2):
        linux.does(linux.fabric.teardown)
        assert not links.exists(linux.layout.namespace)
        assert {link.name for link in links.inside(linux.namespace, links.every)} == {"lo"}
        rules = links.inside(linux.namespace, lambda: subprocess.run(["nft", "list", "ruleset"], capture_output=True).stdout)
        assert rules == b""
    linux.apply(ONE)
    assert whole(linux, ONE)


def run_in(namespace: str, *argv: str) -> None:
    links.inside(namespace, lambda: subprocess.run(argv, check=True, capture_output=True))


def lost_name(door: Door) -> None:
    run_in(door.namespace, "ip", "netns", "delete", door.layout.namespace)


def name_without_mount(door: Door) -> None:
    lost_name(door)
    (links.NAMESPACES / door.layout.namespace).touch()


def no_bridge(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "link", "delete", BRIDGE)


def bridge_of_another_kind(door: Door) -> None:
    no_bridge(door)
    run_in(door.layout.namespace, "ip", "tuntap", "add", "mode", "tap", "name", BRIDGE)


def bridge_down_with_a_strange_address(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "link", "set", BRIDGE, "down", "address", "02:00:00:00:00:01")
    run_in(door.layout.namespace, "ip", "address", "add", "10.9.9.9/24", "dev", BRIDGE)


def tap_without_note(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "link", "set", tap_name(ONE.id), "alias", "", "nomaster", "down")


def tap_left_over(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "tuntap", "add", "mode", "tap", "name", tap_name("g-former"))


def no_tap(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "link", "delete", tap_name(TWO.id))


def no_link(door: Door) -> None:
    run_in(door.namespace, "ip", "link", "delete", door.layout.link)


def link_without_its_note_or_address(door: Door) -> None:
    run_in(door.namespace, "ip", "link", "set", door.layout.link, "alias", "", "down")
    run_in(door.namespace, "ip", "address", "flush", "dev", door.layout.link)


def no_neighbours(door: Door) -> None:
    run_in(door.layout.namespace, "ip", "neighbour", "flush", "dev", BRIDGE, "nud", "permanent")
    run_in(door.layout.namespace, "ip", "-6", "neighbour", "flush", "dev", BRIDGE, "nud", "permanent")


def ipv6_off(door: Door) -> None:
    for namespace in (door.namespace, door.layout.namespace):
        links.inside(namespace, lambda: links.write_setting("ipv6/conf/all/disable_ipv6", "0"))
        links.inside(namespace, lambda: links.write_setting("ipv6/conf/all/disable_ipv6", "1"))


def no_rules(door: Door) -> None:
    for namespace in (door.namespace, door.layout.namespace):
        run_in(namespace, "nft", "flush", "ruleset")


def no_routes(door: Door) -> None:
    run_in(door.namespace, "ip", "route", "delete", door.layout.public_pool)
    run_in(door.namespace, "ip", "route", "delete", door.layout.public_ipv6)
    run_in(door.layout.namespace, "ip", "route", "flush", "table", "main")
    run_in(door.layout.namespace, "ip", "-6", "route", "flush", "table", "main")
    run_in(door.layout.namespace, "ip", "link", "set", UPLINK, "down")


HARM = (lost_name, name_without_mount, no_bridge, bridge_of_another_kind, bridge_down_with_a_strange_address,
        tap_without_note, tap_left_over, no_tap, no_link, link_without_its_note_or_address, no_neighbours, ipv6_off,
        no_rules, no_routes)


@pytest.mark.real
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("who", ["the same agent", "another agent"])
def test_a_broken_plane_is_made_whole(linux: Door, harm: Callable[[Door], None], who: str) -> None:
    linux.apply(ONE, TWO)
    harm(linux)
    if who == "another agent":
        linux.fabric = LinuxFabric(linux.layout)
    linux.apply(ONE, TWO)
    assert whole(linux, ONE, TWO)


APPLY = """
import asyncio, sys
from test_door_fabric import port
from skysail.network import links
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
import msgspec
layout = msgspec.json.decode(sys.argv[1], type=Layout)
def work():
    print("ready", flush=True)
    sys.stdin.readline()
    asyncio.run(LinuxFabric(layout).apply([port(number) for number in range(20, 40)]))
links.inside(sys.argv[2], work)
"""


@pytest.mark.real
def test_kill_9_at_any_moment_leaves_what_the_next_agent_finishes(linux: Door) -> None:
    """From nothing to twenty ports, cut off a little later each time, until one comes through."""
    ports = [port(number) for number in range(20, 40)]
    milliseconds, came_through, cut = 1, False, 0
    while not came_through and milliseconds < 60_000:
        child = subprocess.Popen([sys.executable, "-c", APPLY, msgspec.json.encode(linux.layout).decode(), linux.namespace],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": os.pathsep.join(
                                     [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])})
        assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.stdin.write(b"\n")
        child.stdin.flush()
        try:
            came_through = child.wait(milliseconds / 1000) == 0
        except subprocess.TimeoutExpired:
            cut += 1
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
        linux.fabric = LinuxFabric(linux.layout)
        linux.apply(*ports)
        assert whole(linux, *ports)
        assert linux.ports() == {one.id for one in ports}
        linux.does(linux.fabric.teardown)
        milliseconds = milliseconds * 2 if milliseconds < 16 else round(milliseconds * 1.4)
    assert came_through and cut > 2


@pytest.mark.real
def test_a_device_of_somebody_else_is_left_alone(linux: Door) -> None:
    run_in(linux.namespace, "ip", "link", "add", linux.layout.link, "type", "bridge")
    with pytest.raises(SkysailError, match=r"not Skysail's"):
        linux.apply(ONE)
    found = links.inside(linux.namespace, lambda: links.find(linux.layout.link))
    assert found is not None and found.kind == "bridge"
    linux.does(linux.fabric.teardown)
    assert links.inside(linux.namespace, lambda: links.find(linux.layout.link)) == found


@pytest.mark.real
@pytest.mark.parametrize("key", ["public_pool", "public_ipv6"])
def test_a_route_of_somebody_else_is_not_taken(linux: Door, key: str) -> None:
    run_in(linux.namespace, "ip", "link", "add", "lan", "type", "bridge")
    run_in(linux.namespace, "ip", "link", "set", "lan", "up")
    run_in(linux.namespace, "ip", "route", "add", getattr(linux.layout, key), "dev", "lan")
    with pytest.raises(SkysailError, match="already has a route") as caught:
        linux.apply(ONE)
    assert key in caught.value.cure


@pytest.mark.real
@pytest.mark.parametrize(("address", "key"), [
    ("172.26.3.1/24", "private_network"), ("100.115.93.7/32", "public_pool"), ("fd53:6b79:7361::5/64", "public_ipv6")])
def test_a_network_of_the_machine_that_would_be_hidden_is_found(linux: Door, address: str, key: str) -> None:
    run_in(linux.namespace, "ip", "link", "add", "lan", "type", "bridge")
    run_in(linux.namespace, "ip", "address", "add", address, "dev", "lan")
    (problem,) = linux.does(linux.fabric.check)
    assert str(ipaddress.ip_interface(address).network) in problem and f"choose another {key} " in problem


@pytest.mark.real
@pytest.mark.parametrize(("family", "cure"), [("ip", " iptables -I FORWARD"), ("ip6", " ip6tables -I FORWARD")])
def test_a_foreign_firewall_that_drops_is_found(linux: Door, family: str, cure: str) -> None:
    links.inside(linux.namespace, lambda: links.load(
        f"table {family} filter {{\nchain FORWARD {{ type filter hook forward priority 0; policy drop; }}\n}}\n"))
    (problem,) = linux.does(linux.fabric.check)
    assert cure in problem and linux.layout.link in problem
    without = LinuxFabric(msgspec.structs.replace(linux.layout, public_ipv6=""))
    assert len(linux.does(without.check)) == (family == "ip"), "a network that there is not is not in the way"


@pytest.mark.real
def test_a_tap_that_somebody_holds_is_refused_until_it_is_let_go(linux: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "BUSY_SECONDS", 0.2)
    linux.apply(ONE)
    held = linux.does(lambda: linux.fabric.open_port(ONE))
    with pytest.raises(SkysailError, match="cannot be opened"):
        linux.does(lambda: linux.fabric.open_port(ONE))
    os.close(held)
    os.close(eventually(lambda: linux.does(lambda: linux.fabric.open_port(ONE))))
