"""Taps: the port of each guest on the bridge. What a tap was made for is noted on it, as its alias.

Every function here works on the network namespace of the calling thread, as :mod:`skysail.network.links` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from skysail.contract.document import Port
from skysail.kit.errors import SkysailError
from skysail.network import links
from skysail.network.links import Owner
from skysail.network.memory import ensure_neighbours, family_of, forget_connections
from skysail.network.plan import BRIDGE, MTU, Layout, link_local, tap_name

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
BUSY_SECONDS = 5.0
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
_DOOMED = 0x736B  # a device group of ours: the kernel deletes a group in one go, and takes 17 ms for each alone


def ensure(ipr: Any, layout: Layout, ports: list[Port]) -> None:
    """One persistent tap per port on the bridge, no others. One that stays is not touched: a running QEMU holds it.

    A tap's alias is written last and says for whom it was made; one without it is half-made and finished here. Of a guest
    that is awaited nothing is known at its tap.
    """
    held = links.links(ipr)
    bridge = held[BRIDGE].index
    wanted = {tap_name(port.id): port for port in ports}
    left_over = [link for name, link in held.items() if link.is_tap and name not in wanted]
    _delete(ipr, left_over)
    _forget(ipr, bridge, left_over, {})
    for name, port in wanted.items():
        alias = str(Owner.of(port))
        link_ = held.get(name)
        if link_ is not None and link_.alias == alias and link_.master == bridge and link_.up and link_.mtu == MTU:
            continue
        if link_ is None:
            os.close(attach(name, persist=True))
            index = int(ipr.link_lookup(ifname=name)[0])
        else:
            _forget(ipr, bridge, [link_], {link_.index: Owner.of(port)})
            index = link_.index
        ipr.link("set", index=index, mtu=MTU, master=bridge, state="up")
        # What the gateway sends to a guest goes to its tap only, with no ARP and no flooding past other networks' taps.
        ipr.brport("set", index=index, unicast_flood=0)
        if not port.awaited:
            ipr.fdb("replace", ifindex=index, lladdr=port.mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        ipr.link("set", index=index, IFLA_IFALIAS=alias)
    ensure_neighbours(ipr, bridge, [(address, port.mac) for port in ports if not port.awaited
                                    for address in _addresses(Owner.of(port)) if layout.public_ipv6 or ":" not in address])


def _delete(ipr: Any, doomed: list[links.Link]) -> None:
    if doomed:
        for link in doomed:
            ipr.link("set", index=link.index, group=_DOOMED)
        ipr.link("del", group=_DOOMED)


def _forget(ipr: Any, bridge: int, former: list[links.Link], heirs: Mapping[int, Owner]) -> None:
    """Drop what the kernel remembers of the ports that these taps were made for. Where an heir's addresses of one version of
    IP are the same ones, its connections go on."""
    owners = [(link.index, link.owner) for link in former if link.owner]  # a half-made one has carried nothing
    for index, owner in owners:
        for address in _addresses(owner):
            with contextlib.suppress(NetlinkError):
                ipr.neigh("del", dst=address, ifindex=bridge, family=family_of(address))
        with contextlib.suppress(NetlinkError):
            ipr.fdb("del", ifindex=index, lladdr=owner.mac, flags=_NTF_MASTER)
    changed = [owner for index, owner in owners if not owner.agrees(heirs.get(index), 4)]
    if changed:
        forget_connections(socket.AF_INET, {owner.private_ipv4 for owner in changed},
                           {owner.public_ipv4 for owner in changed if owner.public_ipv4})
    if routed := {owner.public_ipv6 for index, owner in owners
                  if owner.public_ipv6 and not owner.agrees(heirs.get(index), 6)}:
        forget_connections(socket.AF_INET6, routed, routed)


def _addresses(owner: Owner) -> tuple[str, ...]:
    """What the gateway reaches a guest by, each bound to its MAC for good: so a guest has nothing to advertise."""
    ipv6 = (owner.public_ipv6, str(link_local(owner.mac))) if owner.public_ipv6 else ()
    return (owner.private_ipv4, *ipv6)


def attach(name: str, *, persist: bool) -> int:
    """A descriptor attached to the tap; makes the tap where it is missing. Raises OSError, EBUSY while another has it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        if persist:
            fcntl.ioctl(descriptor, TUNSETPERSIST, 1)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_tap(port: Port) -> int:
    """A descriptor of the port's tap. An older QEMU that is still dying holds it for a moment, so it is asked for again;
    raises SkysailError when the tap is missing or stays taken."""
    name = tap_name(port.id)
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            socket.if_nametoindex(name)  # or TUNSETIFF would make one, on no bridge
            return attach(name, persist=False)
        except OSError as failure:
            if failure.errno == errno.ENODEV:
                raise SkysailError(f"port {port.id} has no tap {name}", "apply the port first") from failure
            if failure.errno != errno.EBUSY or time.monotonic() > end:
                raise SkysailError(f"the tap {name} of port {port.id} cannot be opened: {failure.strerror}",
                                   "a process still holds it: look for its QEMU") from failure
        time.sleep(0.02)


def remove_all() -> None:
    """All taps are gone, held or not."""
    with links.netlink() as ipr:
        _delete(ipr, [link for link in links.links(ipr).values() if link.is_tap])
