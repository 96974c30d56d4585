"""Public addresses on a link that the machine shares with their users: it answers for those that are here, and says so at
once when one comes (RFC 1027, RFC 5227; RFC 4861, 7.2.6 and 7.2.8).

Works on the machine's network namespace, which is that of the calling thread.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from skysail.kit.errors import SkysailError
from skysail.network import links
from skysail.network.memory import NTF_PROXY, family_of, neighbours
from skysail.network.plan import Layout

ARP, IPV6 = 0x0806, 0x86DD
BROADCAST, ALL_HOSTS_MAC, ALL_HOSTS = b"\xff" * 6, bytes.fromhex("333300000001"), IPv6Address("ff02::1")


def answer(layout: Layout, addresses: Iterable[str]) -> None:
    """The machine answers on the segment for exactly these of the cloud's public addresses; it announces those that are new.
    Raises SkysailError when there is no such device."""
    with links.netlink() as ipr:
        device = links.get(ipr, layout.segment)
        if device is None:
            raise SkysailError(f"there is no network device {layout.segment}", "set `segment` in skysail.toml")
        if layout.public_ipv6:
            links.write_setting(f"ipv6/conf/{layout.segment}/proxy_ndp", "1")
        wanted = {address for address in addresses if layout.public_ipv6 or ":" not in address}
        held = {one.address for family in (socket.AF_INET, socket.AF_INET6) for one in neighbours(family, NTF_PROXY)
                if one.index == device.index and one.flags & NTF_PROXY and _ours(layout, one.address)}
        for address in held - wanted:
            with contextlib.suppress(NetlinkError):
                ipr.neigh("del", dst=address, ifindex=device.index, flags=NTF_PROXY, family=family_of(address))
        for address in wanted - held:
            _take(ipr, device, address)
            _announce(layout.segment, address)


def come(layout: Layout, addresses: Iterable[str]) -> None:
    """The machine announces these, and answers for them, too."""
    addresses = [address for address in addresses if layout.public_ipv6 or ":" not in address]
    for address in addresses:  # at once: until then, packets go where it was
        _announce(layout.segment, address)
    with links.netlink() as ipr:
        device = links.get(ipr, layout.segment)
        for address in addresses if device else ():
            if device:
                _take(ipr, device, address)


def go(layout: Layout, addresses: Iterable[str]) -> None:
    """The machine answers for these no more."""
    with links.netlink() as ipr:
        device = links.get(ipr, layout.segment)
        for address in addresses if device else ():
            if device:
                with contextlib.suppress(NetlinkError):
                    ipr.neigh("del", dst=address, ifindex=device.index, flags=NTF_PROXY, family=family_of(address))


def _ours(layout: Layout, address: str) -> bool:
    one = ip_address(address)
    return one in IPv4Network(layout.public_pool) if one.version == 4 else bool(
        layout.public_ipv6) and one in IPv6Network(layout.public_ipv6)


def _take(ipr: Any, device: links.Link, address: str) -> None:
    ipr.neigh("replace", dst=address, ifindex=device.index, flags=NTF_PROXY, family=family_of(address))


def _announce(device: str, address: str) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire, contextlib.suppress(OSError):
        wire.bind((device, 0))
        mac = wire.getsockname()[4]  # packet(7): its hardware address
        wire.send(_advertisement(mac, address) if ":" in address else _gratuitous(mac, address))


def _gratuitous(mac: bytes, address: str) -> bytes:
    """An ARP announcement (RFC 5227, 3)."""
    ours = socket.inet_aton(address)
    return BROADCAST + mac + struct.pack("!HHHBBH6s4s6s4s", ARP, 1, 0x0800, 6, 4, 1, mac, ours, bytes(6), ours)


def _advertisement(mac: bytes, address: str) -> bytes:
    """An unsolicited neighbour advertisement that overrides what its readers knew (RFC 4861, 4.4)."""
    source = IPv6Address(address).packed
    body = struct.pack("!BBHI16sBB6s", 136, 0, 0, 0x20000000, source, 2, 1, mac)
    ends = source + ALL_HOSTS.packed
    total = sum(struct.unpack("!36H", ends + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6) + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    return ALL_HOSTS_MAC + mac + struct.pack("!HIHBB", IPV6, 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + ends + body
