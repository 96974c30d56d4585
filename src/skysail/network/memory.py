"""What the kernel remembers of guests beside their devices: neighbours and tracked connections.

Works on the network namespace of the calling thread, as :mod:`skysail.network.links` does.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

# linux/neighbour.h, linux/netlink.h
NUD_PERMANENT, NDA_DST, NDA_LLADDR = 0x80, 1, 2
RTM_GETNEIGH, NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 30, 1, 0x300, 2, 3


def family_of(address: str) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def ensure_neighbours(ipr: Any, bridge: int, wanted: list[tuple[str, str]]) -> None:
    """The gateway knows every guest by itself. Looked at each time: a bridge that was down for a moment forgets all."""
    held = _permanent_neighbours(bridge)
    for address, mac in wanted:
        if (address, mac) not in held:
            ipr.neigh("replace", dst=address, lladdr=mac, ifindex=bridge, state=NUD_PERMANENT, family=family_of(address))


def _permanent_neighbours(index: int) -> set[tuple[str, str]]:
    """Address and MAC of what the device knows for good. Read by hand: this is done in every launch, for every guest, and
    pyroute2 takes 0.1 ms an entry. Source: rtnetlink(7), linux/neighbour.h."""
    found: set[tuple[str, str]] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink_:
        netlink_.send(struct.pack("=IHHIIB11x", 28, RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, socket.AF_UNSPEC))
        while True:
            answer = netlink_.recv(1 << 17)
            offset = 0
            while offset < len(answer):
                length, kind = struct.unpack_from("=IH", answer, offset)
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    return found
                family, ifindex, state = struct.unpack_from("=B3xiH", answer, offset + 16)
                if ifindex == index and state & NUD_PERMANENT and family in (socket.AF_INET, socket.AF_INET6):
                    told = dict(_attributes(answer, offset + 28, offset + length))
                    found.add((socket.inet_ntop(family, told[NDA_DST]), told.get(NDA_LLADDR, b"").hex(":")))
                offset += (length + 3) & ~3


def _attributes(message: bytes, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    while offset + 4 <= end:
        length, kind = struct.unpack_from("=HH", message, offset)
        yield kind, message[offset + 4:offset + length]
        offset += (length + 3) & ~3


def forget_connections(family: int, sources: set[str], targets: set[str]) -> None:
    """Drop tracked connections from and to these addresses, which are all that their guests had.

    They would reach the next owner of an address, past that one's firewall. The rules in force make no new ones.
    """
    filters: list[Any] = [None]  # every connection is looked at ...
    if len(sources) <= 8:  # ... unless asking for each address is less work
        filters = [NFCTAttrTuple(family=family, saddr=address) for address in sources]
        filters += [NFCTAttrTuple(family=family, daddr=address) for address in targets]
    with NFCTSocket(nfgen_family=family) as tracker:
        for filter in filters:
            for entry in list(tracker.dump(tuple_orig=filter)):
                first = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
                # A kernel before 5.8 ignores the filter.
                if first.saddr in sources or first.daddr in targets:
                    with contextlib.suppress(NetlinkError):  # ended meanwhile
                        tracker.entry("del", tuple_orig=first)


def forget_untranslated(guests: set[str], allowed: Callable[[str, str], bool]) -> None:
    """Drop tracked IPv4 connections of these private addresses that are not translated, but for those with an ``allowed``
    pair of guest and other end.

    The rules let them through no more; yet a guest that goes on from the same port would never get a translated one, for each
    packet keeps the old one alive.
    """
    with NFCTSocket(nfgen_family=socket.AF_INET) as tracker:
        for entry in list(tracker.dump()):
            first = NFCTAttrTuple.from_netlink(socket.AF_INET, entry.get_attr("CTA_TUPLE_ORIG"))
            back = NFCTAttrTuple.from_netlink(socket.AF_INET, entry.get_attr("CTA_TUPLE_REPLY"))
            if (first.saddr, first.daddr) != (back.daddr, back.saddr):
                continue
            pairs = [pair for pair in ((first.saddr, first.daddr), (first.daddr, first.saddr)) if pair[0] in guests]
            if pairs and not any(allowed(*pair) for pair in pairs):
                with contextlib.suppress(NetlinkError):  # ended meanwhile
                    tracker.entry("del", tuple_orig=first)
