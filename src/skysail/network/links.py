"""Namespaces, bridge and veth: what the kernel holds, changed through netlink; the taps are in :mod:`skysail.network.taps`.

Every function here works on the network namespace of the calling thread; :func:`inside` gives a call a thread of its own
in another one. All are idempotent, also over what a killed process left half-made.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skysail.contract.document import Port
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run
from skysail.network.memory import family_of
from skysail.network.plan import (
    BRIDGE,
    GATEWAY_IPV6,
    MACHINE_LINK_IPV6,
    METADATA,
    METADATA_IPV6,
    NAMESPACE_LINK_IPV6,
    TAP_PREFIX,
    UPLINK,
    Layout,
)

T = TypeVar("T")
NAMESPACES, SETTINGS = Path("/run/netns"), Path("/proc/sys/net")
CLONE_NEWNET = 0x40000000
IFF_UP = 1
# linux/netfilter/nf_tables.h
NFT_GETGEN, NFTA_GEN_ID = (10 << 8) | 16, 1

# Bridged frames stay out of the ip hooks (another program may have loaded br_netfilter); guests are told no shortcuts past
# the gateway, which answers only for its own address and only where a source belongs. IPv6 is off but for the two devices
# that are given addresses (see enable_ipv6): a tap has no address of its own.
NAMESPACE_SETTINGS = {
    "ipv4/ip_forward": "1",  # guests' packets pass from bridge to uplink and back
    "ipv4/conf/all/rp_filter": "1", "ipv4/conf/default/rp_filter": "1",
    "ipv4/conf/all/send_redirects": "0", "ipv4/conf/default/send_redirects": "0",
    "ipv4/conf/all/accept_redirects": "0", "ipv4/conf/default/accept_redirects": "0",
    "ipv4/conf/all/arp_ignore": "1", "ipv4/conf/default/arp_ignore": "1",
    "ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1",
    "ipv6/conf/all/forwarding": "1",
    "bridge/bridge-nf-call-iptables": "0", "bridge/bridge-nf-call-ip6tables": "0", "bridge/bridge-nf-call-arptables": "0",
}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a finished tap was made for: what the kernel was told of the port, to be forgotten with it. "-" is no address."""

    port: str
    mac: str
    private_ipv4: str
    public_ipv4: str
    public_ipv6: str

    @classmethod
    def of(cls, port: Port) -> Owner:
        return cls(port=port.id, mac=port.mac, private_ipv4=port.private_ipv4, public_ipv4=port.public_ipv4,
                   public_ipv6=port.public_ipv6)

    @classmethod
    def read(cls, alias: str) -> Owner | None:
        """The reverse of str(): the owner noted on a tap, None on a half-made one."""
        words = alias.rsplit(" ", 4 if ":" in alias.rpartition(" ")[2] else 3)
        if len(words) < 4:
            return None
        return cls(port=words[0], mac=words[1], private_ipv4=words[2], public_ipv4=words[3].replace("-", ""),
                   public_ipv6="".join(words[4:]))

    def agrees(self, other: Owner | None, version: Literal[4, 6]) -> bool:
        """Whether the other one is the same port, and has the same addresses of this version of IP."""
        if other is None or (self.port, self.mac) != (other.port, other.mac):
            return False
        if version == 6:
            return self.public_ipv6 == other.public_ipv6
        return (self.private_ipv4, self.public_ipv4) == (other.private_ipv4, other.public_ipv4)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.port, self.mac, self.private_ipv4, self.public_ipv4 or "-",
                                      self.public_ipv6)))


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A network device as the kernel shows it; ``alias`` is what we noted on it."""

    name: str
    index: int
    kind: str
    alias: str
    up: bool
    mtu: int
    master: int
    peer: int
    mac: str
    rx_bytes: int
    tx_bytes: int

    @property
    def is_tap(self) -> bool:
        return self.kind == "tun" and self.name.startswith(TAP_PREFIX)

    @property
    def owner(self) -> Owner | None:
        return Owner.read(self.alias) if self.is_tap else None


def inside(namespace: str, call: Callable[[], T]) -> T:
    """What ``call`` answers (or raises) in the named namespace.

    It runs in a thread that ends with it: a thread that lives on would carry the namespace into other work, and child
    processes inherit it, which is how nft gets there.
    """
    outcome: Future[T] = Future()

    def enter() -> None:
        try:
            descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
            finally:
                os.close(descriptor)
            outcome.set_result(call())
        except BaseException as failure:
            outcome.set_exception(failure)

    thread = threading.Thread(target=enter, name=f"in-{namespace}")
    thread.start()
    thread.join()
    return outcome.result()


def exists(namespace: str) -> bool:
    """Is there a namespace of that name that can be entered? False for a name whose mount is missing."""
    try:
        inside(namespace, lambda: None)
    except FileNotFoundError:
        return False
    except OSError as failure:
        if failure.errno == errno.EINVAL:
            return False
        raise
    return True


def ensure_namespace(name: str) -> None:
    """The namespace exists; a name left without its mount is made anew."""
    for last in (False, False, True):
        if exists(name):
            return
        try:
            (NAMESPACES / name).unlink(missing_ok=True)
            run(["ip", "netns", "add", name], timeout=20)
        except (OSError, ProcessFailed):
            # The `ip` of an agent that was killed lives on, and may finish its work between our look and our own.
            if last and not exists(name):
                raise


def remove_namespace(name: str) -> None:
    """The name is gone; the namespace itself lives as long as a process holds one of its devices."""
    if exists(name):
        run(["ip", "netns", "delete", name], timeout=20)
    (NAMESPACES / name).unlink(missing_ok=True)


def write_setting(path: str, value: str) -> None:
    """A kernel setting under /proc/sys/net; one that this kernel does not have is left out, a true one not rewritten."""
    file = SETTINGS / path
    with contextlib.suppress(FileNotFoundError):
        if file.read_text().strip() != value:
            file.write_text(value)


def generation() -> int:
    """The number that the kernel gives to a namespace's rules; every change to them, by anyone, makes another one."""
    request = struct.pack("=IHHII", 20, NFT_GETGEN, 1, 1, 0) + struct.pack("=BBH", 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12) as netfilter:  # NETLINK_NETFILTER
        netfilter.bind((0, 0))
        netfilter.send(request)
        answer = netfilter.recv(4096)
    offset, end = 20, struct.unpack_from("=I", answer)[0]
    while offset + 8 <= end:
        length, kind = struct.unpack_from("=HH", answer, offset)
        if kind == NFTA_GEN_ID:
            return int(struct.unpack_from(">I", answer, offset + 4)[0])
        offset += (length + 3) & ~3
    raise SkysailError("the kernel did not tell the generation of its rules", "nftables needs a kernel of 4.9 or newer")


