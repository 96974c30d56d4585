"""The rulesets as text: a function of layout and ports alone, so that they can be read, compared and loaded in one go.

Each text replaces the tables that it names within one transaction. What grows with the number of guests stands in maps and
sets, so a packet's way does not get longer. Source: nft(8); the kernel's bridge and inet hooks.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

import msgspec

from skysail.contract.document import FirewallRule, Network, Overlay, Port
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network.plan import (
    BGP_PORT,
    BRIDGE,
    ELSEWHERE,
    FABRIC,
    GATEWAY_IPV6,
    HTTP_PORT,
    JUMP_PORT,
    METADATA,
    METADATA_IPV6,
    METADATA_PORT,
    TLS_PORT,
    UPLINK,
    VXLAN_PORT,
    Devices,
    Layout,
    link_local,
    spanning,
    tap_name,
    vet,
)

TABLE = "skysail"
ANYWHERE = (("0.0.0.0/0",), ("::/0",))
# RFC 4291, 2.7.1: where a guest that looks for its gateway asks.
SOLICITED_GATEWAY = "ff02::1:ff00:1"
# RFC 4861, 7.1: hop limit 255 was spoken on the link itself; on the transit link nobody is but two kernels.
NEIGHBOURS = "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"
ALL_PORTS = (0, 65535)
# Of one guest towards anywhere; a busy proxy has some thousands.
MAX_CONNECTIONS = 8192


def machine_table(layout: Layout) -> str:
    """The name of the machine's own table for this namespace, as nft takes it."""
    return re.sub(r"[^A-Za-z0-9_]", "_", layout.namespace)


def data_plane(layout: Layout, ports: Sequence[Port], networks: Sequence[Network] = (), spans: bool = False) -> str:
    """The ruleset of the namespace: a bridge table (who may say what to whom) and an inet table (addresses, firewall).
    ``networks`` are the joined ones, and with ``spans`` those that span hosts.

    Raises SkysailError for a port that cannot be written, or two that contradict each other.
    """
    ordered = sorted(ports, key=lambda port: port.id)
    vet(ordered)
    joined = {network.number: network for network in networks}
    return "\n".join((*_fresh("bridge", TABLE), *_fresh("inet", TABLE), *_bridge(layout, ordered, joined, spans),
                      *_inet(layout, ordered, joined, spans), ""))


def machine(layout: Layout, ports: Sequence[Port] = (), overlay: Overlay | None = None) -> str:
    """The machine's own table: guests pass through the machine to elsewhere, and reach nothing of it but what it shares of
    its address, where that is all that guests have. Only hosts send it frames of guests, or tell it where they are."""
    link, pool, name = f'"{layout.link}"', layout.public_pool, machine_table(layout)
    prefix = layout.public_ipv6
    neighbours = _more(prefix, f"iifname {link} {NEIGHBOURS} accept")
    forward = _more(prefix, f"""\
iifname {link} ip6 daddr {{ fd00:ec2::254, fd20:ce::254 }} drop
# The kernel filters no forged sources in IPv6: nobody out there is a guest.
oifname {link} ip6 saddr {prefix} drop
iifname {link} ip6 saddr {prefix} accept
oifname {link} ip6 daddr {prefix} accept""")
    private = layout.private_network
    subnets = ", ".join(layout.peer_subnets)
    peering = _more(subnets, f"""\
# Without translation, so a forged source would be believed: one that is not out there where it comes from is dropped.
iifname {link} ip saddr {private} ip daddr {{ {subnets} }} accept
oifname {link} ip saddr {{ {subnets} }} ip daddr {private} fib saddr . iif oif exists accept""")
    masquerade = _more(layout.masquerades, f"oifname != {link} ip saddr {pool} masquerade") + _more(
        layout.masquerades_ipv6, f'oifname != {{ {link}, "lo" }} ip6 saddr {prefix} masquerade')
    shared = _Shared(layout, ports)
    hosts, tellers = _hosts(layout, overlay)
    # A packet of a guest leaves with the machine's own address: to another host it would be a frame of ours.
    foreign = _more(hosts, f"iifname {link} ip daddr {{ {', '.join(tellers)} }} drop") if tellers else ""
    entry = _more(overlay, f"""\
ip daddr {layout.underlay} udp dport {VXLAN_PORT} {_from_none_but(hosts)}drop
ip daddr {layout.underlay} tcp dport {BGP_PORT} {_from_none_but(tellers)}drop""")
    return "\n".join((*_fresh("inet", name), f"""\
table inet {name} {{{shared.chains()}{_fence(layout)}
    # Before any DNAT of the machine's own: what it publishes on its addresses is not for guests.
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;{neighbours}{shared.prerouting()}
        iifname {link} fib daddr type != unicast ct state != {{ established, related }} drop
    }}
    # Guests answer the machine, but never speak first.
    chain input {{
        type filter hook input priority filter - 5; policy accept;{entry}{neighbours}
        iifname {link} ct state {{ established, related }} accept
        iifname {link} drop
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        iifname != {link} oifname != {link} accept{foreign}{shared.forward()}
        iifname {link} oifname {link} drop
        # A cloud's metadata holds the machine's own credentials.
        iifname {link} ip daddr 169.254.0.0/16 drop
        iifname {link} ip saddr {pool} accept
        oifname {link} ip daddr {pool} accept{peering}{forward}
        drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;{masquerade}{shared.postrouting()}
    }}
}}
"""))


