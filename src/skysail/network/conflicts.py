"""What of this machine stands in the way of the guests' network. Changes nothing."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network

import msgspec

from skysail.kit.process import run
from skysail.network.links import netlink
from skysail.network.plan import Layout


def overlaps(layout: Layout) -> list[str]:
    """Networks of this machine that the layout's own would hide, each with its cure."""
    found: list[str] = []
    chosen = {key: ip_network(network) for key in ("transit", "private_network", "public_pool", "public_ipv6")
              if (network := getattr(layout, key))}
    with netlink() as ipr:
        ours = ipr.link_lookup(ifname=layout.link)
        for address in ipr.get_addr():
            there = ip_interface(f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}").network
            found.extend(f"{key} {network} overlaps this machine's network {there}: choose another {key} in skysail.toml"
                         for key, network in chosen.items()
                         if address["index"] not in ours and network.version == there.version and network.overlaps(there))
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