def load(ruleset: str) -> None:
    """Replace the tables that ``ruleset`` names, all or nothing; raises ProcessFailed with nft's words."""
    run(["nft", "-f", "-"], input=ruleset.encode(), timeout=120)


@contextlib.contextmanager
def netlink() -> Iterator[Any]:
    """A netlink socket in the thread's namespace; the kernel's refusals come out as SkysailError."""
    try:
        with IPRoute() as socket_:
            yield socket_
    except NetlinkError as refused:
        cure = "run as root: sudo ./skysail up" if refused.code in (errno.EPERM, errno.EACCES) else ""
        raise SkysailError(f"the kernel refused a change to the network: {refused}", cure) from refused


def links(ipr: Any) -> dict[str, Link]:
    """All devices by name."""
    return {link.name: link for link in map(_link, ipr.get_links())}


def get(ipr: Any, name: str) -> Link | None:
    """One device; None when there is none of that name."""
    try:
        return next(map(_link, ipr.link("get", ifname=name)), None)
    except NetlinkError as refused:
        if refused.code == errno.ENODEV:
            return None
        raise


def _must(ipr: Any, name: str) -> Link:
    link = get(ipr, name)
    if link is None:
        raise SkysailError(f"the network device {name} vanished", "apply again")
    return link


def _link(message: Any) -> Link:
    info, counted = message.get_attr("IFLA_LINKINFO"), message.get_attr("IFLA_STATS64") or {}
    return Link(
        name=message.get_attr("IFLA_IFNAME"), index=message["index"], alias=message.get_attr("IFLA_IFALIAS") or "",
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "", up=bool(message["flags"] & IFF_UP),
        mtu=message.get_attr("IFLA_MTU") or 0, master=message.get_attr("IFLA_MASTER") or 0,
        peer=message.get_attr("IFLA_LINK") or 0, mac=message.get_attr("IFLA_ADDRESS") or "",
        rx_bytes=counted.get("rx_bytes", 0), tx_bytes=counted.get("tx_bytes", 0))