def _hosts(layout: Layout, overlay: Overlay | None) -> tuple[list[str], list[str]]:
    """Whose frames are taken, and who may tell where guests are."""
    hosts = sorted(overlay.hosts) if overlay else []
    return hosts, sorted({*hosts, *overlay.reflectors, *(router for router, _ in layout.routers)}) if overlay else []


def _from_none_but(addresses: Sequence[str]) -> str:
    return f"ip saddr != {{ {', '.join(addresses)} }} " if addresses else ""


def _fence(layout: Layout) -> str:
    """What the guests' own processes reach of the machine's network: storage, and no other thing that listens here or is
    reached from here. They answer whoever reached them: a guest that comes from another host does by a socket that its
    process was handed."""
    if not layout.storage_networks:
        return ""
    first, last = layout.guest_uids
    kept = "".join(
        f"\n        meta skuid {first}-{last} {word} daddr {_set(found)} accept"
        for word, version in (("ip", 4), ("ip6", 6))
        if (found := [network for network in layout.storage_networks if ip_network(network).version == version]))
    return f"""
    chain fence {{
        type filter hook output priority filter - 5; policy accept;{kept}
        meta skuid {first}-{last} ct direction reply accept
        meta skuid {first}-{last} drop
    }}"""


class _Shared:
    """What the machine's table says of a single address; nothing without one."""

    def __init__(self, layout: Layout, ports: Sequence[Port]) -> None:
        self._layout = layout
        self._link = f'"{layout.link}"'
        self._logins = sorted((port.ssh_port, port.public_ipv4) for port in ports if port.ssh_port and port.public_ipv4)
        self._listeners = {80: HTTP_PORT, 443: TLS_PORT, layout.jump_port: JUMP_PORT}

    def chains(self) -> str:
        """Its ports lead into the namespace, those of SSH straight to the guests: a login comes from where it came from, and
        the guest's firewall is the one that it meets."""
        if not self._layout.single_address:
            return ""
        here, namespace = self._layout.single_address, self._layout.namespace_address
        leads = "".join(f"\n        tcp dport {port} dnat ip to {namespace}:{to}" for port, to in self._listeners.items())
        logins = ", ".join(f"{port} : {address} . 22" for port, address in self._logins)
        by_port = f"\n        dnat ip to tcp dport map {{ {logins} }}" if logins else ""
        return f"""
    chain shared {{{leads}{by_port}
    }}
    chain arriving {{
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr {here} jump shared
    }}
    chain leaving {{
        type nat hook output priority -100; policy accept;
        ip daddr {here} jump shared
    }}"""

    def prerouting(self) -> str:
        """Guests reach each other by the shared address as everybody does."""
        ports = _set(str(port) for port in (*self._listeners, *(port for port, _ in self._logins)))
        return _more(self._layout.single_address, f"iifname {self._link} ip daddr {self._layout.single_address} "
                                                  f"tcp dport {ports} accept")

    def forward(self) -> str:
        listeners = f"tcp dport {_set(map(str, self._listeners.values()))}"
        namespace = self._layout.namespace_address
        return _more(self._layout.single_address, f"""\
oifname {self._link} ip daddr {namespace} {listeners} ct status dnat accept
iifname {self._link} ip saddr {namespace} ct state {{ established, related }} accept
iifname {self._link} oifname {self._link} ct status dnat accept""")

    def postrouting(self) -> str:
        """One guest's way to another by the shared address: back by the machine, too."""
        return _more(self._layout.single_address, f"iifname {self._link} oifname {self._link} ct status dnat masquerade")


