"""Master files (RFC 1035, 5): a zone as text, and text as entries. Parsed by dnspython, which every answer of a name server
can be put through again."""

from __future__ import annotations

import dns.exception
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.tokenizer
import dns.zone
import dns.zonefile

from skysail.contract.document import SOA_TIMES, Zone
from skysail.kit.errors import ApiError, SkysailError
from skysail.resources import records
from skysail.resources.records import Entry

# Written by this cloud, in a zone file of any origin.
_OWN = ("SOA", "DNSKEY", "CDS", "CDNSKEY", "RRSIG", "NSEC", "NSEC3", "NSEC3PARAM")
MAX_BYTES = 8 * 1024 * 1024


def write(zone: Zone, serial: int) -> str:
    """The zone as it is served; ``serial`` is what its SOA record says."""
    lines = [f"$ORIGIN {zone.name}", f"$TTL {records.TTL}",
             f"{zone.name} 900 IN SOA {zone.primary} {zone.hostmaster} {serial} {SOA_TIMES}"]
    lines += [f"{one.name} {one.ttl} IN {one.type} {record}" for one in zone.record_sets for record in one.records]
    return "\n".join(lines) + "\n"


class _Reader(dns.zonefile.Reader):
    """Refuses a record outside of the zone, which dnspython skips without a word."""

    def _eat_line(self) -> None:
        raise ValueError(f"{self.last_name} is outside of the zone {self.zone_origin}")


def read(text: str, name: str = "") -> tuple[str, list[Entry], list[str]]:
    """The domain's name, its entries, and in words what was left out: the records that this cloud writes itself. ``name``
    is needed where the file has no ``$ORIGIN``. Raises :class:`SkysailError` naming all that cannot be an entry."""
    if len(text) > MAX_BYTES:
        raise SkysailError(f"the zone file is larger than {MAX_BYTES} bytes")
    origin, parsed = _parse(text, records.domain_name(name) + "." if name else None)
    domain = records.domain_name(origin.to_text())
    entries, left_out, refusals = [], [], []
    for owner, ttl, rdata in parsed.iterate_rdatas():
        kind = dns.rdatatype.to_text(rdata.rdtype)
        if kind in _OWN or (kind == "NS" and owner == origin):
            left_out.append(f"{kind} {owner}: this cloud writes its own")
            continue
        try:
            entries.append(records.read(domain, owner.to_text(), kind, rdata.to_text(), ttl))
        except ApiError as refused:
            refusals.append(refused.what)
    if refusals:
        raise SkysailError("nothing was imported:\n" + "\n".join(sorted(refusals)),
                           f"the types that are offered: {', '.join(records.TYPES)}")
    return domain, entries, sorted(left_out)


def _parse(text: str, origin: str | None) -> tuple[dns.name.Name, dns.zone.Zone]:
    parsed = dns.zone.Zone(origin, relativize=False)
    try:
        with parsed.writer(True) as transaction:
            # Neither $INCLUDE, which reads other files, nor $GENERATE, of which one line is as many as it likes.
            _Reader(dns.tokenizer.Tokenizer(text, "zone file"), dns.rdataclass.IN, transaction,
                    allow_directives=("$ORIGIN", "$TTL")).read()
    except (dns.exception.DNSException, ValueError) as wrong:
        raise SkysailError(f"this is not a zone file: {wrong or type(wrong).__name__}",
                           "one without $ORIGIN needs --name, one without times to live $TTL") from wrong
    if parsed.origin is None:
        raise SkysailError("the zone file does not say of which domain it is", "give --name")
    return parsed.origin, parsed
