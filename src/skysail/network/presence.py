"""Where a guest is: here, or on another host. What a host says of its own guests stands in the kernel's tables, from which
its router tells the others (:mod:`skysail.network.frr`); what others say stands in them, too.

Works on the data plane's namespace, which is that of the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from skysail.contract.document import Network, Port
from skysail.network import links
from skysail.network.memory import (
    NTF_EXT_LEARNED,
    NUD_PERMANENT,
    RTM_NEWNEIGH,
    Neighbour,
    family_of,
    forget_connections,
    messages,
    neighbour,
    neighbours,
)
from skysail.network.plan import BRIDGE, Devices, Layout, heard_in, link_local, tap_name

_NUD_REACHABLE, _NUD_NOARP, _NTF_MASTER = 0x02, 0x40, 0x04
_RTMGRP_NEIGH = 0x04
# Routes of ours for the router to tell: RTPROT_BOOT, which no router makes. Their metric becomes what routers compare
# (MULTI_EXIT_DISC, RFC 4271, 5.1.4): the later word has the lower one, so that it counts while a former one is still heard.
_PROTO, _LINK_SCOPE, _EVER = 3, 253, (1 << 32) - 1


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """The devices, by index, that hold what is known of the guests of one network that spans hosts."""

    vni: int
    tunnel: int
    bridge: int
    inner: int


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """All devices that hold what is known: the guests' bridge, taps by name, and the networks that span hosts."""

    bridge: int
    taps: dict[str, int]
    spans: tuple[Span, ...]

    @classmethod
    def look(cls) -> Surroundings:
        held = {link.name: link for link in links.every()}
        vnis = [int(name.removeprefix("net")) for name in held if name.removeprefix("net").isdigit()]
        devices = {vni: Devices.of(vni) for vni in vnis}
        return cls(bridge=held[BRIDGE].index, taps={name: link.index for name, link in held.items() if link.is_tap},
                   spans=tuple(Span(vni=vni, tunnel=held[one.tunnel].index, bridge=held[one.bridge].index,
                                    inner=held[one.inner].index)
                               for vni, one in devices.items() if one.tunnel in held and one.inner in held))

    @property
    def tunnels(self) -> dict[int, int]:
        """Network identifiers, by the index of the tunnel."""
        return {span.tunnel: span.vni for span in self.spans}

    def of(self, port: Port, networks: Sequence[Network]) -> list[Span]:
        """Where this port's guest is to be known."""
        wanted = heard_in(port, networks)
        return [span for span in self.spans if span.vni in wanted]


def elsewhere(around: Surroundings) -> set[tuple[int, str]]:
    """The guests that other hosts say they have: network identifier and MAC."""
    tunnels = around.tunnels
    return {(tunnels[entry.index], entry.mac) for entry in neighbours(socket.AF_BRIDGE) if _told(entry, tunnels)}


def _told(entry: Neighbour, tunnels: dict[int, int]) -> bool:
    return entry.index in tunnels and bool(entry.bridge) and bool(entry.flags & NTF_EXT_LEARNED)


def ensure(layout: Layout, here: Sequence[Port], networks: Sequence[Network]) -> Surroundings:
    """Exactly these guests are said to be here."""
    around = Surroundings.look()
    inner, bridges = {span.inner for span in around.spans}, {span.bridge for span in around.spans}
    macs = {(span.inner, port.mac) for port in here for span in around.of(port, networks)}
    entries = [entry for entry in neighbours(socket.AF_BRIDGE) if entry.bridge]
    held = {(entry.index, entry.mac) for entry in entries if entry.index in inner and not entry.state & NUD_PERMANENT}
    tapped = {(entry.index, entry.mac) for entry in entries if entry.state & _NUD_NOARP}
    addresses = {(span.bridge, port.private_ipv4, port.mac) for port in here for span in around.of(port, networks)}
    known = {(entry.index, entry.address, entry.mac) for entry in neighbours(socket.AF_INET)
             if entry.index in bridges and entry.state & NUD_PERMANENT}
    with links.netlink() as ipr:
        for index, mac in held - macs:
            with _perhaps_gone():
                ipr.fdb("del", ifindex=index, lladdr=mac, flags=_NTF_MASTER)
        for index, address, _ in known - addresses:
            with _perhaps_gone():
                ipr.neigh("del", dst=address, ifindex=index)
        for index, mac in macs - held:
            _claim(ipr, index, mac)
        for index, address, mac in addresses - known:
            _introduce(ipr, index, address, mac)
        for port in here:
            if (around.taps.get(tap_name(port.id)), port.mac) not in tapped:
                _settle(ipr, around, layout, port)
        _ensure_routes(ipr, around.bridge, layout, here)
    return around


def announce(layout: Layout, around: Surroundings, port: Port, networks: Sequence[Network]) -> None:
    """This guest, which was on another host a moment ago, is here. Nothing is looked at that can be done without: its packets
    go astray until this is done."""
    with links.netlink() as ipr:
        for span in around.of(port, networks):
            _claim(ipr, span.inner, port.mac)
            _introduce(ipr, span.bridge, port.private_ipv4, port.mac)
        _settle(ipr, around, layout, port)
        for address in _public(layout, port) if layout.underlay else ():
            _lead(ipr, around.bridge, address)