def firewall_changes(layout: Layout, former: Sequence[Port], ports: Sequence[Port]) -> str | None:
    """What leads from the ruleset of ``former`` to that of ``ports`` where nothing but firewalls differs, in one transaction
    as well: it costs what changed, however many guests there are. None where more differs."""
    before, after = ({port.id: port for port in some} for some in (former, ports))
    if before.keys() != after.keys() or any(
            msgspec.structs.replace(before[key], firewall=after[key].firewall) != after[key] for key in after):
        return None
    changed = [key for key in after if before[key].firewall != after[key].firewall]
    held, wanted = _chains(layout, former), _chains(layout, ports)
    lines = []
    for name in sorted(wanted.keys() - held.keys()):
        lines += [f"add chain inet {TABLE} {name}", *(f"add rule inet {TABLE} {name} {line}" for line in wanted[name])]
    for command, some in (("delete", before), ("add", after)):
        for element in (line for key in changed for line in _entries(layout, some[key])):
            lines.append(f"{command} element inet {TABLE} {element}")
    for name in sorted(held.keys() - wanted.keys()):
        lines += [f"flush chain inet {TABLE} {name}", f"delete chain inet {TABLE} {name}"]
    return "".join(f"{line}\n" for line in lines)


def moved(port: Port) -> str:
    """What leads from the ruleset with this port awaited to that without, or back, in one transaction."""
    command = "delete" if port.awaited else "add"
    return f"{command} element inet {TABLE} inward {{ {_inward(port)} }}\n" if port.public_ipv4 else ""


def _inward(port: Port) -> str:
    return f"{port.public_ipv4} : {port.private_ipv4}"


def _chains(layout: Layout, ports: Sequence[Port]) -> dict[str, tuple[str, ...]]:
    """The chains of all firewalls. Guests with the same rules share one: a host of a thousand default firewalls has one."""
    firewalls = {port.firewall: None for port in ports}
    firewalls6 = {port.firewall: None for port in ports if layout.public_ipv6 and port.public_ipv6}
    return {_chain_name(lines): lines for version, some in ((4, firewalls), (6, firewalls6)) for rules in some
            if (lines := _openings(rules, version))}


def _entries(layout: Layout, port: Port) -> Iterable[str]:
    """What a port's firewall puts into sets and maps."""
    for name, address, version in (("firewalls", port.private_ipv4, 4), ("firewalls6", port.public_ipv6, 6)):
        if address and (version == 4 or layout.public_ipv6) and (lines := _openings(port.firewall, version)):
            yield f"{name} {{ {address} : jump {_chain_name(lines)} }}"
    if layout.single_address:
        yield from (f"shared {{ {element} }}" for element in _offered(port))


def _offered(port: Port) -> list[str]:
    """What the listeners of a single address may ask a guest for: they see to it that only those come in whom its firewall
    lets in."""
    return [f"{port.private_ipv4} . {number}" for number in (22, 80, 443) if port.sources(number)]


def without(family: str, name: str) -> str:
    """The text that removes a table, whether it is there or not."""
    return "\n".join((*_fresh(family, name), ""))


def _fresh(family: str, name: str) -> tuple[str, str]:
    # Older nft has no `destroy`: adding first makes the deletion never fail.
    return f"table {family} {name} {{}}", f"delete table {family} {name}"


