"""Where everything of the data plane is: names and addresses, each derived from the configuration alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec

from skysail.contract.document import Network, Overlay, Port
from skysail.kit.config import GUEST_UIDS, Config
from skysail.kit.errors import SkysailError

BRIDGE = "br0"
UPLINK = "uplink"
FABRIC = "fabric"  # what comes from other hosts for public addresses here, and goes there
TAP_PREFIX = "sky"
MTU = 1500
# RFC 7348, 4.1 and 5: the port, and how many bytes the outer Ethernet, IPv4, UDP and VXLAN headers take.
VXLAN_PORT, VXLAN_BYTES = 4789, 50
BGP_PORT = 179
# Where in the namespace those listen who share a single address: unprivileged, so above 1023.
HTTP_PORT, TLS_PORT, JUMP_PORT = 8080, 8443, 8022
# Link-local, and so the same on every host: what guests have as their gateway, and the two ends of the transit link.
GATEWAY_IPV6 = IPv6Address("fe80::1")
MACHINE_LINK_IPV6, NAMESPACE_LINK_IPV6 = IPv6Address("fe80::2"), IPv6Address("fe80::3")
# Where a guest asks for its metadata, by HTTP (EC2 user guide, "Retrieve instance metadata").
METADATA, METADATA_IPV6, METADATA_PORT = IPv4Address("169.254.169.254"), IPv6Address("fd00:ec2::254"), 80
UNIQUE_LOCAL = IPv6Network("fc00::/7")
MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One host's data plane: a network namespace, joined to the machine by the veth pair ``link`` <-> ``uplink``.

    ``transit`` is the /30 between the two, ``private_network`` what guests see, ``public_pool`` where they are seen.
    ``peer_subnets`` are networks beyond the machine that routed private networks are joined with, without NAT. IPv6 is
    routed: guests have addresses of ``public_ipv6`` themselves; without that prefix there is no IPv6 in the data plane.
    With a ``single_address`` guests are reached by that address of the machine: its ports 80, 443 and ``jump_port`` lead to
    listeners in the namespace, which run as ``ingress_user`` and ``jump_user``, further ones to guests' SSH.
    ``underlay`` is the machine's address among the hosts that private networks span; without one they are on this host only.
    Public addresses that are here are answered for on the machine's device ``segment``, and told to its ``routers``: their
    addresses, and the autonomous system of each.
    Guests' processes, which run under the user ids ``guest_uids`` (first and last), reach ``storage_networks`` alone from the
    machine's own network, where they are in it because their disks are out there.
    """

    namespace: str
    link: str
    transit: str
    private_network: str
    public_pool: str
    public_ipv6: str = ""
    peer_subnets: tuple[str, ...] = ()
    single_address: str = ""
    jump_port: int = 0
    ingress_user: str = ""
    jump_user: str = ""
    underlay: str = ""
    segment: str = ""
    routers: tuple[tuple[str, int], ...] = ()
    storage_networks: tuple[str, ...] = ()
    guest_uids: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, config: Config, underlay: str = "") -> Layout:
        """What the configuration says, for a host that others reach at ``underlay``; an IPv6 address is none yet."""
        return cls(namespace=config.namespace, link=config.link, transit=config.transit,
                   private_network=config.private_network, public_pool=config.public_pool,
                   public_ipv6=config.public_ipv6, peer_subnets=config.peer_subnets,
                   single_address=config.single_address, jump_port=config.jump_port, ingress_user=config.ingress_user,
                   jump_user=config.jump_user, underlay=underlay if ":" not in underlay else "", segment=config.segment,
                   routers=tuple(sorted(config.routers.items())),
                   storage_networks=config.ceph_networks if config.storage == "ceph" else (),
                   guest_uids=(config.guest_uid_base, config.guest_uid_base + GUEST_UIDS - 1))

    @property
    def transit_prefix(self) -> int:
        return IPv4Network(self.transit).prefixlen

    @property
    def machine_address(self) -> IPv4Address:
        """The machine's end of the transit network."""
        return IPv4Network(self.transit)[1]

    @property
    def namespace_address(self) -> IPv4Address:
        """The namespace's end of the transit network."""
        return IPv4Network(self.transit)[2]

    @property
    def gateway(self) -> IPv4Address:
        """What guests have as their default gateway: the bridge's address."""
        return IPv4Network(self.private_network)[1]

    @property
    def private_prefix(self) -> int:
        return IPv4Network(self.private_network).prefixlen

    @property
    def namespace_ipv6(self) -> IPv6Address:
        """What the namespace's router calls itself, as in "time exceeded"; only with a prefix."""
        return IPv6Network(self.public_ipv6)[1]

    @property
    def machine_ipv6(self) -> IPv6Address:
        """What guests see the machine as; only with a prefix."""
        return IPv6Network(self.public_ipv6)[2]

    @property
    def masquerades(self) -> bool:
        """Whether guests are seen as this machine by those beyond it, to whom their public addresses mean nothing. Addresses
        that are on a link, or told to routers, are guests' own everywhere, and answers find a guest that moved."""
        return not (self.segment or self.routers)

    @property
    def masquerades_ipv6(self) -> bool:
        """Whether guests' IPv6 addresses mean nothing beyond this machine (RFC 4193)."""
        return bool(self.public_ipv6) and not self.segment and IPv6Network(self.public_ipv6).subnet_of(UNIQUE_LOCAL)

    @property
    def gateway_mac(self) -> str:
        """The same on every host, and never the lowest tap's: what guests have in their ARP cache stays true."""
        return ":".join(f"{octet:02x}" for octet in (0x02, 0x53, *self.gateway.packed))

    @property
    def fabric_mac(self) -> str:
        """What other hosts send to; another one on each."""
        return ":".join(f"{octet:02x}" for octet in (0x02, 0x54, *IPv4Address(self.underlay).packed))


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of one network that spans hosts: its own bridge, which knows where each of its guests is, joins the tunnel
    with the end ``inner`` of a veth pair, whose end ``port`` is its place on the guests' bridge."""

    tunnel: str
    bridge: str
    inner: str
    port: str

    @classmethod
    def of(cls, vni: int) -> Devices:
        return cls(tunnel=f"vx{vni}", bridge=f"net{vni}", inner=f"in{vni}", port=f"out{vni}")


