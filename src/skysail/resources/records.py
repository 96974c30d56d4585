"""Domain entries as values: what a customer wrote, checked, and what it means to a name server.

Source: RFC 1035, 1123 (names), 2181 (record sets), 2782 (SRV), 7505 (null MX), 7208 (SPF); Lightsail user guide, "DNS record
types". Malformed ones raise InvalidInputException.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

import dns.exception
import dns.rdata

from skysail.kit.errors import ApiError, invalid_input

TYPES = ("A", "AAAA", "CNAME", "MX", "NS", "SRV", "TXT")
# Lightsail's own time to live: it has no field for another one. A zone file's is kept.
TTL = 60
MAX_TTL = 604_800
MAX_TARGET = 4000
# A record set has to fit a DNS message of 64 KiB (RFC 1035, 4.2.2) together with its signature.
MAX_SET_OCTETS = 60_000

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_OWNER_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"(?:[ \t]+"(?:[^"\\]|\\.)*")*', re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One entry. ``target`` is as the customer wrote it; ``record`` is the RDATA in a master file's form, names absolute, an
    IPv6 address with eight groups; an alias has the name of a resource in ``alias``, its region in
    ``alias_region``, and no record."""

    name: str
    type: str
    target: str
    record: str = ""
    alias: str = ""
    ttl: int = TTL
    alias_region: str = ""

    @property
    def meaning(self) -> tuple[str, ...]:
        """What no two entries of a domain have in common (RFC 2181, 5)."""
        return self.name, self.type, self.record, self.alias, self.alias_region


def malformed(subject: str, why: str, tip: str = "") -> ApiError:
    """The error of an entry that cannot be."""
    return invalid_input(f"The domain entry {subject[:200]} is not valid: {why}", tip)


def domain_name(text: str) -> str:
    """A domain's name in lower case without the final dot; raises InvalidInputException."""
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise invalid_input(f"The domain name {text[:80]!r} is not valid.",
                            "A domain name such as example.com has two or more labels of letters, digits and '-'; names in "
                            "other alphabets are written in their xn-- form.")
    return name


def owner_name(domain: str, text: str) -> str:
    """The name of an entry of ``domain``: the domain itself, or below it; '*' may stand for the first label."""
    name = text.lower().removesuffix(".")
    if name == domain:
        return name
    if not name.endswith("." + domain):
        raise malformed(text, f"its name is not in the domain {domain}.",
                        f"An entry has its full name, such as www.{domain}.")
    labels = name.removesuffix("." + domain).split(".")
    if len(name) > 253 or not all(_OWNER_LABEL.fullmatch(label) for label in labels[labels[0] == "*":]):
        raise malformed(text, "a name has labels of 1 to 63 letters, digits, '-' and '_', and 253 characters at most.")
    return name


def read(domain: str, name: str, type: str, target: str, ttl: int = TTL) -> Entry:
    """The entry of ``domain`` that a customer described; raises InvalidInputException."""
    if type not in TYPES:
        raise malformed(f"{type[:20]!r} {name}", f"its type is not one of {', '.join(TYPES)}.",
                        "The start of authority (SOA) is written by this cloud." if type == "SOA" else "")
    owner = owner_name(domain, name)
    subject = f"{type} {owner}"
    if len(target) > MAX_TARGET:
        raise malformed(subject, f"its target is longer than {MAX_TARGET} characters.")
    if not 0 <= ttl <= MAX_TTL:
        raise malformed(subject, f"its time to live is not between 0 and {MAX_TTL} seconds.")
    if owner == domain and type in ("CNAME", "NS"):
        why = ("the domain itself cannot be another name (RFC 1034, 3.6.2)." if type == "CNAME" else
               "the name servers of the domain itself are this cloud's own.")
        raise malformed(subject, why, "Use an alias of type A instead." if type == "CNAME" else "")
    return Entry(owner, type, target, _RDATA[type](subject, target), ttl=ttl)