def _more(wanted: object, lines: str) -> str:
    """Further lines of a chain, where they are wanted."""
    return "".join(f"\n        {line}" for line in lines.splitlines()) if wanted else ""


def _bridge(layout: Layout, ports: Sequence[Port], joined: Mapping[int, Network], spans: bool) -> list[str]:
    ends = {number: f'"{Devices.of(vni).port}"' for number, vni in spanning(ports, joined.values()).items()} if spans else {}
    private, gateway = layout.private_network, layout.gateway
    # Where a network's frames come from other hosts, on which their senders were looked at. The gateway is each host's own.
    arriving = _more(spans, f"""\
iifname "{ELSEWHERE}" ether saddr {layout.gateway_mac} drop
iifname "{ELSEWHERE}" ether daddr {layout.gateway_mac} drop
iifname "{ELSEWHERE}" ip saddr {private} ip saddr != {gateway} ip daddr != {gateway} accept
iifname "{ELSEWHERE}" arp saddr ip {private} arp saddr ip != {gateway} arp daddr ip != {gateway} accept""")
    # On the networks' own bridges everything passes: what comes there from here was looked at here.
    aside = _more(spans, 'iifname { "in*", "vx*" } accept')
    inward = _more(spans, f'iifname "{ELSEWHERE}" drop')
    leaving = _more(spans, f"""\
oifname {{ "in*", "vx*" }} accept
oifname "{ELSEWHERE}" arp daddr ip {gateway} drop
oifname "{ELSEWHERE}" arp daddr ip != {private} drop""")
    own = f"""
    # What {BRIDGE} itself says is for guests here.
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "{ELSEWHERE}" drop
    }}""" if spans else ""
    taps = [(f'"{tap_name(port.id)}"', port) for port in ports]
    reaching = {number: (number, *network.peers) for number, network in joined.items()}
    sources6 = [f"{tap} . {port.mac} . {address}" for tap, port in taps if layout.public_ipv6 and port.public_ipv6
                for address in (link_local(port.mac), port.public_ipv6)]
    # In IPv6 a guest's only neighbour is its gateway, which knows every guest by itself: a guest may ask for it, and has
    # nothing to advertise. Whatever else it sends goes through the gateway.
    known = "ether type ip6 iifname . ether saddr . ip6 saddr @sources6"
    ipv6 = _more(layout.public_ipv6, f"""\
icmpv6 type {{ nd-neighbor-advert, nd-router-advert, nd-router-solicit, nd-redirect }} drop
{known} ip6 daddr {{ {GATEWAY_IPV6}, {SOLICITED_GATEWAY} }} icmpv6 type {{ nd-neighbor-solicit, echo-request }} accept
{known} ether daddr {layout.gateway_mac} ip6 saddr != fe80::/10 ip6 daddr != {{ fe80::/10, ff00::/8 }} accept""")
    return [
        f"table bridge {TABLE} {{",
        *_elements("map networks", "ifname : mark", (*(f"{tap} : {port.network}" for tap, port in taps),
                                                       *(f"{end} : {number}" for number, end in ends.items()))),
        *_elements("set neighbours", "ifname . mark",
                   (*(f"{tap} . {number}" for tap, port in taps for number in reaching.get(port.network, (port.network,))),
                    *(f"{end} . {number}" for number, end in ends.items()))),
        *_elements("set sources", "ifname . ether_addr . ipv4_addr",
                   (f"{tap} . {port.mac} . {port.private_ipv4}" for tap, port in taps)),
        *_elements("set sources6", "ifname . ether_addr . ipv6_addr", sources6),
        # A probe for a duplicate address (RFC 5227) asks with the sender 0.0.0.0.
        *_elements("set senders", "ifname . ether_addr . ether_addr . ipv4_addr",
                   (f"{tap} . {port.mac} . {port.mac} . {address}"
                    for tap, port in taps for address in (port.private_ipv4, "0.0.0.0"))),
        f"""\
    chain prerouting {{
        type filter hook prerouting priority dstnat; policy drop;{aside}
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
        ether type != {{ ip, arp, ip6 }} drop
        meta mark set iifname map @networks{arriving}
        ether type ip iifname . ether saddr . ip saddr @sources accept
        ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation {{ request, reply }} \
iifname . ether saddr . arp saddr ether . arp saddr ip @senders accept{ipv6}
    }}
    # The kernel hands some link-local destinations straight to this hook, past prerouting.
    chain input {{
        type filter hook input priority filter; policy accept;
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop{inward}
    }}
    # From tap to tap: within one network and its peers only, and no IPv6. What {BRIDGE} itself sends does not come by here.
    chain forward {{
        type filter hook forward priority filter; policy drop;{leaving}
        ether type ip6 drop
        oifname . meta mark @neighbours accept
    }}{own}
}}"""]


