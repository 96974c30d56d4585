"""The network of a Linux machine: guests' taps in a namespace of their own, one ruleset over them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network

import msgspec

from skysail.contract.document import FirewallRule, Network, Overlay, Port
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network import Joined, PortCounters, conflicts, frr, links, nftables, overlay, presence, segment, taps
from skysail.network.frr import Frr, Settings
from skysail.network.listeners import Listeners
from skysail.network.memory import forget_untranslated
from skysail.network.plan import Layout, spanning, vet_overlay

log = logging.getLogger(__name__)
# What another host said before it heard of an announcement may arrive for so long after it, in seconds.
OVERTAKEN_SECONDS = 1.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, as far as it is to be. A port is ``awaited`` as long as its guest is on another host."""

    ports: list[Port]
    networks: list[Network]
    overlay: Overlay | None


class LinuxFabric:
    """The data plane of one host. Netlink blocks, so all work is done in threads, one piece of it at a time. Networks span
    hosts where the layout has an underlay, and there is an ``frr`` to tell what is here."""

    def __init__(self, layout: Layout, router: Frr | None = None) -> None:
        self._layout = layout
        self._router = router
        self._lock = threading.Lock()  # held by the thread: work goes on when the task that asked for it is cancelled
        # What each table was made of, and the kernel's generation of rules since then.
        self._loaded: dict[str, tuple[object, int]] = {}
        self._held: Wanted | None = None  # as it was last applied
        # The ports by id that were announced here, with the time; and those whose guest another host announced since.
        self._announced: dict[str, float] = {}
        self._lost: set[str] = set()
        self._ear: presence.Ear | None = None
        self._around: presence.Surroundings | None = None
        self._spanned: bool | None = None  # whether networks span hosts; None before the first time, as with _routed
        # The private addresses that peer subnets reach; None before the first time, when an earlier agent's may be left.
        self._routed: set[str] | None = None
        self._listeners = Listeners(layout)

    async def apply(self, ports: Sequence[Port], networks: Sequence[Network] = (), overlay: Overlay | None = None) -> None:
        """See :class:`skysail.network.Fabric`. Raises SkysailError; then the rules are the former ones."""
        await asyncio.to_thread(self._apply, list(ports), list(networks), overlay)

    async def announce(self, port: str) -> None:
        await asyncio.to_thread(self._announce, port)

    async def open_port(self, port: Port) -> int:
        return await asyncio.to_thread(self._open, port)

    async def listen(self) -> tuple[socket.socket, ...]:
        return await asyncio.to_thread(self._listen)

    async def observe(self) -> dict[str, PortCounters]:
        return await asyncio.to_thread(self._observe)

    async def joined(self) -> Joined:
        return await asyncio.to_thread(self._joined)

    async def check(self) -> list[str]:
        return await asyncio.to_thread(self._check)

    async def teardown(self) -> None:
        """Nothing of the data plane is left; guests that run lose their network for good."""
        await asyncio.to_thread(self._teardown)

    def _apply(self, ports: list[Port], networks: list[Network], overlay_: Overlay | None) -> None:
        layout = self._layout
        with self._lock:
            if not layout.underlay or self._router is None:
                overlay_ = None
            if overlay_ is not None:
                vet_overlay(overlay_, networks)
            wanted = Wanted(ports=self._settled(ports, overlay_), networks=networks, overlay=overlay_)
            if self._change_firewalls(wanted):
                return
            ruleset = nftables.data_plane(layout, wanted.ports, networks, overlay_ is not None)
            self._held = None
            links.ensure_namespace(layout.namespace)
            # Rules come before devices on both sides: there is no moment in which something passes unchecked.
            machine = nftables.machine(layout, wanted.ports, overlay_)
            self._load("machine", machine, machine)
            links.inside(layout.namespace, lambda: self._inner(ruleset, wanted))
            with links.netlink() as ipr:
                links.ensure_link(ipr, layout)
                links.inside(layout.namespace, self._uplink)
                links.ensure_routes(ipr, layout)
            self._part(ports, {network.number for network in networks if network.routed})
            self._span(wanted)
            self._held = wanted

    def _settled(self, ports: list[Port], overlay_: Overlay | None) -> list[Port]:
        """The ports, each awaited or not as it stands here: whether it was announced, or lost to another host."""
        ids = {port.id for port in ports}
        self._announced = {key: when for key, when in self._announced.items() if key in ids}
        self._lost &= ids if overlay_ is not None else set()
        if overlay_ is not None and self._held is None and links.exists(self._layout.namespace):
            self._lost |= links.inside(self._layout.namespace, lambda: _left(ports))
        return [msgspec.structs.replace(port, awaited=port.id in self._lost or (
            port.awaited and port.id not in self._announced)) for port in ports]

    def _change_firewalls(self, wanted: Wanted) -> bool:
        """Where only firewalls differ from what was applied, load what differs; says whether that was all. The devices are
        looked at again with the next whole pass, which is made at the latest when it is asked for without a difference."""
        held = self._held
        if held is None or (wanted.networks, wanted.overlay) != (held.networks, held.overlay) or wanted.ports == held.ports:
            return False
        text = nftables.firewall_changes(self._layout, held.ports, wanted.ports)
        return text is not None and self._change(text, wanted)

    def _change(self, text: str, wanted: Wanted) -> bool:
        """Load what leads from the rules that are held to those of what is wanted; says whether that could be done."""
        def load() -> bool:
            if self._loaded["namespace"][1] != links.generation():
                return False  # somebody else changed rules: what there is now is not what this change starts from
            if text:
                links.load(text)
            self._loaded["namespace"] = (_origin(wanted), links.generation())
            return True

        try:
            if not links.inside(self._layout.namespace, load):
                return False
        except (OSError, SkysailError):
            return False  # the whole ruleset says what is wrong, or puts it right
        self._held = wanted
        return True

    def _inner(self, ruleset: str, wanted: Wanted) -> None:
        for path, value in links.NAMESPACE_SETTINGS.items():
            links.write_setting(path, value)
        self._load("namespace", _origin(wanted), ruleset)
        with links.netlink() as ipr:
            links.ensure_bridge(ipr, self._layout)
            taps.ensure(ipr, self._layout, wanted.ports)

    def _span(self, wanted: Wanted) -> None:
        """Networks span hosts, or no more."""
        layout, router = self._layout, self._router
        if wanted.overlay is None and self._spanned is False:
            return
        here = [port for port in wanted.ports if not port.awaited]
        vnis = spanning(wanted.ports, wanted.networks).values() if wanted.overlay else ()
        overlay.ensure(layout, wanted.overlay, vnis)
        if wanted.overlay is not None and router is not None:
            if self._ear is None:
                self._ear = presence.Ear(layout.namespace, self._hear)
            self._around = links.inside(layout.namespace, lambda: presence.ensure(layout, here, wanted.networks))
            self._ear.heed(self._around.tunnels)
            router.want(Settings.of(layout, wanted.overlay))
        else:
            if self._ear is not None:
                self._ear.close()
                self._ear = None
            links.inside(layout.namespace, presence.forget_routes)
            if router is not None:
                router.want(None)
        self._spanned = wanted.overlay is not None
        if layout.segment:
            segment.answer(layout, [address for port in here for address in port.public_addresses])

    def _hear(self, guest: tuple[int, str] | None) -> None:
        """Another host says that it has this guest."""
        with self._lock:
            try:
                said = {guest} if guest is not None else links.inside(
                    self._layout.namespace, lambda: presence.elsewhere(presence.Surroundings.look()))
                held = self._held
                for port in held.ports if held is not None else ():
                    vni = next((one.vni for one in held.networks if one.number == port.network), 0) if held is not None else 0
                    if (vni, port.mac) in said and not port.awaited:
                        self._lose(port)
            except (SkysailError, OSError) as failure:
                self._held = None  # the next pass looks at everything
                log.warning("a guest that left could not be let go: %s", failure)

    def _lose(self, port: Port) -> None:
        layout, held, around = self._layout, self._held, self._around
        assert held is not None and around is not None
        if time.monotonic() - self._announced.get(port.id, -OVERTAKEN_SECONDS) < OVERTAKEN_SECONDS:
            links.inside(layout.namespace, lambda: presence.announce(layout, around, port, held.networks))
            return
        self._lost.add(port.id)
        self._announced.pop(port.id, None)
        self._settle(port, True, lambda: presence.release(layout, around, port),
                     lambda: segment.go(layout, port.public_addresses))

    def _announce(self, identifier: str) -> None:
        layout = self._layout
        with self._lock:
            held, around = self._held, self._around
            port = next((port for port in held.ports if port.id == identifier), None) if held is not None else None
            if held is None or port is None:
                raise SkysailError(f"port {identifier} does not exist", "apply the port first")
            self._announced[identifier] = time.monotonic()
            self._lost.discard(identifier)
            around = around or links.inside(layout.namespace, presence.Surroundings.look)
            self._settle(port, False, lambda: presence.announce(layout, around, port, held.networks),
                         lambda: segment.come(layout, port.public_addresses))

    def _settle(self, port: Port, awaited: bool, tell: Callable[[], None], answer: Callable[[], None]) -> None:
        """The guest is here, or is not: ``tell`` the other hosts, or let go of it, ``answer`` for it on the segment, or no
        more, and have the rules say the same, all at once, for packets to it go astray until all is done."""
        with ThreadPoolExecutor(2) as beside:
            told = [beside.submit(links.inside, self._layout.namespace, tell)]
            if self._layout.segment:
                told.append(beside.submit(answer))
            self._move(port, awaited)
            for one in told:
                one.result()
        links.inside(self._layout.namespace, lambda: presence.forget(port))

    def _move(self, port: Port, awaited: bool) -> None:
        """The rules have the port here, or elsewhere."""
        held = self._held
        assert held is not None
        if port.awaited != awaited:
            now = msgspec.structs.replace(port, awaited=awaited)
            wanted = msgspec.structs.replace(held, ports=[now if one.id == port.id else one for one in held.ports])
            if not self._change(nftables.moved(now), wanted):
                ruleset = nftables.data_plane(self._layout, wanted.ports, wanted.networks, wanted.overlay is not None)
                links.inside(self._layout.namespace, lambda: self._load("namespace", _origin(wanted), ruleset))
                self._held = wanted

    def _part(self, ports: list[Port], routed: set[int]) -> None:
        """What was joined with peer subnets, and is no more, has no connections left with them."""
        subnets = [IPv4Network(subnet) for subnet in self._layout.peer_subnets]
        now = {port.private_ipv4 for port in ports if port.network in routed} if subnets else set()
        if now != self._routed:
            links.inside(self._layout.namespace, lambda: forget_untranslated(
                {port.private_ipv4 for port in ports},
                lambda guest, other: guest in now and any(IPv4Address(other) in subnet for subnet in subnets)))
            self._routed = now

    def _uplink(self) -> None:
        with links.netlink() as ipr:
            links.ensure_uplink(ipr, self._layout)

    def _load(self, where: str, origin: object, ruleset: str) -> None:
        """Load what is not loaded yet: the ruleset, which was made of ``origin``. The kernel's generation tells whether
        anyone changed rules since we did."""
        if self._loaded.get(where) != (origin, links.generation()):
            links.load(ruleset)
            self._loaded[where] = (origin, links.generation())

    def _open(self, port: Port) -> int:
        try:
            return links.inside(self._layout.namespace, lambda: taps.open_tap(port))
        except FileNotFoundError as missing:
            raise SkysailError(f"the namespace {self._layout.namespace} does not exist", "apply the port first") from missing

    def _listen(self) -> tuple[socket.socket, ...]:
        with self._lock:
            return self._listeners.get()

    def _observe(self) -> dict[str, PortCounters]:
        if not links.exists(self._layout.namespace):
            return {}
        # What the tap sends to the program that holds it is what the guest receives.
        return {owner.port: PortCounters(rx_bytes=link.tx_bytes, tx_bytes=link.rx_bytes)
                for link in links.inside(self._layout.namespace, links.every) if (owner := link.owner)}

    def _joined(self) -> Joined:
        if not links.exists(self._layout.namespace):
            return Joined(reached_by={}, routed=())
        return links.inside(self._layout.namespace, lambda: self._read(
            {tap: owner for tap, owner in ((link.name, link.owner) for link in links.every()) if owner is not None}))

    def _read(self, owners: dict[str, links.Owner]) -> Joined:
        reached: dict[str, list[int]] = {owner.port: [] for owner in owners.values()}
        for tap, number in nftables.elements("bridge", "neighbours"):
            if tap in owners:
                reached[owners[tap].port].append(int(number))
        routed = {address for (address,) in nftables.elements("inet", "peered")} if self._layout.peer_subnets else set()
        return Joined(reached_by={port: tuple(sorted(numbers)) for port, numbers in reached.items()},
                      routed=tuple(sorted(owner.port for owner in owners.values() if owner.private_ipv4 in routed)))

    def _check(self) -> list[str]:
        if os.geteuid() != 0:
            return ["networks are made by root: run with sudo"]
        problems = []
        sample = Port(id="check", mac="52:54:00:00:00:01", network=1, private_ipv4=str(self._layout.gateway + 1),
                      public_ipv4=str(self._layout.machine_address),
                      public_ipv6=str(self._layout.machine_ipv6) if self._layout.public_ipv6 else "", firewall=(
                          FirewallRule(protocol="tcp", from_port=22, to_port=22),
                          FirewallRule(protocol="icmp", from_port=8, to_port=-1),
                          FirewallRule(protocol="icmpv6", from_port=128, to_port=-1)))
        # Not with the users of a single address, which are made when it comes into use.
        plain = msgspec.structs.replace(self._layout, single_address="")
        try:
            plane = nftables.data_plane(plain, [sample], [Network(number=1, peers=(2,), routed=True, vni=1)],
                                        bool(plain.underlay))
            machine = nftables.machine(plain, overlay=Overlay(hosts=("192.0.2.1",)) if plain.underlay else None)
            run(["nft", "--check", "-f", "-"], timeout=20, input=(machine + plane).encode())
        except SkysailError as refused:
            problems.append(f"nftables does not take the ruleset ({refused.what}): "
                            "install nftables 1.0 or newer, and a kernel with nf_tables, nft_nat and nft_fib")
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        except OSError as failure:
            problems.append(f"/dev/net/tun cannot be opened ({failure.strerror}): run modprobe tun, "
                            "or give this container the device")
        if self._layout.public_ipv6 and not (links.SETTINGS / "ipv6").exists():
            problems.append("this kernel has no IPv6: boot without ipv6.disable=1, or set public_ipv6 = '' in skysail.toml")
        if self._layout.underlay:
            problems += frr.problems() + conflicts.underlay(self._layout)
        if not problems:
            problems += conflicts.overlaps(self._layout) + conflicts.foreign_drops(self._layout)
        return problems

    def _teardown(self) -> None:
        if self._router is not None:
            self._router.end()
        with self._lock:
            self._listeners.close()
            if self._ear is not None:
                self._ear.close()
                self._ear = None
            if links.exists(self._layout.namespace):
                links.inside(self._layout.namespace, taps.remove_all)
                overlay.ensure(self._layout, None, ())
            links.remove_link(self._layout)
            links.load(nftables.without("inet", nftables.machine_table(self._layout)))
            links.remove_namespace(self._layout.namespace)
            self._loaded.clear()
            self._held = None
            self._routed = None
            self._announced.clear()
            self._lost.clear()
            self._around = None
            self._spanned = None


def _origin(wanted: Wanted) -> object:
    """What the namespace's rules are made of."""
    return tuple(wanted.ports), tuple(wanted.networks), wanted.overlay is not None


def _left(ports: Sequence[Port]) -> set[str]:
    """Those of the ports, by id, that an earlier agent had here and whose guests another host says it has."""
    made = {link.owner.port for link in links.every() if link.owner}
    said = {mac for _, mac in presence.elsewhere(presence.Surroundings.look())} if made else set()
    return {port.id for port in ports if port.id in made and port.mac in said}
