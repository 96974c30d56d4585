"""A stage for packets: a machine of its own in a namespace, the world outside it, and guests with a network stack.

The data plane under test is built *inside* the machine's namespace, so nothing of this machine is touched and its
listeners, routes and settings are the stage's own. A guest is a namespace with one network card: a tap whose frames are
carried, byte for byte, to the descriptor that the fabric opened for the guest's port, which is what QEMU does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from pyroute2 import IPRoute

from skysail.contract.document import Network, Overlay, Port
from skysail.network import links, taps
from skysail.network.frr import Frr
from skysail.network.linux import LinuxFabric
from skysail.network.plan import GATEWAY_IPV6, MTU, Layout

T = TypeVar("T")
# A positive answer may take this long on a busy machine; silence is believed after the other.
PATIENCE_SECONDS, SILENCE_SECONDS = 20.0, 1.0
MACHINE, WORLD, STRANGER = "198.51.100.1", "198.51.100.2", "203.0.113.2"
MACHINE6, WORLD6, STRANGER6 = "2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::2"
IDENTIFIERS = itertools.count(1)
TUN_DEVICE, TUNSETIFF = "/dev/net/tun", 0x400454CA


def within(namespace: str, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What a coroutine answers when its event loop, and every thread of it, lives in ``namespace``."""
    return links.inside(namespace, lambda: asyncio.run(call()))