def _inet(layout: Layout, ports: Sequence[Port], joined: Mapping[int, Network], spans: bool) -> list[str]:
    routed = [port.private_ipv4 for port in ports if port.network in joined and joined[port.network].routed]
    peering = _Peering.of(layout.peer_subnets)
    seen = [port for port in ports if port.public_ipv4]
    doors = f'{{ "{UPLINK}", "{FABRIC}" }}' if spans else f'"{UPLINK}"'
    # The kernel looks at no forged sources in IPv6: what comes from other hosts is from guests that are there.
    forged = _more(spans and layout.public_ipv6, f'iifname "{FABRIC}" meta nfproto ipv6 fib saddr . iif oif missing drop')
    openings = {port.private_ipv4: _openings(port.firewall, 4) for port in ports}
    openings6 = {port.public_ipv6: _openings(port.firewall, 6) for port in ports if layout.public_ipv6 and port.public_ipv6}
    chains = _chains(layout, ports)
    entry = _more(layout.public_ipv6, f"""\
iifname "{BRIDGE}" ip6 daddr {{ {GATEWAY_IPV6}, {SOLICITED_GATEWAY} }} icmpv6 type nd-neighbor-solicit accept
iifname "{BRIDGE}" ip6 daddr {{ {GATEWAY_IPV6}, {layout.namespace_ipv6} }} icmpv6 type echo-request accept
iifname "{BRIDGE}" ip6 daddr {METADATA_IPV6} tcp dport {METADATA_PORT} accept
iifname "{UPLINK}" {NEIGHBOURS} accept
iifname "{UPLINK}" ip6 saddr {layout.machine_ipv6} icmpv6 type echo-request accept""" if layout.public_ipv6 else "")
    beyond = f"ip daddr != {{ {', '.join(layout.peer_subnets)} }} " if layout.peer_subnets else ""
    untracked = [_more(layout.public_ipv6, f'{way}ifname "{BRIDGE}" ip6 {end}addr {METADATA_IPV6} notrack')
                 for way, end in (("i", "d"), ("o", "s"))]
    shared = _more(layout.single_address, f"""\
meta skuid {{ "{layout.ingress_user}", "{layout.jump_user}" }} ip daddr . tcp dport @shared accept
meta skuid {{ "{layout.ingress_user}", "{layout.jump_user}" }} drop""")
    entry += _more(layout.single_address, f'iifname "{UPLINK}" ip daddr {layout.namespace_address} '
                                          f"tcp dport {_set(map(str, (HTTP_PORT, TLS_PORT, JUMP_PORT)))} accept")
    offered = [element for port in seen for element in _offered(port)]
    return [
        f"table inet {TABLE} {{",
        *(_elements("set shared", "ipv4_addr . inet_service", offered) if layout.single_address else ()),
        *_elements("map inward", "ipv4_addr : ipv4_addr", map(_inward, (port for port in seen if not port.awaited))),
        *_elements("map outward", "ipv4_addr : ipv4_addr", (f"{port.private_ipv4} : {port.public_ipv4}" for port in seen)),
        # Without a public IPv4 address there is no way out: it is told so, and need not wait.
        *_elements("set unseen", "ipv4_addr", (port.private_ipv4 for port in ports if not port.public_ipv4)),
        *(line for name, lines in sorted(chains.items()) for line in
          (f"    chain {name} {{", *(f"        {line}" for line in lines), "    }")),
        *_elements("map firewalls", "ipv4_addr : verdict", _verdicts(openings)),
        *_elements("map firewalls6", "ipv6_addr : verdict", _verdicts(openings6)),
        *([*_elements("set peered", "ipv4_addr", routed), peering.chain] if peering.chain else []),
        f"""\
    # Nothing enters but by the bridge and the uplink: frames to link-local MACs can surface on a tap itself.
    chain doors {{
        type filter hook prerouting priority raw; policy drop;
        iifname "{BRIDGE}" ip daddr {METADATA} notrack{untracked[0]}{forged}
        iifname {{ "lo", "{BRIDGE}", "{UPLINK}"{f', "{FABRIC}"' if spans else ""} }} accept
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        dnat ip to ip daddr map @inward
    }}
    # Metadata are asked for without the kernel's keeping of connections, of which the whole machine has one table.
    chain untracked {{
        type filter hook output priority raw; policy accept;
        oifname "{BRIDGE}" ip saddr {METADATA} notrack{untracked[1]}
    }}
    # The gateway answers pings and whoever looks for it, and guests that ask for their metadata; nothing else.
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        ct state {{ established, related }} accept
        iifname "{BRIDGE}" ip daddr {layout.gateway} icmp type echo-request accept
        iifname "{BRIDGE}" ip daddr {METADATA} tcp dport {METADATA_PORT} accept
        iifname "{UPLINK}" ip saddr {layout.machine_address} icmp type echo-request accept{entry}
    }}
    # Guests do not reach each other past the gateway, although they are on one link: IPv6 knows no switch for that.
    chain output {{
        type filter hook output priority filter; policy accept;
        icmpv6 type nd-redirect drop
    }}
    # How many connections each guest has open: the kernel's table of them is the whole machine's.
    set busy {{
        type ipv4_addr; size 65535; flags dynamic
    }}
    set busy6 {{
        type ipv6_addr; size 65535; flags dynamic
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;{peering.forward}
        ip daddr 169.254.0.0/16 drop
        iifname "{BRIDGE}" ip saddr @unseen {beyond}reject with icmp net-unreachable
        ct state {{ established, related }} accept
        iifname "{BRIDGE}" ct state new add @busy {{ ip saddr ct count over {MAX_CONNECTIONS} }} drop
        iifname "{BRIDGE}" ct state new add @busy6 {{ ip6 saddr ct count over {MAX_CONNECTIONS} }} drop
        iifname "{BRIDGE}" oifname {doors} ct state new accept
        oifname "{BRIDGE}" ct state new ct status dnat accept
        oifname "{BRIDGE}" ct state new meta nfproto ipv6 accept
    }}
    # From guest to guest's public address too: the other side sees a public address and answers through the gateway.
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;{peering.postrouting}
        snat ip to ip saddr map @outward
    }}
    # After the source NAT: a rule names its clients by the addresses that everybody sees them by, another guest too.
    chain firewall {{
        type filter hook postrouting priority srcnat + 10; policy accept;
        oifname != "{BRIDGE}" accept
        ct state != new accept{shared}{peering.firewall}
        ip daddr vmap @firewalls
        ip6 daddr vmap @firewalls6
        drop
    }}
}}"""]