def together(entries: Sequence[Entry]) -> None:
    """Whether these entries, all of one name, can be together; raises InvalidInputException."""
    seen: set[tuple[str, ...]] = set()
    for entry in entries:
        subject = f"{entry.type} {entry.name}"
        if entry.meaning in seen:
            raise invalid_input(f"The domain entry {subject} with the target {entry.target[:80]} already exists.")
        seen.add(entry.meaning)
        same = [other for other in entries if other.type == entry.type]
        if entry.type == "CNAME" and len(entries) > 1:
            raise malformed(subject, "a name that is a CNAME has no other entries (RFC 1034, 3.6.2).")
        if entry.alias and len(same) > 1:
            raise malformed(subject, "an alias is the only entry of its name and type.")
        if any(other.ttl != entry.ttl for other in same):
            raise malformed(subject, "entries of one name and type have one time to live (RFC 2181, 5.2).")
        if sum(len(other.record) + 12 for other in same) > MAX_SET_OCTETS:
            raise malformed(subject, "all entries of this name and type are more than a DNS message holds.")
    if sum(entry.type == "TXT" and re.match(r'"v=spf1(?: |")', entry.record, re.I) is not None for entry in entries) > 1:
        raise malformed(f"TXT {entries[0].name}", "a name has one SPF record at most (RFC 7208, 3.2).")


def _ipv4(subject: str, target: str) -> str:
    try:
        return str(ipaddress.IPv4Address(target))
    except ValueError:
        raise malformed(subject, f"{target[:60]!r} is not an IPv4 address.") from None


def _ipv6(subject: str, target: str) -> str:
    try:
        if "%" in target:
            raise ValueError
        return ipaddress.IPv6Address(target).exploded
    except ValueError:
        raise malformed(subject, f"{target[:60]!r} is not an IPv6 address.") from None


def _host(subject: str, target: str) -> str:
    """A host that a record points at, absolute. Underscores are let through: names that verify certificates have them."""
    name = target.lower().removesuffix(".")
    if len(name) > 253 or not all(_OWNER_LABEL.fullmatch(label) for label in name.split(".")):
        raise malformed(subject, f"{target[:60]!r} is not a host name.")
    return name + "."


def _mx(subject: str, target: str) -> str:
    words = target.split()
    if len(words) != 2 or not _fits(words[0]):
        raise malformed(subject, "its target is not a preference and a host.", "Write it like this: 10 mail.example.com")
    return f"{int(words[0])} {'.' if words == ['0', '.'] else _host(subject, words[1])}"


def _srv(subject: str, target: str) -> str:
    words = target.split()
    if len(words) != 4 or not all(_fits(word) for word in words[:3]):
        raise malformed(subject, "its target is not a priority, a weight, a port and a host.",
                        "Write it like this: 1 10 5060 sip.example.com")
    if not re.match(r"SRV _[^.]+\._[^.]+\.", subject):
        raise malformed(subject, "its name does not begin with a service and a protocol (RFC 2782).",
                        "Such as _sip._tcp.example.com.")
    numbers = " ".join(str(int(word)) for word in words[:3])
    return f"{numbers} {'.' if words[3] == '.' else _host(subject, words[3])}"


def _txt(subject: str, target: str) -> str:
    if not _QUOTED.fullmatch(target):
        raise malformed(subject, "its target is not in double quotes.", 'Write it like this: "v=spf1 -all"')
    try:
        return dns.rdata.from_text("IN", "TXT", target).to_text()
    except (dns.exception.DNSException, ValueError) as wrong:
        raise malformed(subject, f"its text cannot be read: {str(wrong)[:100] or 'malformed'}.",
                        "Each quoted string has at most 255 octets; a longer text is several strings.") from None


def _fits(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None and int(word) <= 65_535


_RDATA = {"A": _ipv4, "AAAA": _ipv6, "CNAME": _host, "NS": _host, "MX": _mx, "SRV": _srv, "TXT": _txt}