# All ends of that kind, as nft writes it.
ELSEWHERE = "out*"


def spanning(ports: Iterable[Port], networks: Iterable[Network]) -> dict[int, int]:
    """The identifiers, by number, of the networks that span hosts and that guests here are in, or are joined with."""
    numbers = {port.network for port in ports}
    return {network.number: network.vni for network in networks
            if network.vni and not numbers.isdisjoint((network.number, *network.peers))}


def heard_in(port: Port, networks: Iterable[Network]) -> tuple[int, ...]:
    """The identifiers of the networks whose guests reach this one."""
    return tuple(network.vni for network in networks
                 if network.vni and port.network in (network.number, *network.peers))


def tap_name(port_id: str) -> str:
    """The tap device of a port; 13 characters, as the kernel takes 15 and ids are longer."""
    return TAP_PREFIX + hashlib.blake2b(port_id.encode(), digest_size=5).hexdigest()


def link_local(mac: str) -> IPv6Address:
    """The link-local address that a card with this MAC gives itself (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:])


def vet_overlay(overlay: Overlay, networks: Iterable[Network]) -> None:
    """Raises SkysailError for an overlay that cannot be: all in it are addresses, no identifier stands for two networks."""
    try:
        for address in (*overlay.hosts, *overlay.reflectors):
            IPv4Address(address)
    except AddressValueError as wrong:
        raise SkysailError(f"the overlay has a host whose address is none: {wrong}") from wrong
    given = [overlay.vni, *(network.vni for network in networks if network.vni)]
    if len(set(given)) != len(given):
        raise SkysailError("the overlay has two networks of one identifier")
    if not 0 < overlay.autonomous_system < 2**32:
        raise SkysailError(f"there is no autonomous system {overlay.autonomous_system}")


def vet(ports: Iterable[Port]) -> None:
    """Raises SkysailError for a port that cannot be: everything in it has its known form, and belongs to no other port."""
    owners: dict[str, str] = {}
    for port in ports:
        try:
            addresses = [str(IPv4Address(port.private_ipv4))]
            if port.public_ipv4:
                addresses.append(str(IPv4Address(port.public_ipv4)))
            if port.public_ipv6:
                addresses.append(str(IPv6Address(port.public_ipv6)))
        except AddressValueError as wrong:
            raise SkysailError(f"port {port.id} has an address that is none: {wrong}") from wrong
        if not MAC.fullmatch(port.mac) or not 0 < port.network < 2**32:
            raise SkysailError(f"port {port.id} has MAC {port.mac!r} and network {port.network}, which cannot be")
        shared = [f"SSH port {port.ssh_port}"] if port.ssh_port else []
        for key in (*addresses, *shared, port.mac, tap_name(port.id)):
            if owners.setdefault(key, port.id) != port.id:
                raise SkysailError(f"ports {owners[key]} and {port.id} both have {key}")
