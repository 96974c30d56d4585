"""The network of a Linux machine: guests' taps in a namespace of their own, one ruleset over them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Sequence

from skysail.contract.document import FirewallRule, Port
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network import PortCounters, links, nftables
from skysail.network.listeners import Listeners
from skysail.network.plan import Layout


class LinuxFabric:
    """The data plane of one host. Netlink blocks, so all work is done in threads, one piece of it at a time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()  # held by the thread: work goes on when the task that asked for it is cancelled
        self._loaded: dict[str, tuple[str, int]] = {}
        self._listeners = Listeners(layout)

    async def apply(self, ports: Sequence[Port]) -> None:
        """See :class:`skysail.network.Fabric`. Raises SkysailError; then the rules are the former ones."""
        await asyncio.to_thread(self._apply, list(ports))

    async def open_port(self, port: Port) -> int:
        return await asyncio.to_thread(self._open, port)

    async def listen(self) -> tuple[socket.socket, ...]:
        return await asyncio.to_thread(self._listen)

    async def observe(self) -> dict[str, PortCounters]:
        return await asyncio.to_thread(self._observe)

    async def check(self) -> list[str]:
        return await asyncio.to_thread(self._check)

    async def teardown(self) -> None:
        """Nothing of the data plane is left; guests that run lose their network for good."""
        await asyncio.to_thread(self._teardown)

    def _apply(self, ports: list[Port]) -> None:
        layout = self._layout
        ruleset = nftables.data_plane(layout, ports)
        with self._lock:
            links.ensure_namespace(layout.namespace)
            # Rules come before devices on both sides: there is no moment in which something passes unchecked.
            self._load("machine", nftables.machine(layout))
            links.inside(layout.namespace, lambda: self._inner(ruleset, ports))
            with links.netlink() as ipr:
                links.ensure_link(ipr, layout)
                links.inside(layout.namespace, self._uplink)
                links.ensure_routes(ipr, layout)

    def _inner(self, ruleset: str, ports: list[Port]) -> None:
        for path, value in links.NAMESPACE_SETTINGS.items():
            links.write_setting(path, value)
        self._load("namespace", ruleset)
        with links.netlink() as ipr:
            links.ensure_bridge(ipr, self._layout)
            links.ensure_taps(ipr, self._layout, ports)

    def _uplink(self) -> None:
        with links.netlink() as ipr:
            links.ensure_uplink(ipr, self._layout)

    def _load(self, where: str, ruleset: str) -> None:
        """Load what is not loaded yet. The kernel's generation tells whether anyone changed rules since we did."""
        if self._loaded.get(where) != (ruleset, links.generation()):
            links.load(ruleset)
            self._loaded[where] = (ruleset, links.generation())

    def _open(self, port: Port) -> int:
        try:
            return links.inside(self._layout.namespace, lambda: links.open_tap(port))
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

    def _check(self) -> list[str]:
        if os.geteuid() != 0:
            return ["networks are made by root: run with sudo"]
        problems = []
        sample = Port(id="check", mac="52:54:00:00:00:01", tenant=1, private_ipv4=str(self._layout.gateway + 1),
                      public_ipv4=str(self._layout.machine_address),
                      public_ipv6=str(self._layout.machine_ipv6) if self._layout.public_ipv6 else "", firewall=(
                          FirewallRule(protocol="tcp", from_port=22, to_port=22),
                          FirewallRule(protocol="icmp", from_port=8, to_port=-1),
                          FirewallRule(protocol="icmpv6", from_port=128, to_port=-1)))
        try:
            run(["nft", "--check", "-f", "-"], timeout=20,
                input=(nftables.machine(self._layout) + nftables.data_plane(self._layout, [sample])).encode())
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
            problems += links.overlaps(self._layout) + links.foreign_drops(self._layout)
        return problems

    def _teardown(self) -> None:
        with self._lock:
            self._listeners.close()
            if links.exists(self._layout.namespace):
                links.inside(self._layout.namespace, links.remove_taps)
            links.remove_link(self._layout)
            links.load(nftables.without("inet", nftables.machine_table(self._layout)))
            links.remove_namespace(self._layout.namespace)
            self._loaded.clear()