def release(layout: Layout, around: Surroundings, port: Port) -> None:
    """This guest is on another host now, whatever stands here of it that the router did not replace."""
    with links.netlink() as ipr:
        for address in _public(layout, port):
            _drop(ipr, around.bridge, address)
        tap = around.taps.get(tap_name(port.id))
        if tap is not None:
            with _perhaps_gone():
                ipr.fdb("del", ifindex=tap, lladdr=port.mac, flags=_NTF_MASTER)
        for address in _reached(layout, port):
            with _perhaps_gone():
                ipr.neigh("del", dst=address, ifindex=around.bridge, family=family_of(address))


def forget(port: Port) -> None:
    """No connection to the guest goes on as it was: it was on another host, or is there now. The rules in force find each of
    them anew with its next packet."""
    forget_connections(socket.AF_INET, {port.private_ipv4}, {port.public_ipv4} - {""})


def _settle(ipr: Any, around: Surroundings, layout: Layout, port: Port) -> None:
    """The guests' bridge and the gateway know it at its tap."""
    tap = around.taps.get(tap_name(port.id))
    if tap is not None:
        ipr.fdb("replace", ifindex=tap, lladdr=port.mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        for address in _reached(layout, port):
            ipr.neigh("replace", dst=address, lladdr=port.mac, ifindex=around.bridge, state=NUD_PERMANENT,
                      family=family_of(address))


def _claim(ipr: Any, index: int, mac: str) -> None:
    # Not for good (static): to the router that would mean that it never moves.
    ipr.fdb("replace", ifindex=index, lladdr=mac, state=_NUD_REACHABLE, flags=_NTF_MASTER)


def _introduce(ipr: Any, index: int, address: str, mac: str) -> None:
    ipr.neigh("replace", dst=address, lladdr=mac, ifindex=index, state=NUD_PERMANENT)


def _reached(layout: Layout, port: Port) -> tuple[str, ...]:
    """What the gateway reaches it by."""
    ipv6 = (port.public_ipv6, str(link_local(port.mac))) if layout.public_ipv6 and port.public_ipv6 else ()
    return (port.private_ipv4, *ipv6)


def _public(layout: Layout, port: Port) -> tuple[str, ...]:
    return tuple(address for address in port.public_addresses if layout.public_ipv6 or ":" not in address)


def _ensure_routes(ipr: Any, bridge: int, layout: Layout, here: Iterable[Port]) -> None:
    """One route for each public address that is here. The router tells it; that packets for it find a guest is the work of
    translation (IPv4), or of the prefix's own route (IPv6)."""
    wanted = {address for port in here for address in _public(layout, port)}
    held = set(_routed(ipr, bridge))
    for address in held - wanted:
        _drop(ipr, bridge, address)
    for address in wanted - held:
        _lead(ipr, bridge, address)


def _lead(ipr: Any, bridge: int, address: str) -> None:
    """This address came now, whether it has been here or not."""
    ipr.route("replace", **_route(bridge, address), priority=_EVER - int(time.time()))


def _drop(ipr: Any, bridge: int, address: str) -> None:
    """No route of this address is left, of whatever metric."""
    with _perhaps_gone():
        while True:
            ipr.route("del", **_route(bridge, address))


def _routed(ipr: Any, bridge: int) -> Iterator[str]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in ipr.get_routes(family=family, table=254, oif=bridge, proto=_PROTO):
            if route["proto"] == _PROTO and route.get_attr("RTA_OIF") == bridge and route.get_attr("RTA_DST"):
                yield str(route.get_attr("RTA_DST"))


def _route(bridge: int, address: str) -> dict[str, Any]:
    if ":" in address:
        return {"dst": f"{address}/128", "oif": bridge, "proto": _PROTO, "family": socket.AF_INET6}
    return {"dst": f"{address}/32", "oif": bridge, "proto": _PROTO, "scope": _LINK_SCOPE}


def forget_routes() -> None:
    """No route for single public addresses is left."""
    with links.netlink() as ipr:
        bridge = links.get(ipr, BRIDGE)
        if bridge is not None:
            for address in set(_routed(ipr, bridge.index)):
                _drop(ipr, bridge.index, address)


@contextlib.contextmanager
def _perhaps_gone() -> Iterator[None]:
    """For what somebody else may have removed already."""
    try:
        yield
    except NetlinkError as refused:
        if refused.code not in (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EINVAL):
            raise


class Ear:
    """Hears of guests that another host says it has; calls ``heard`` with network identifier and MAC, or with None when so
    much was said at once that some of it was lost. Lives in a thread of its own until closed."""

    def __init__(self, namespace: str, heard: Callable[[tuple[int, str] | None], None]) -> None:
        self._heard = heard
        self._tunnels: dict[int, int] = {}
        self._ended, self._end = os.pipe()
        self._socket = links.inside(namespace, self._open)
        threading.Thread(target=self._listen, name=f"ear-{namespace}", daemon=True).start()

    def _open(self) -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        made.bind((0, _RTMGRP_NEIGH))
        return made

    def heed(self, tunnels: dict[int, int]) -> None:
        """Listen for these: network identifiers by the index of their tunnel."""
        self._tunnels = tunnels

    def _listen(self) -> None:
        while self._ended not in select.select([self._socket.fileno(), self._ended], [], [])[0]:
            try:
                said = self._socket.recv(1 << 17)
            except OSError as failure:
                if failure.errno != errno.ENOBUFS:
                    raise
                self._heard(None)
                continue
            for kind, message in messages(said):
                if kind == RTM_NEWNEIGH:
                    entry = neighbour(message)
                    if entry.family == socket.AF_BRIDGE and _told(entry, self._tunnels):
                        self._heard((self._tunnels[entry.index], entry.mac))
        self._socket.close()
        os.close(self._ended)

    def close(self) -> None:
        """Hear no more."""
        os.close(self._end)
