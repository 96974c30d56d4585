"""The devices of networks that span hosts: for each a tunnel (VXLAN, RFC 7348), a bridge that knows on which host each of its
guests is, and its place on the guests' bridge.

The tunnels are in the data plane's namespace, but their packets are the machine's: the kernel keeps a tunnel's socket in the
namespace that it was made from. Nothing is learnt from packets, neither by bridge nor by tunnel: what other hosts have is
told by BGP (:mod:`skysail.network.frr`), what is here by :mod:`skysail.network.presence`.

Packets of 1500 bytes always pass: where the underlay takes no more than that, the outer packet is fragmented.

Source: ip-link(8), "VXLAN Type Support"; bridge(8), neigh_suppress.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from skysail.contract.document import Overlay
from skysail.network import links
from skysail.network.links import Link
from skysail.network.plan import BRIDGE, FABRIC, MTU, UPLINK, VXLAN_PORT, Devices, Layout

# What a bridge was told of a guest stays until it is told otherwise; in hundredths of a second, as the kernel takes it.
_AGEING = 2_000_000_000
_LOCAL_TABLE, _LOCAL = 255, 2


def ensure(layout: Layout, overlay: Overlay | None, vnis: Iterable[int]) -> None:
    """The devices of exactly these networks are in the data plane's namespace, and without an ``overlay`` none. Called in the
    machine's; the namespace and the guests' bridge are there."""
    wanted = {vni: Devices.of(vni) for vni in vnis} if overlay is not None else {}
    held = {link.name: link for link in links.inside(layout.namespace, links.every)}
    tunnels = {one.tunnel: vni for vni, one in wanted.items()} | ({Devices.of(overlay.vni).tunnel: overlay.vni} if overlay
                                                                   else {})
    doomed = [link for link in held.values() if _left_over(link, set(tunnels), wanted.values(), overlay)]
    doomed += [held[name] for name, vni in tunnels.items() if name in held and held[name].alias != _note(layout, vni)]
    if doomed:
        links.inside(layout.namespace, lambda: _remove(doomed))
    missing = {name: vni for name, vni in tunnels.items() if name not in held or held[name] in doomed}
    with links.netlink() as ipr:
        for name, vni in missing.items():
            ipr.link("add", ifname=name, kind="vxlan", vxlan_id=vni, vxlan_local=layout.underlay, vxlan_port=VXLAN_PORT,
                     vxlan_learning=0, mtu=MTU, net_ns_fd=layout.namespace)
    if overlay is not None:
        links.inside(layout.namespace, lambda: _inner(layout, overlay, wanted))


def _remove(doomed: Iterable[Link]) -> None:
    for link in doomed:
        links.remove(link.name)


def _note(layout: Layout, vni: int) -> str:
    """What a finished tunnel has for its alias: a half-made one, and one of another underlay, are made anew."""
    return f"{layout.underlay} {vni}"


def _left_over(link: Link, tunnels: set[str], wanted: Iterable[Devices], overlay: Overlay | None) -> bool:
    """Is it of a kind that only the overlay has, and of no network that is wanted? One end of a pair takes the other with
    it."""
    if link.kind == "vxlan":
        return link.name not in tunnels
    if link.kind == "veth":
        return link.name.startswith("out") and link.name not in {one.port for one in wanted}
    if link.kind == "bridge" and link.name == FABRIC:
        return overlay is None
    return link.kind == "bridge" and link.name.startswith("net") and link.name not in {one.bridge for one in wanted}


def _inner(layout: Layout, overlay: Overlay, wanted: dict[int, Devices]) -> None:
    with links.netlink() as ipr:
        held = links.links(ipr)
        for vni, one in wanted.items():
            bridge = _bridge(ipr, held, one.bridge)
            if one.port not in held:
                ipr.link("add", ifname=one.port, kind="veth", peer={"ifname": one.inner})
                held = links.links(ipr)
            # A frame for no guest here is for the network's own bridge, which sends it to the host of its guest, or drops it.
            # An ARP request for a guest that it was told of ends there, too: it answers itself (RFC 9161).
            _enslave(ipr, held[one.port], held[BRIDGE].index, learning=0)
            _enslave(ipr, held[one.inner], bridge, learning=0)
            _enslave(ipr, held[one.tunnel], bridge, learning=0, unicast_flood=0, neigh_suppress=1)
            _finish(ipr, held[one.tunnel], _note(layout, vni))
        _fabric(ipr, held, layout, overlay)
        _ways(ipr, held[UPLINK].index, layout, overlay)


def _ways(ipr: Any, uplink: int, layout: Layout, overlay: Overlay) -> None:
    """To each host its own way by the machine, where the common one leads, too. FRR looks at every route anew whenever any
    device goes down, and as long as it looks at the common one it takes all that depends on it for unreachable."""
    wanted = {*overlay.hosts, *overlay.reflectors, *(router for router, _ in layout.routers)} - {layout.underlay}
    held = {str(route.get_attr("RTA_DST")) for route in ipr.get_routes(family=socket.AF_INET, table=254, oif=uplink)
            if route["dst_len"] == 32 and route.get_attr("RTA_OIF") == uplink}
    for address in held - wanted:
        ipr.route("del", dst=f"{address}/32", oif=uplink)
    for address in wanted - held:
        ipr.route("add", dst=f"{address}/32", gateway=str(layout.machine_address), oif=uplink)


def _fabric(ipr: Any, held: dict[str, Link], layout: Layout, overlay: Overlay) -> None:
    """The way to public addresses on other hosts. It has the machine's underlay address for one reason: FRR takes a session's
    own address for one of a device that it knows. The kernel shall not: packets for that address go to the machine."""
    bridge = _bridge(ipr, held, FABRIC, layout.fabric_mac)
    links.ensure_addresses(ipr, bridge, f"{layout.underlay}/32")
    with contextlib.suppress(NetlinkError):  # gone already
        ipr.route("del", dst=f"{layout.underlay}/32", oif=bridge, table=_LOCAL_TABLE, type=_LOCAL, scope=254, proto=2)
    if layout.public_ipv6:
        links.enable_ipv6(FABRIC)
    else:
        links.write_setting(f"ipv6/conf/{FABRIC}/disable_ipv6", "1")
    tunnel = held[Devices.of(overlay.vni).tunnel]
    _enslave(ipr, tunnel, bridge, learning=0, unicast_flood=0)
    _finish(ipr, tunnel, _note(layout, overlay.vni))


def _bridge(ipr: Any, held: dict[str, Link], name: str, mac: str = "") -> int:
    link = held.get(name)
    if link is None:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0,
                 br_ageing_time=_AGEING, **({"address": mac} if mac else {}))
        link = links.links(ipr)[name]
    if mac and link.mac != mac:
        ipr.link("set", index=link.index, address=mac)
    if not link.up:
        ipr.link("set", index=link.index, state="up")
    return link.index


def _enslave(ipr: Any, link: Link, bridge: int, **traits: int) -> None:
    if link.master != bridge or not link.up:
        ipr.link("set", index=link.index, master=bridge, state="up")
        ipr.brport("set", index=link.index, **traits)


def _finish(ipr: Any, tunnel: Link, note: str) -> None:
    if tunnel.alias != note:
        ipr.link("set", index=tunnel.index, IFLA_IFALIAS=note)
