"""The network of a Linux machine: guests' taps in a namespace of their own, one ruleset over them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

import msgspec

from skysail.contract.document import FirewallRule, Network, Port
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network import Joined, PortCounters, conflicts, links, nftables, taps
from skysail.network.listeners import Listeners
from skysail.network.memory import forget_untranslated
from skysail.network.plan import Layout


class LinuxFabric:
    """The data plane of one host. Netlink blocks, so all work is done in threads, one piece of it at a time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()  # held by the thread: work goes on when the task that asked for it is cancelled
        # What each table was made of, and the kernel's generation of rules since then.
        self._loaded: dict[str, tuple[object, int]] = {}
        self._held: tuple[list[Port], list[Network]] | None = None  # as they were last applied
        # The private addresses that peer subnets reach; None before the first time, when an earlier agent's may be left.
        self._routed: set[str] | None = None
        self._listeners = Listeners(layout)

    async def apply(self, ports: Sequence[Port], networks: Sequence[Network] = ()) -> None:
        """See :class:`skysail.network.Fabric`. Raises SkysailError; then the rules are the former ones."""
        await asyncio.to_thread(self._apply, list(ports), list(networks))

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

    def _apply(self, ports: list[Port], networks: list[Network]) -> None:
        layout = self._layout
        with self._lock:
            if self._change_firewalls(ports, networks):
                return
            ruleset = nftables.data_plane(layout, ports, networks)
            self._held = None
            links.ensure_namespace(layout.namespace)
            # Rules come before devices on both sides: there is no moment in which something passes unchecked.
            machine = nftables.machine(layout, ports)
            self._load("machine", machine, machine)
            links.inside(layout.namespace, lambda: self._inner(ruleset, ports, networks))
            with links.netlink() as ipr:
                links.ensure_link(ipr, layout)
                links.inside(layout.namespace, self._uplink)
                links.ensure_routes(ipr, layout)
            self._part(ports, {network.number for network in networks if network.routed})
            self._held = (ports, networks)

    def _change_firewalls(self, ports: list[Port], networks: list[Network]) -> bool:
        """Where only firewalls differ from what was applied, load what differs; says whether that was all. The devices are
        looked at again with the next whole pass, which is made at the latest when it is asked for without a difference."""
        if self._held is None or networks != self._held[1] or ports == self._held[0]:
            return False
        text = nftables.firewall_changes(self._layout, self._held[0], ports)
        if text is None:
            return False

        def load() -> bool:
            if self._loaded["namespace"][1] != links.generation():
                return False  # somebody else changed rules: what there is now is not what this change starts from
            links.load(text)
            self._loaded["namespace"] = ((tuple(ports), tuple(networks)), links.generation())
            return True

        try:
            if not links.inside(self._layout.namespace, load):
                return False
        except (OSError, SkysailError):
            return False  # the whole ruleset says what is wrong, or puts it right
        self._held = (ports, networks)
        return True

    def _inner(self, ruleset: str, ports: list[Port], networks: list[Network]) -> None:
        for path, value in links.NAMESPACE_SETTINGS.items():
            links.write_setting(path, value)
        self._load("namespace", (tuple(ports), tuple(networks)), ruleset)
        with links.netlink() as ipr:
            links.ensure_bridge(ipr, self._layout)
            taps.ensure(ipr, self._layout, ports)

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
            plane = nftables.data_plane(plain, [sample], [Network(number=1, peers=(2,), routed=True)])
            run(["nft", "--check", "-f", "-"], timeout=20, input=(nftables.machine(plain) + plane).encode())
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
        if not problems:
            problems += conflicts.overlaps(self._layout) + conflicts.foreign_drops(self._layout)
        return problems

    def _teardown(self) -> None:
        with self._lock:
            self._listeners.close()
            if links.exists(self._layout.namespace):
                links.inside(self._layout.namespace, taps.remove_all)
            links.remove_link(self._layout)
            links.load(nftables.without("inet", nftables.machine_table(self._layout)))
            links.remove_namespace(self._layout.namespace)
            self._loaded.clear()
            self._held = None
            self._routed = None
