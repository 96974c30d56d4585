"""The rulesets as text: a function of layout and ports alone, so that they can be read, compared and loaded in one go.

Each text replaces the tables that it names within one transaction. What grows with the number of guests stands in maps and
sets, so a packet's way does not get longer. Source: nft(8); the kernel's bridge and inet hooks.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Literal

from skysail.contract.document import FirewallRule, Port
from skysail.kit.errors import SkysailError
from skysail.network.plan import (
    BRIDGE,
    GATEWAY_IPV6,
    METADATA,
    METADATA_IPV6,
    METADATA_PORT,
    UPLINK,
    Layout,
    link_local,
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


def data_plane(layout: Layout, ports: Sequence[Port]) -> str:
    """The ruleset of the namespace: a bridge table (who may say what to whom) and an inet table (addresses, firewall).

    Raises SkysailError for a port that cannot be written, or two that contradict each other.
    """
    ordered = sorted(ports, key=lambda port: port.id)
    vet(ordered)
    return "\n".join((*_fresh("bridge", TABLE), *_fresh("inet", TABLE), *_bridge(layout, ordered),
                      *_inet(layout, ordered), ""))


def machine(layout: Layout) -> str:
    """The machine's own table: guests pass through the machine to elsewhere, and reach nothing of it."""
    link, pool, name = f'"{layout.link}"', layout.public_pool, machine_table(layout)
    prefix = layout.public_ipv6
    neighbours = _more(prefix, f"iifname {link} {NEIGHBOURS} accept")
    forward = _more(prefix, f"""\
iifname {link} ip6 daddr {{ fd00:ec2::254, fd20:ce::254 }} drop
# The kernel filters no forged sources in IPv6: nobody out there is a guest.
oifname {link} ip6 saddr {prefix} drop
iifname {link} ip6 saddr {prefix} accept
oifname {link} ip6 daddr {prefix} accept""")
    masquerade = _more(layout.masquerades_ipv6, f'oifname != {{ {link}, "lo" }} ip6 saddr {prefix} masquerade')
    return "\n".join((*_fresh("inet", name), f"""\
table inet {name} {{
    # Before any DNAT of the machine's own: what it publishes on its addresses is not for guests.
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;{neighbours}
        iifname {link} fib daddr type != unicast ct state != {{ established, related }} drop
    }}
    # Guests answer the machine, but never speak first.
    chain input {{
        type filter hook input priority filter - 5; policy accept;{neighbours}
        iifname {link} ct state {{ established, related }} accept
        iifname {link} drop
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        iifname != {link} oifname != {link} accept
        iifname {link} oifname {link} drop
        # A cloud's metadata holds the machine's own credentials.
        iifname {link} ip daddr 169.254.0.0/16 drop
        iifname {link} ip saddr {pool} accept
        oifname {link} ip daddr {pool} accept{forward}
        drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname != {link} ip saddr {pool} masquerade{masquerade}
    }}
}}
"""))


def without(family: str, name: str) -> str:
    """The text that removes a table, whether it is there or not."""
    return "\n".join((*_fresh(family, name), ""))


def _fresh(family: str, name: str) -> tuple[str, str]:
    # Older nft has no `destroy`: adding first makes the deletion never fail.
    return f"table {family} {name} {{}}", f"delete table {family} {name}"


def _more(wanted: object, lines: str) -> str:
    """Further lines of a chain, where they are wanted."""
    return "".join(f"\n        {line}" for line in lines.splitlines()) if wanted else ""


def _bridge(layout: Layout, ports: Sequence[Port]) -> list[str]:
    taps = [(f'"{tap_name(port.id)}"', port) for port in ports]
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
        *_elements("map tenants", "ifname : mark", (f"{tap} : {port.tenant}" for tap, port in taps)),
        *_elements("set neighbours", "ifname . mark", (f"{tap} . {port.tenant}" for tap, port in taps)),
        *_elements("set sources", "ifname . ether_addr . ipv4_addr",
                   (f"{tap} . {port.mac} . {port.private_ipv4}" for tap, port in taps)),
        *_elements("set sources6", "ifname . ether_addr . ipv6_addr", sources6),
        # A probe for a duplicate address (RFC 5227) asks with the sender 0.0.0.0.
        *_elements("set senders", "ifname . ether_addr . ether_addr . ipv4_addr",
                   (f"{tap} . {port.mac} . {port.mac} . {address}"
                    for tap, port in taps for address in (port.private_ipv4, "0.0.0.0"))),
        f"""\
    chain prerouting {{
        type filter hook prerouting priority dstnat; policy drop;
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
        ether type != {{ ip, arp, ip6 }} drop
        meta mark set iifname map @tenants
        ether type ip iifname . ether saddr . ip saddr @sources accept
        ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation {{ request, reply }} \
iifname . ether saddr . arp saddr ether . arp saddr ip @senders accept{ipv6}
    }}
    # The kernel hands some link-local destinations straight to this hook, past prerouting.
    chain input {{
        type filter hook input priority filter; policy accept;
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
    }}
    # From tap to tap: within one tenant only, and no IPv6. What {BRIDGE} itself sends does not come by here.
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ether type ip6 drop
        oifname . meta mark @neighbours accept
    }}
}}"""]