class _Peering(msgspec.Struct, frozen=True, kw_only=True):
    """What the inet table has more where private networks may be joined with subnets beyond the machine: packets between a
    private address and a peer subnet are not translated, and pass only while the guest's network is joined. Each one is
    looked at, those of known connections too, so that parting cuts them.

    The instance's firewall is for its public address alone, as on Lightsail (user guide, "Control instance traffic with
    firewalls": peered VPCs reach the private address past it).
    """

    chain: str = ""
    forward: str = ""
    postrouting: str = ""
    firewall: str = ""

    @classmethod
    def of(cls, subnets: Sequence[str]) -> _Peering:
        if not subnets:
            return cls()
        there = "{ " + ", ".join(subnets) + " }"
        return cls(
            chain=f"""\
    chain private {{
        iifname "{UPLINK}" ip daddr @peered ct state related accept
        iifname "{BRIDGE}" oifname "{UPLINK}" ip saddr @peered ip daddr {there} accept
        iifname "{UPLINK}" oifname "{BRIDGE}" ip saddr {there} ip daddr @peered accept
        drop
    }}""",
            forward=_more(True, f"""\
# What is under way without translation is between a private address and a peer subnet.
meta nfproto ipv4 ct state {{ established, related }} ct status & ( snat | dnat ) == 0 jump private
iifname "{UPLINK}" meta nfproto ipv4 ct state new ct status & dnat == 0 jump private"""),
            postrouting=_more(True, f"ip saddr @peered ip daddr {there} accept"),
            firewall=_more(True, f"ip saddr {there} ip daddr @peered ct status & dnat == 0 accept"))


