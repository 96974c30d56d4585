"""Where everything of the data plane is: names and addresses, each derived from the configuration alone."""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Address, IPv4Network

import msgspec

from skysail.kit.config import Config

BRIDGE = "br0"
UPLINK = "uplink"
TAP_PREFIX = "sky"
MTU = 1500


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One host's data plane: a network namespace, joined to the machine by the veth pair ``link`` <-> ``uplink``.

    ``transit`` is the /30 between the two, ``private_network`` what guests see, ``public_pool`` where they are seen.
    """

    namespace: str
    link: str
    transit: str
    private_network: str
    public_pool: str

    @classmethod
    def of(cls, config: Config) -> Layout:
        return cls(namespace=config.namespace, link=config.link, transit=config.transit,
                   private_network=config.private_network, public_pool=config.public_pool)

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
    def gateway_mac(self) -> str:
        """The same on every host, and never the lowest tap's: what guests have in their ARP cache stays true."""
        return ":".join(f"{octet:02x}" for octet in (0x02, 0x53, *self.gateway.packed))


def tap_name(port_id: str) -> str:
    """The tap device of a port; 13 characters, as the kernel takes 15 and ids are longer."""
    return TAP_PREFIX + hashlib.blake2b(port_id.encode(), digest_size=5).hexdigest()