def _inet(layout: Layout, ports: Sequence[Port]) -> list[str]:
    seen = [port for port in ports if port.public_ipv4]
    openings = {port.private_ipv4: _openings(port.firewall, 4) for port in seen}
    openings6 = {port.public_ipv6: _openings(port.firewall, 6) for port in ports if layout.public_ipv6 and port.public_ipv6}
    # Guests with the same rules share a chain: a host of a thousand default firewalls has one.
    chains = {_chain_name(lines): lines for lines in (*openings.values(), *openings6.values()) if lines}
    entry = _more(layout.public_ipv6, f"""\
iifname "{BRIDGE}" ip6 daddr {{ {GATEWAY_IPV6}, {SOLICITED_GATEWAY} }} icmpv6 type nd-neighbor-solicit accept
iifname "{BRIDGE}" ip6 daddr {{ {GATEWAY_IPV6}, {layout.namespace_ipv6} }} icmpv6 type echo-request accept
iifname "{BRIDGE}" ip6 daddr {METADATA_IPV6} tcp dport {METADATA_PORT} accept
iifname "{UPLINK}" {NEIGHBOURS} accept
iifname "{UPLINK}" ip6 saddr {layout.machine_ipv6} icmpv6 type echo-request accept""" if layout.public_ipv6 else "")
    untracked = [_more(layout.public_ipv6, f'{way}ifname "{BRIDGE}" ip6 {end}addr {METADATA_IPV6} notrack')
                 for way, end in (("i", "d"), ("o", "s"))]
    return [
        f"table inet {TABLE} {{",
        *_elements("map inward", "ipv4_addr : ipv4_addr", (f"{port.public_ipv4} : {port.private_ipv4}" for port in seen)),
        *_elements("map outward", "ipv4_addr : ipv4_addr", (f"{port.private_ipv4} : {port.public_ipv4}" for port in seen)),
        # Without a public IPv4 address there is no way out: it is told so, and need not wait.
        *_elements("set unseen", "ipv4_addr", (port.private_ipv4 for port in ports if not port.public_ipv4)),
        *(line for name, lines in sorted(chains.items()) for line in
          (f"    chain {name} {{", *(f"        {line}" for line in lines), "    }")),
        *_elements("map firewalls", "ipv4_addr : verdict", _verdicts(openings)),
        *_elements("map firewalls6", "ipv6_addr : verdict", _verdicts(openings6)),
        f"""\
    # Nothing enters but by the bridge and the uplink: frames to link-local MACs can surface on a tap itself.
    chain doors {{
        type filter hook prerouting priority raw; policy drop;
        iifname "{BRIDGE}" ip daddr {METADATA} notrack{untracked[0]}
        iifname {{ "lo", "{BRIDGE}", "{UPLINK}" }} accept
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
        type filter hook forward priority filter; policy drop;
        ip daddr 169.254.0.0/16 drop
        iifname "{BRIDGE}" ip saddr @unseen reject with icmp net-unreachable
        ct state {{ established, related }} accept
        iifname "{BRIDGE}" ct state new add @busy {{ ip saddr ct count over {MAX_CONNECTIONS} }} drop
        iifname "{BRIDGE}" ct state new add @busy6 {{ ip6 saddr ct count over {MAX_CONNECTIONS} }} drop
        iifname "{BRIDGE}" oifname "{UPLINK}" ct state new accept
        oifname "{BRIDGE}" ct state new ct status dnat accept
        oifname "{BRIDGE}" ct state new meta nfproto ipv6 accept
    }}
    # From guest to guest's public address too: the other side sees a public address and answers through the gateway.
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        snat ip to ip saddr map @outward
    }}
    # After the source NAT: a rule names its clients by the addresses that everybody sees them by, another guest too.
    chain firewall {{
        type filter hook postrouting priority srcnat + 10; policy accept;
        oifname != "{BRIDGE}" accept
        ct state != new accept
        ip daddr vmap @firewalls
        ip6 daddr vmap @firewalls6
        drop
    }}
}}"""]


def _verdicts(openings: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    return (f"{address} : jump {_chain_name(lines)}" for address, lines in openings.items() if lines)


def _elements(head: str, type: str, elements: Iterable[str]) -> list[str]:
    written = ",\n            ".join(elements)
    body = [f"        elements = {{\n            {written}\n        }}"] if written else []
    return [f"    {head} {{", f"        type {type}", *body, "    }"]


def _chain_name(lines: Sequence[str]) -> str:
    return "rules_" + hashlib.blake2b("\n".join(lines).encode(), digest_size=5).hexdigest()


def _openings(rules: Iterable[FirewallRule], version: Literal[4, 6]) -> tuple[str, ...]:
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

