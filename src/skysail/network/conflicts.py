"""What of this machine stands in the way of the guests' network. Changes nothing."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from typing import Any

import msgspec

from skysail.kit.process import run
from skysail.network.links import links, netlink
from skysail.network.plan import Layout


def overlaps(layout: Layout) -> list[str]:
    """Networks of this machine that the layout's own would hide, each with its cure."""
    found: list[str] = []
    chosen = {key: ip_network(network) for key in ("transit", "private_network", "public_pool", "public_ipv6")
              if (network := getattr(layout, key))}
    with netlink() as ipr:
        ours = ipr.link_lookup(ifname=layout.link)
        segment = ipr.link_lookup(ifname=layout.segment) if layout.segment else ()
        for address in ipr.get_addr():
            there = ip_interface(f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}").network
            found.extend(f"{key} {network} overlaps this machine's network {there}: choose another {key} in skysail.toml"
                         for key, network in chosen.items()
                         if address["index"] not in ours and network.version == there.version and network.overlaps(there)
                         # Public addresses are addresses of the link that they are on.
                         and not (address["index"] in segment and key.startswith("public")))
    return found


def foreign_drops(layout: Layout) -> list[str]:
    """Other programs' rules here that drop what they do not know; ours cannot overrule them. Each with its cure."""
    listed = msgspec.json.decode(run(["nft", "-j", "list", "chains"], timeout=20))["nftables"]
    chains = [item["chain"] for item in listed if "chain" in item]
    found = []
    for chain in chains:
        six = chain["family"] == "ip6"
        if chain.get("hook") != "forward" or chain.get("policy") != "drop" or (six and not layout.public_ipv6):
            continue
        program = "ip6tables" if six else "iptables"
        docker = any(other["name"] == "DOCKER-USER" and other["family"] == chain["family"] for other in chains)
        target = "DOCKER-USER" if docker else "FORWARD"
        found.append(f"the chain {chain['family']} {chain['table']} {chain['name']} of another program drops guests' "
                     f"packets: run {program} -I {target} -i {layout.link} -j ACCEPT "
                     f"and {program} -I {target} -o {layout.link} -j ACCEPT")
    return found


def underlay(layout: Layout) -> list[str]:
    """What keeps this machine from being one of several hosts with common networks, each with its cure."""
    with netlink() as ipr:
        if _device_of(ipr, layout.underlay) is None:
            return [f"the underlay {layout.underlay} is not an address of this machine: set underlay_address in skysail.toml "
                    "to one that `ip address` shows"]
    return []


def underlay_mtu(layout: Layout) -> int:
    """The largest packet, in bytes, that the device with the underlay's address takes; 0 when there is none."""
    with netlink() as ipr:
        device = _device_of(ipr, layout.underlay)
        return 0 if device is None else next(link.mtu for link in links(ipr).values() if link.index == device)


def _device_of(ipr: Any, address: str) -> int | None:
    return next((found["index"] for found in ipr.get_addr() if found.get_attr("IFA_LOCAL") == address), None)