def ensure_bridge(ipr: Any, layout: Layout) -> Link:
    """The bridge of the guests, with the addresses of gateway and metadata. No STP: it has no loops, and a guest must not
    speak it."""
    held = get(ipr, BRIDGE)
    if held is not None and held.kind != "bridge":
        ipr.link("del", index=held.index)
        held = None
    if held is None:
        # 0xfff8: link-local destinations go the ordinary way through the hooks instead of past them.
        ipr.link("add", ifname=BRIDGE, kind="bridge", address=layout.gateway_mac, br_stp_state=0, br_forward_delay=0,
                 br_mcast_snooping=0, br_group_fwd_mask=0xFFF8)
        held = _must(ipr, BRIDGE)
    if held.mac != layout.gateway_mac:
        ipr.link("set", index=held.index, address=layout.gateway_mac)
    ensure_addresses(ipr, held.index, f"{layout.gateway}/{layout.private_prefix}", f"{METADATA}/32")
    if not held.up:
        ipr.link("set", index=held.index, state="up")
    # The kernel makes this one with the address, and does not make it again.
    ipr.route("replace", dst=layout.private_network, oif=held.index, scope=253, prefsrc=str(layout.gateway))
    if layout.public_ipv6:
        enable_ipv6(BRIDGE)
        ensure_addresses(ipr, held.index, f"{GATEWAY_IPV6}/64", f"{layout.namespace_ipv6}/128", f"{METADATA_IPV6}/128")
        ipr.route("replace", dst=layout.public_ipv6, oif=held.index, family=socket.AF_INET6)
    else:
        write_setting(f"ipv6/conf/{BRIDGE}/disable_ipv6", "1")
    return held


def enable_ipv6(device: str) -> None:
    """The device takes the IPv6 addresses that it is given, usable at once, and makes or learns none by itself.

    Raises SkysailError on a kernel without IPv6.
    """
    if not (SETTINGS / "ipv6").exists():
        raise SkysailError("this kernel has no IPv6", "boot without ipv6.disable=1, or set public_ipv6 = '' in skysail.toml")
    # In this order: with its switch on, the device would make an address of its own.
    for name, value in (("addr_gen_mode", "1"), ("accept_ra", "0"), ("accept_redirects", "0"), ("accept_dad", "0"),
                        ("disable_ipv6", "0")):
        write_setting(f"ipv6/conf/{device}/{name}", value)


def ensure_addresses(ipr: Any, index: int, *wanted: str) -> None:
    """The device has exactly these addresses (with their prefix lengths), all of one family; none of that family beside."""
    family = family_of(wanted[0])
    held = {f"{found.get_attr('IFA_LOCAL') or found.get_attr('IFA_ADDRESS')}/{found['prefixlen']}"
            for found in ipr.get_addr(family=family, index=index)}
    for other in held - set(wanted):
        address, _, prefix = other.partition("/")
        ipr.addr("del", index=index, address=address, prefixlen=int(prefix), family=family)
    for missing in [one for one in wanted if one not in held]:
        address, _, prefix = missing.partition("/")
        # broadcast=None: pyroute2 would derive one; IPv6 has none.
        ipr.addr("add", index=index, address=address, prefixlen=int(prefix), family=family,
                 **({"broadcast": None} if family == socket.AF_INET else {}))


def ensure_link(ipr: Any, layout: Layout) -> None:
    """The veth pair between machine (this side) and namespace; what stands in its way is removed only if it is ours.

    Raises SkysailError when a device of that name, or a route to the pool, belongs to somebody else.
    """
    held = get(ipr, layout.link)
    uplink = inside(layout.namespace, lambda: find(UPLINK))
    paired = held is not None and uplink is not None and (held.peer, uplink.peer) == (uplink.index, held.index)
    alias = f"skysail {layout.namespace}"
    if held is not None and not paired:
        if held.alias != alias:
            raise SkysailError(f"the network device {layout.link} exists and is not Skysail's",
                               "choose another `link` in skysail.toml, or remove the device")
        ipr.link("del", index=held.index)  # its other end is in a namespace that lost its name
    if not paired:
        if uplink is not None:
            inside(layout.namespace, lambda: remove(UPLINK))
        ipr.link("add", ifname=layout.link, kind="veth",
                 peer={"ifname": UPLINK, "net_ns_fd": layout.namespace})
        held = _must(ipr, layout.link)
    assert held is not None
    if held.alias != alias:
        ipr.link("set", index=held.index, IFLA_IFALIAS=alias)
    write_setting(f"ipv4/conf/{layout.link}/rp_filter", "1")
    write_setting(f"ipv4/conf/{layout.link}/send_redirects", "0")
    write_setting(f"ipv4/conf/{layout.link}/accept_redirects", "0")
    # The machine is the router between the pool and the rest of the world; the kernel knows this switch only as a whole.
    write_setting("ipv4/ip_forward", "1")
    ensure_addresses(ipr, held.index, f"{layout.machine_address}/{layout.transit_prefix}")
    if not held.up:
        ipr.link("set", index=held.index, state="up")
    if layout.public_ipv6:
        enable_ipv6(layout.link)
        forward_ipv6()
        ensure_addresses(ipr, held.index, f"{MACHINE_LINK_IPV6}/64", f"{layout.machine_ipv6}/128")
    else:
        write_setting(f"ipv6/conf/{layout.link}/disable_ipv6", "1")


