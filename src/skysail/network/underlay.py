"""The network between hosts that are all on one machine, for development: each host is a network namespace, and a bridge in a
namespace of its own joins them with each other and with the machine.

It is the segment that public addresses are on, too: the upper half of its addresses is the pool, and so the machine reaches
every instance, on whichever host. For the rest of the world they are all the machine.

Source: ip-netns(8), ip-link(8), nft(8). Namespaces and devices are named ``NAME-…`` and ``NAME0``.
"""

from __future__ import annotations

import ipaddress
from itertools import islice
from pathlib import Path

from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network import links
from skysail.network.nftables import without

NAMESPACES = Path("/run/netns")
# Where the hosts' addresses begin in the network; the machine has the first one.
FIRST = 10
# The kernel's bound for a device's name is 15.
MAX_NAME = 12
DEVICE = "eth0"  # a host's, in the network
# Room for whole packets of guests and what a tunnel puts before them; what is no tunnel's stays as large as a guest's.
MTU, GUEST_MTU = 1600, 1500


class Underlay:
    """Hosts are known by their number, from 1 on."""

    def __init__(self, name: str, network: str) -> None:
        """Raises SkysailError for a name or a network that cannot be had."""
        if not name.isalnum() or len(name) > MAX_NAME:
            raise SkysailError(f"{name!r} is no name for a fleet", f"it takes up to {MAX_NAME} letters and digits")
        try:
            self._network = ipaddress.IPv4Network(network)
        except ValueError as wrong:
            raise SkysailError(f"{network!r} is no network: {wrong}", "it is like 100.115.94.0/24") from wrong
        self.name = name
        self._bridge = f"{name}-net"
        self._device = f"{name}0"
        self._table = f"{name}_net"
        self._hosts_ipv6 = self._ipv6(1)

    @property
    def machine_address(self) -> str:
        """Where the hosts reach this machine."""
        return str(self._network[1])

    @property
    def pool(self) -> str:
        """The public addresses of instances."""
        return str(next(islice(self._network.subnets(), 1, None)))

    @property
    def prefix(self) -> str:
        """The public IPv6 addresses of instances: unique local ones (RFC 4193) that follow from the network; '' on a kernel
        without IPv6."""
        return str(self._ipv6(0)) if (links.SETTINGS / "ipv6").exists() else ""

    def address(self, number: int) -> str:
        """Where a host is reached."""
        return str(self._network[FIRST + number])

    def namespace(self, number: int) -> str:
        """The namespace that is the host."""
        return f"{self.name}-{number}"

    def entering(self, number: int) -> list[str]:
        """What a program on the host is started by. It shares all with this machine but the network: ip-netns(8) would hide
        the control groups from it."""
        return ["nsenter", f"--net={NAMESPACES / self.namespace(number)}", "--"]

    def ensure(self, count: int) -> None:
        """The hosts 1 to ``count`` are there, and reach each other, this machine, and by it the rest of the world. Others
        that are there stay."""
        if FIRST + count >= self._network.num_addresses // 2:
            raise SkysailError(f"{self._network} has no room for {count} hosts", "use a larger network: --underlay")
        if not self._there(self._bridge):
            self._make(self._bridge)
            self._ip("-n", self._bridge, "link", "add", "br0", "up", "mtu", str(MTU), "type", "bridge")
            self._ip("link", "add", self._device, "mtu", str(MTU), "type", "veth",
                     "peer", "name", "p0", "netns", self._bridge, "mtu", str(MTU))
            self._ip("-n", self._bridge, "link", "set", "p0", "master", "br0", "up")
            self._address((), self._device, 1)
            self._ip("route", "add", self.pool, "dev", self._device, "mtu", str(GUEST_MTU))
            if self.prefix:
                self._ip("route", "add", self.prefix, "dev", self._device, "mtu", str(GUEST_MTU))
        self._lead_out()
        for number in range(1, count + 1):
            name = self.namespace(number)
            if self._there(name):
                continue
            self._make(name)
            self._ip("-n", self._bridge, "link", "add", f"p{number}", "mtu", str(MTU), "type", "veth",
                     "peer", "name", DEVICE, "netns", name, "mtu", str(MTU))
            self._ip("-n", self._bridge, "link", "set", f"p{number}", "master", "br0", "up")
            self._address(("-n", name), DEVICE, FIRST + number)
            self._ip("-n", name, "route", "add", "default", "via", self.machine_address)
            if self.prefix:
                self._ip("-n", name, "route", "add", "default", "via", str(self._hosts_ipv6[1]))

    def remove(self) -> None:
        """Nothing of it is left; its devices go with their namespaces."""
        for path in sorted(NAMESPACES.glob(f"{self.name}-*")):
            if path.name == self._bridge or path.name.removeprefix(f"{self.name}-").isdigit():
                self._ip("netns", "delete", path.name)
        links.load(without("inet", self._table))

    def _address(self, where: tuple[str, ...], device: str, number: int) -> None:
        """The device has the addresses of this number, and is up."""
        self._ip(*where, "address", "add", f"{self._network[number]}/{self._network.prefixlen}", "dev", device)
        if self.prefix:
            self._ip(*where, "address", "add", f"{self._hosts_ipv6[number]}/64", "dev", device, "nodad")
        self._ip(*where, "link", "set", device, "up")

    def _lead_out(self) -> None:
        """What hosts and instances say to the rest of the world, the machine says."""
        links.write_setting("ipv4/ip_forward", "1")
        outward = f'oifname != {{ "{self._device}", "lo" }}'
        ipv6 = f"\n        {outward} ip6 saddr {{ {self.prefix}, {self._hosts_ipv6} }} masquerade" if self.prefix else ""
        if self.prefix:
            links.forward_ipv6()
        links.load(f"""{without("inet", self._table)}
table inet {self._table} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        {outward} ip saddr {self._network} masquerade{ipv6}
    }}
}}
""")

    def _ipv6(self, group: int) -> ipaddress.IPv6Network:
        octets = bytes.fromhex("fd536b79") + self._network[group].packed
        return ipaddress.IPv6Network((octets.ljust(16, b"\0"), 64))

    def _make(self, name: str) -> None:
        self._ip("netns", "add", name)
        self._ip("-n", name, "link", "set", "lo", "up")

    def _there(self, name: str) -> bool:
        return (NAMESPACES / name).exists()

    def _ip(self, *words: str) -> None:
        run(["ip", *words], timeout=30)
