"""What the kernel remembers of guests beside their devices: neighbours and tracked connections.

Works on the network namespace of the calling thread, as :mod:`skysail.network.links` does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

# linux/neighbour.h, linux/netlink.h
NUD_PERMANENT, NDA_DST, NDA_LLADDR, NDA_MASTER, NTF_PROXY, NTF_EXT_LEARNED = 0x80, 1, 2, 9, 0x08, 0x10
RTM_NEWNEIGH, RTM_GETNEIGH, NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 28, 30, 1, 4, 0x300, 2, 3
IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


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
    """Address and MAC of what the device knows for good."""
    return {(one.address, one.mac) for one in neighbours(socket.AF_UNSPEC)
            if one.index == index and one.state & NUD_PERMANENT and one.family in IP_FAMILIES}


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the kernel's table of neighbours, or of those of bridges: what device ``index`` knows of an address or a
    MAC. ``bridge`` is the index of the bridge that an entry is of, 0 for others."""

    family: int
    index: int
    state: int
    flags: int
    address: str
    mac: str
    bridge: int


def neighbours(family: int, flags: int = 0) -> Iterator[Neighbour]:
    """All of one family: AF_BRIDGE for the MACs that bridges know, AF_UNSPEC for addresses; with the flag NTF_PROXY the
    addresses that are answered for. Read by hand: this is done in every launch, for every guest, and pyroute2 takes 0.1 ms an
    entry. Source: rtnetlink(7), linux/neighbour.h."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink_:
        netlink_.send(struct.pack("=IHHIIB7xHBB", 28, RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, family, 0, flags, 0))
        while True:
            for kind, message in messages(netlink_.recv(1 << 17)):
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    return
                yield neighbour(message)


def messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """The netlink messages of which an answer consists, each with its type."""
    offset = 0
    while offset + 16 <= len(answer):
        length, kind = struct.unpack_from("=IH", answer, offset)
        yield kind, answer[offset:offset + length]
        offset += (length + 3) & ~3


def neighbour(message: bytes) -> Neighbour:
    """What a netlink message says of a neighbour."""
    family, index, state, flags = struct.unpack_from("=B3xiHB", message, 16)
    told = dict(_attributes(message, 28, len(message)))
    return Neighbour(
        family=family, index=index, state=state, flags=flags, mac=told.get(NDA_LLADDR, b"").hex(":"),
        address=socket.inet_ntop(family, told[NDA_DST]) if family in IP_FAMILIES and NDA_DST in told else "",
        bridge=struct.unpack("=I", told[NDA_MASTER])[0] if NDA_MASTER in told else 0)


def _attributes(message: bytes, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    while offset + 4 <= end:
        length, kind = struct.unpack_from("=HH", message, offset)
        yield kind, message[offset + 4:offset + length]
        offset += (length + 3) & ~3


def forget_connections(family: int, sources: set[str], targets: set[str]) -> None:
    """Drop tracked connections from and to these addresses, which are all that their guests had.

    They would reach the next owner of an address, past that one's firewall. The rules in force make no new ones. Read and
    written by hand: a busy site has thousands, whose address does not move before they are gone.
    """
    wanted = [(_SOURCE, socket.inet_pton(family, address)) for address in sources]
    wanted += [(_TARGET, socket.inet_pton(family, address)) for address in targets]
    filters: list[bytes] = [b""]  # every connection is looked at ...
    if len(wanted) <= 16:  # ... unless asking for each address is less work
        filters = [_filter(family, end, address) for end, address in wanted]
    doomed = set(wanted)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12) as tracker:  # NETLINK_NETFILTER
        for filter in filters:
            # A kernel before 5.8 ignores the filter.
            tuples = [one for one in _tracked(tracker, family, filter) if not doomed.isdisjoint(_ends(one))]
            for first in range(0, len(tuples), _BATCH):
                batch = tuples[first:first + _BATCH]
                # Only the last is answered; one that ended meanwhile is no matter.
                tracker.send(b"".join(_message(_CT_DELETE, NLM_F_REQUEST | (NLM_F_ACK if one is batch[-1] else 0), family,
                                               _attribute(_TUPLE | _NESTED, one)) for one in batch))
                _drain(tracker, len(batch))


# linux/netfilter/nfnetlink_conntrack.h
_CT_GET, _CT_DELETE = (1 << 8) | 1, (1 << 8) | 2
_TUPLE, _TUPLE_IP, _FILTER, _FILTER_FLAGS, _NESTED = 1, 1, 25, 1, 0x8000
_SOURCE, _TARGET = 0, 1  # bits of a filter's flags; in a tuple the address has the number after it, in IPv6 two later
_BATCH = 100


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, family: int, body: bytes) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, flags, 1, 0, family, 0, 0) + body


def _filter(family: int, end: int, address: bytes) -> bytes:
    number = end + (1 if family == socket.AF_INET else 3)
    tuple_ = _attribute(_TUPLE | _NESTED, _attribute(_TUPLE_IP | _NESTED, _attribute(number, address)))
    flags = _attribute(_FILTER_FLAGS, struct.pack("=I", 1 << end))
    return tuple_ + _attribute(_FILTER | _NESTED, flags + _attribute(_FILTER_FLAGS + 1, bytes(4)))


def _tracked(tracker: socket.socket, family: int, filter: bytes) -> Iterator[bytes]:
    """The original tuple of each connection of the family, as the kernel writes it."""
    tracker.send(_message(_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, filter))
    for kind, message in _answers(tracker):
        if kind == NLMSG_DONE:
            return
        if kind == NLMSG_ERROR:
            number = -struct.unpack_from("=i", message, 16)[0]
            raise OSError(number, f"the tracked connections cannot be read: {os.strerror(number)}")
        found = next((value for kind, value in _attributes(message, 20, len(message)) if kind & ~_NESTED == _TUPLE), None)
        if found is not None:
            yield found


def _ends(tuple_: bytes) -> set[tuple[int, bytes]]:
    """Source and target of a tuple."""
    addresses = next((value for kind, value in _attributes(tuple_, 0, len(tuple_)) if kind & ~_NESTED == _TUPLE_IP), b"")
    return {((kind - 1) % 2, value) for kind, value in _attributes(addresses, 0, len(addresses))}


def _drain(tracker: socket.socket, sent: int) -> None:
    """Wait until all of a batch was done: its last message is acknowledged, or refused; others are only heard when refused,
    and the kernel answers in order. Each answer quotes the request, so a batch's are never more than it had messages."""
    for heard, (kind, message) in enumerate(_answers(tracker), 1):
        if heard > sent or (kind == NLMSG_ERROR and struct.unpack_from("=H", message, 26)[0] & NLM_F_ACK):
            return


def _answers(tracker: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        yield from messages(tracker.recv(1 << 17))


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