def socket_in(namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket belongs to the namespace that it was made in, whoever uses it."""
    return links.inside(namespace, lambda: socket.socket(family, kind, protocol))


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Place:
    """A namespace with a network stack: the machine, somebody outside, or a guest."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        links.ensure_namespace(namespace)
        self.setting("ipv6/conf/default/accept_dad", "0")  # addresses are good at once
        with self.netlink() as ipr:
            ipr.link("set", index=1, state="up")

    @contextlib.contextmanager
    def netlink(self) -> Iterator[Any]:
        with IPRoute(netns=self.namespace) as ipr:
            yield ipr

    def setting(self, path: str, value: str) -> None:
        links.inside(self.namespace, lambda: links.write_setting(path, value))

    def address(self, device: str, address: str, prefix: int) -> None:
        with self.netlink() as ipr:
            index = ipr.link_lookup(ifname=device)[0]
            ipr.addr("replace", index=index, address=address, prefixlen=prefix, family=family_of(address))
            ipr.link("set", index=index, state="up")

    def remove(self) -> None:
        links.remove_namespace(self.namespace)

    @contextlib.contextmanager
    def serves(self, address: str, port: int) -> Iterator[None]:
        """A TCP service that tells each client the address that it comes from, then echoes until the client leaves."""
        listener = socket_in(self.namespace, family_of(address), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()

        def one(client: socket.socket, peer: str) -> None:
            with client, contextlib.suppress(OSError):
                client.sendall(peer.encode() + b"\n")
                while said := client.recv(4096):
                    client.sendall(said)

        def every() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, peer = listener.accept()
                    threading.Thread(target=one, args=(client, peer[0]), daemon=True).start()

        thread = threading.Thread(target=every, daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

    def connects(self, address: str, port: int, seconds: float = PATIENCE_SECONDS, source: str = "") -> socket.socket:
        """An open connection to a :meth:`serves`; raises OSError (TimeoutError after ``seconds``)."""
        client = socket_in(self.namespace, family_of(address), socket.SOCK_STREAM)
        try:
            client.settimeout(seconds)
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            return client
        except BaseException:
            client.close()
            raise

    def reaches(self, address: str, port: int, seconds: float = PATIENCE_SECONDS, source: str = "") -> str:
        """Who the service at ``address`` says that we are; empty when it cannot be reached."""
        try:
            with self.connects(address, port, seconds, source) as client:
                return client.makefile().readline().strip()
        except OSError:
            return ""

    def cut_off(self, address: str, port: int, source: str = "") -> bool:
        """Nothing answers there."""
        return self.reaches(address, port, SILENCE_SECONDS, source) == ""

    def pings(self, address: str, seconds: float = PATIENCE_SECONDS) -> bool:
        """An echo request is answered (RFC 792, RFC 4443), asked once a second."""
        six, identifier = ":" in address, next(IDENTIFIERS)  # a new one is a new flow
        protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
        with socket_in(self.namespace, family_of(address), socket.SOCK_RAW, protocol) as raw:
            end, number = time.monotonic() + seconds, 0
            while time.monotonic() < end:
                number += 1
                body = struct.pack("!HH", identifier, number) + b"skysail!"
                head = struct.pack("!BBH", 128 if six else 8, 0, 0 if six else checksum(b"\x08\0\0\0" + body))
                with contextlib.suppress(OSError):
                    raw.sendto(head + body, (address, 0))
                again = min(end, time.monotonic() + 1)
                while (left := again - time.monotonic()) > 0:
                    raw.settimeout(left)
                    try:
                        answer = raw.recv(2048)
                    except OSError:
                        break
                    answer = answer if six else answer[(answer[0] & 15) * 4:]
                    if answer[0] == (129 if six else 0) and answer[4:] == body:
                        return True
            return False

    @contextlib.contextmanager
    def hears(self, device: str) -> Iterator[list[bytes]]:
        """Every frame that comes in on ``device`` while the context lasts."""
        frames: list[bytes] = []
        with socket_in(self.namespace, socket.AF_PACKET, socket.SOCK_RAW, 0) as ear:
            ear.bind((device, 3))  # ETH_P_ALL
            ended = threading.Event()

            def listen() -> None:
                while not ended.is_set():
                    if select.select([ear], [], [], 0.05)[0]:
                        frame, told = ear.recvfrom(65536)
                        if told[2] != socket.PACKET_OUTGOING:
                            frames.append(frame)

            thread = threading.Thread(target=listen, daemon=True)
            thread.start()
            try:
                yield frames
                time.sleep(SILENCE_SECONDS / 2)
            finally:
                ended.set()
                thread.join()


class Guest(Place):
    """A guest at its port. ``card`` is its network card; :meth:`says` puts a frame of its own making on the wire."""

    card = "eth0"

    def __init__(self, namespace: str, port: Port, descriptor: int, layout: Layout) -> None:
        super().__init__(namespace)
        self.port = port
        self._port = descriptor
        self._card = links.inside(namespace, lambda: attach(self.card))
        self._ended, self._end = os.pipe()
        with self.netlink() as ipr:
            index = ipr.link_lookup(ifname=self.card)[0]
            ipr.link("set", index=index, address=port.mac, mtu=port.mtu)
            ipr.link("set", index=index, state="up")
            ipr.addr("add", index=index, address=port.private_ipv4, prefixlen=layout.private_prefix)
            ipr.route("add", dst="0.0.0.0/0", gateway=str(layout.gateway))
            if port.public_ipv6:
                ipr.addr("add", index=index, address=port.public_ipv6, prefixlen=128, family=socket.AF_INET6)
                ipr.route("add", dst="::/0", gateway=str(GATEWAY_IPV6), oif=index, family=socket.AF_INET6)
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def _carry(self) -> None:
        """Frames from card to port and back, with their virtio headers."""
        other = {self._port: self._card, self._card: self._port}
        while True:
            ready = select.select([*other, self._ended], [], [])[0]
            if self._ended in ready:
                return
            for descriptor in ready:
                with contextlib.suppress(OSError):  # a frame that a full or absent card does not take is lost
                    os.write(other[descriptor], os.read(descriptor, 70000))

    def plug(self, descriptor: int) -> None:
        """The card is at another port from now on, as that of a guest that was moved."""
        os.write(self._end, b"!")
        self._carrier.join()
        os.read(self._ended, 1)
        os.close(self._port)
        self._port = descriptor
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def says(self, frame: bytes) -> None:
        """One frame from the guest's card, as it is; the card asks nothing back."""
        os.write(self._port, bytes(10) + frame)

    def remove(self) -> None:
        os.close(self._end)
        self._carrier.join()
        for descriptor in (self._port, self._card, self._ended):
            os.close(descriptor)
        super().remove()


def attach(name: str) -> int:
    """A tap of the guest's own, like the fabric's."""
    descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(),
                                                   taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR))
    return descriptor


class Stage:
    """The machine, a ``world`` that does not route the pool, a ``stranger`` that does, and guests on a fabric."""

    def __init__(self, mark: str, layout: Layout, router: Frr | None = None) -> None:
        self.mark = mark
        self.layout = layout
        self.machine = Place(f"{mark}m")
        for which in ("all", "default"):
            self.machine.setting(f"ipv4/conf/{which}/rp_filter", "0")  # some machines filter nothing by themselves
        self.world = self._outside("w", MACHINE, WORLD, MACHINE6, WORLD6)
        self.stranger = self._outside("s", "203.0.113.1", STRANGER, "2001:db8:2::1", STRANGER6)
        with self.stranger.netlink() as ipr:
            ipr.route("add", dst=layout.public_pool, gateway="203.0.113.1")
            if layout.public_ipv6:
                ipr.route("add", dst=layout.public_ipv6, gateway="2001:db8:2::1", family=socket.AF_INET6)
        self.fabric = LinuxFabric(layout, router)
        self.guests: list[Guest] = []
        self._born = 0

    def _outside(self, letter: str, here: str, there: str, here6: str, there6: str) -> Place:
        made = Place(f"{self.mark}{letter}")
        with self.machine.netlink() as ipr:
            ipr.link("add", ifname=f"out-{letter}", kind="veth", peer={"ifname": "eth0", "net_ns_fd": made.namespace})
        self.machine.address(f"out-{letter}", here, 24)
        made.address("eth0", there, 24)
        self.machine.address(f"out-{letter}", here6, 64)
        made.address("eth0", there6, 64)
        return made

    def apply(self, *ports: Port, networks: Sequence[Network] = (), overlay: Overlay | None = None) -> None:
        within(self.machine.namespace, lambda: self.fabric.apply(ports, networks, overlay))

    def announce(self, port: Port) -> None:
        """The guest of the port is here now."""
        within(self.machine.namespace, lambda: self.fabric.announce(port.id))

    def guest(self, port: Port) -> Guest:
        """Start a guest at a port that was applied."""
        descriptor = within(self.machine.namespace, lambda: self.fabric.open_port(port))
        self._born += 1
        made = Guest(f"{self.mark}g{self._born}", port, descriptor, self.layout)
        self.guests.append(made)
        return made

    def hands(self, guest: Guest, target: Stage) -> None:
        """The guest, as it is, goes on at the same port of another machine, which announces it. Here its port stays."""
        descriptor = within(target.machine.namespace, lambda: target.fabric.open_port(guest.port))
        guest.plug(descriptor)
        target.announce(guest.port)
        self.guests.remove(guest)
        target.guests.append(guest)

    def leave(self, guest: Guest) -> None:
        """The guest ends; its port stays."""
        self.guests.remove(guest)
        guest.remove()

    def remove(self) -> None:
        for guest in self.guests:
            guest.remove()
        within(self.machine.namespace, self.fabric.teardown)
        for place in (self.machine, self.world, self.stranger):
            place.remove()


class Underlay:
    """The link between several machines, in a namespace of its own."""

    def __init__(self, name: str, mtu: int = MTU) -> None:
        self.place = Place(name)
        self._mtu = mtu
        with self.place.netlink() as ipr:
            ipr.link("add", ifname="wire", kind="bridge", br_forward_delay=0)
            ipr.link("set", index=ipr.link_lookup(ifname="wire")[0], mtu=mtu, state="up")

    def joins(self, place: Place, name: str, address: str) -> None:
        """Give the place a device ``name`` on the link."""
        with place.netlink() as ipr:
            ipr.link("add", ifname=name, kind="veth", peer={"ifname": f"to-{place.namespace[-10:]}",
                                                           "net_ns_fd": self.place.namespace})
            ipr.link("set", index=ipr.link_lookup(ifname=name)[0], mtu=self._mtu)
        with self.place.netlink() as ipr:
            ipr.link("set", index=ipr.link_lookup(ifname=f"to-{place.namespace[-10:]}")[0], mtu=self._mtu,
                     master=ipr.link_lookup(ifname="wire")[0], state="up")
        place.address(name, address, 24)

    def cuts(self, place: Place) -> None:
        """The place is on the link no more."""
        with self.place.netlink() as ipr:
            ipr.link("set", index=ipr.link_lookup(ifname=f"to-{place.namespace[-10:]}")[0], state="down")

    def remove(self) -> None:
        self.place.remove()


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def udp4(source: str, target: str, port: int, text: bytes) -> bytes:
    """An IPv4 packet with a datagram (RFC 791, RFC 768; no UDP checksum)."""
    body = struct.pack("!HHHH", 40000, port, 8 + len(text), 0) + text
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, socket.IPPROTO_UDP, 0, socket.inet_aton(source),
                       socket.inet_aton(target))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def packet6(source: str, target: str, kind: int, body: bytes, hops: int = 255) -> bytes:
    """An IPv6 packet (RFC 8200); ``kind`` is the next header, whose checksum stands where UDP and ICMPv6 have it."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    at = 2 if kind == socket.IPPROTO_ICMPV6 else 6
    sealed = checksum(ends + struct.pack("!II", len(body), kind) + body)
    body = body[:at] + struct.pack("!H", sealed) + body[at + 2:]
    return struct.pack("!IHBB", 6 << 28, len(body), kind, hops) + ends + body


def udp6(source: str, target: str, port: int, text: bytes) -> bytes:
    """An IPv6 packet with a datagram."""
    return packet6(source, target, socket.IPPROTO_UDP, struct.pack("!HHHH", 40000, port, 8 + len(text), 0) + text)


def advert6(source: str, target: str, address: str, mac: str) -> bytes:
    """A neighbour advertisement that overrides what its reader knew (RFC 4861, 4.4)."""
    return packet6(source, target, socket.IPPROTO_ICMPV6, struct.pack("!BBHI16sBB6s", 136, 0, 0, 0x20000000, socket.inet_pton(
        socket.AF_INET6, address), 2, 1, octets(mac)))


def solicit6(source: str, target: str, address: str, mac: str) -> bytes:
    """A neighbour solicitation (RFC 4861, 4.3)."""
    return packet6(source, target, socket.IPPROTO_ICMPV6, struct.pack("!BBHI16sBB6s", 135, 0, 0, 0, socket.inet_pton(
        socket.AF_INET6, address), 1, 1, octets(mac)))


def router6(source: str, target: str) -> bytes:
    """A router advertisement: "I am your way out" (RFC 4861, 4.2)."""
    return packet6(source, target, socket.IPPROTO_ICMPV6, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0))


def arp(operation: int, sender_mac: str, sender: str, target_mac: str, target: str) -> bytes:
    """RFC 826; operation 1 asks, 2 answers."""
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, octets(sender_mac), socket.inet_aton(sender),
                       octets(target_mac), socket.inet_aton(target))


def frame(target: str, source: str, kind: int, payload: bytes) -> bytes:
    """An Ethernet frame."""
    return octets(target) + octets(source) + struct.pack("!H", kind) + payload