def forward_ipv6() -> None:
    """The machine passes IPv6 on, and goes on taking its own routes from routers, which it otherwise would not."""
    devices = SETTINGS / "ipv6" / "conf"
    if (devices / "all/forwarding").read_text().strip() != "1":
        # First, as the kernel throws learnt routes away when it becomes a router. 2: take them even so.
        for file in devices.glob("*/accept_ra"):
            if file.read_text().strip() == "1":
                write_setting(f"ipv6/conf/{file.parent.name}/accept_ra", "2")
        write_setting("ipv6/conf/all/forwarding", "1")


def ensure_routes(ipr: Any, layout: Layout) -> None:
    """The machine sends what is for guests into the namespace."""
    index = ipr.link_lookup(ifname=layout.link)[0]
    _ensure_route(ipr, index, "public_pool", layout.public_pool, str(layout.namespace_address), socket.AF_INET)
    if layout.peer_subnets:
        _ensure_route(ipr, index, "private_network", layout.private_network, str(layout.namespace_address), socket.AF_INET)
    else:
        with contextlib.suppress(NetlinkError):  # there is none, or it is not by our link
            ipr.route("del", dst=layout.private_network, oif=index)
    if layout.public_ipv6:
        _ensure_route(ipr, index, "public_ipv6", layout.public_ipv6, str(NAMESPACE_LINK_IPV6), socket.AF_INET6)


def _ensure_route(ipr: Any, index: int, key: str, network: str, gateway: str, family: int) -> None:
    address, prefix = network.split("/")
    for route in ipr.get_routes(family=family, table=254):
        if route.get_attr("RTA_DST") == address and route["dst_len"] == int(prefix) and route.get_attr("RTA_OIF") != index:
            raise SkysailError(f"this machine already has a route to {network}",
                               f"choose another `{key}` in skysail.toml, or remove the route")
    ipr.route("replace", dst=network, gateway=gateway, oif=index, family=family)


def ensure_uplink(ipr: Any, layout: Layout) -> None:
    """The namespace's end of the pair. Addresses of the pool that nobody has end here instead of going round."""
    lo, uplink = _must(ipr, "lo"), _must(ipr, UPLINK)
    ensure_addresses(ipr, uplink.index, f"{layout.namespace_address}/{layout.transit_prefix}")
    for link in (lo, uplink):
        if not link.up:
            ipr.link("set", index=link.index, state="up")
    ipr.route("replace", dst="0.0.0.0/0", gateway=str(layout.machine_address), oif=uplink.index)
    ipr.route("replace", dst=layout.public_pool, type="unreachable")
    if layout.public_ipv6:
        enable_ipv6(UPLINK)
        ensure_addresses(ipr, uplink.index, f"{NAMESPACE_LINK_IPV6}/64")
        for target in ("::/0", f"{layout.machine_ipv6}/128"):
            ipr.route("replace", dst=target, gateway=str(MACHINE_LINK_IPV6), oif=uplink.index, family=socket.AF_INET6)
    else:
        write_setting(f"ipv6/conf/{UPLINK}/disable_ipv6", "1")


def find(name: str) -> Link | None:
    """The device of that name here, if there is one."""
    with netlink() as ipr:
        return get(ipr, name)


def remove(name: str) -> None:
    """The device of that name is gone."""
    with netlink() as ipr:
        for index in ipr.link_lookup(ifname=name):
            ipr.link("del", index=index)


def every() -> list[Link]:
    """All devices here."""
    with netlink() as ipr:
        return list(links(ipr).values())


def remove_link(layout: Layout) -> None:
    """The pair is gone, if it is ours; the machine's route into it goes with it."""
    link = find(layout.link)
    if link is not None and link.alias == f"skysail {layout.namespace}":
        remove(layout.link)