def elements(family: str, name: str) -> list[tuple[str, ...]]:
    """What a set of the calling thread's namespace holds; raises ProcessFailed when there is none."""
    told = msgspec.json.decode(run(["nft", "-j", "list", "set", family, TABLE, name], timeout=60))["nftables"]
    held = next(item["set"] for item in told if "set" in item).get("elem", [])
    return [tuple(str(part) for part in one["concat"]) if isinstance(one, dict) else (str(one),) for one in held]


def _verdicts(openings: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    return (f"{address} : jump {_chain_name(lines)}" for address, lines in openings.items() if lines)


def _elements(head: str, type: str, elements: Iterable[str]) -> list[str]:
    written = ",\n            ".join(elements)
    body = [f"        elements = {{\n            {written}\n        }}"] if written else []
    return [f"    {head} {{", f"        type {type}", *body, "    }"]


def _chain_name(lines: Sequence[str]) -> str:
    return "rules_" + hashlib.blake2b("\n".join(lines).encode(), digest_size=5).hexdigest()


def _openings(rules: Iterable[FirewallRule], version: int) -> tuple[str, ...]:
    """What one guest's chain says of one version of IP. Rules of one protocol and source are one line; neither its
    addresses nor its ports overlap within a line, as nft would refuse that, and lines may overlap freely."""
    merged: defaultdict[tuple[str, tuple[str, ...]], set[tuple[int, int]]] = defaultdict(set)
    for rule in rules:
        if version == 4 and rule.protocol != "icmpv6":
            blocks = tuple(map(str, collapse_addresses(IPv4Network(text, strict=False) for text in rule.cidrs)))
        elif version == 6 and rule.protocol != "icmp":
            blocks = tuple(map(str, collapse_addresses(IPv6Network(text, strict=False) for text in rule.ipv6_cidrs)))
        else:
            continue
        if blocks:
            merged[rule.protocol, blocks].add((rule.from_port, rule.to_port))
    lines: list[str] = []
    for (protocol, blocks), spans in merged.items():
        source = "" if blocks in ANYWHERE else f"{'ip' if version == 4 else 'ip6'} saddr {_set(blocks)} "
        lines.extend(f"{source}{match}accept" for match in _matches(protocol, spans))
    return tuple(sorted(lines))


def _matches(protocol: str, spans: set[tuple[int, int]]) -> Iterable[str]:
    if protocol == "all":
        return ("",)
    if protocol in ("icmp", "icmpv6"):
        return tuple(_icmp(protocol, type, code) for type, code in sorted(spans))
    if protocol not in ("tcp", "udp"):
        raise SkysailError(f"the firewall protocol {protocol!r} is not known", "use tcp, udp, icmp, icmpv6 or all")
    ranges = _join(spans)
    if ranges == [ALL_PORTS]:
        return (f"meta l4proto {protocol} ",)
    return (f"{protocol} dport {_set(str(low) if low == high else f'{low}-{high}' for low, high in ranges)} ",)


def _icmp(protocol: str, type: int, code: int) -> str:
    if type == -1:
        return f"meta l4proto {protocol} "
    return f"{protocol} type {type} " + (f"{protocol} code {code} " if code != -1 else "")


def _join(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in ranges that neither overlap nor touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def _set(elements: Iterable[str]) -> str:
    written = list(elements)
    return written[0] if len(written) == 1 else "{ " + ", ".join(written) + " }"

