"""How a machine becomes a host: by a token that the operator made, once, within its time.

The token also names the cloud's authority by its fingerprint, so that the machine knows the controller from its first word
on. The store keeps only a hash of the token's secret. A machine whose answer was lost asks again with the same token and the
same key, and gets its certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail import contract
from skysail.contract.facts import HostFacts
from skysail.hosts import overlay
from skysail.hosts.authority import Authority
from skysail.kit import certificates
from skysail.kit.errors import SkysailError
from skysail.store.schema import host_zones, hosts, join_tokens

# As a DNS label (RFC 1123): names of machines are.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_TOKEN = re.compile(r"(?P<id>[0-9a-f]{8})\.(?P<secret>[0-9a-f]{64})\.(?P<authority>[0-9a-f]{64})")


class Refused(SkysailError):
    """The machine is not let in."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator takes from the controller to the machine. ``authority`` is its certificate's SHA-256."""

    id: str
    secret: str
    authority: str

    def __str__(self) -> str:
        return f"{self.id}.{self.secret}.{self.authority}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises SkysailError for what is no token."""
        found = _TOKEN.fullmatch(text.strip())
        if found is None:
            raise SkysailError("this is no token", "make one on the controller: sudo ./skysail host token")
        return cls(**found.groupdict())


class Application(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine asks with: its token's id and secret, the name that it would have, the zone that it would serve ('' for
    any), where its agent will answer, a request for a certificate (PEM), and its facts."""

    token: str
    secret: str
    name: str
    zone: str
    address: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    request: Annotated[str, msgspec.Meta(max_length=8192)]
    facts: HostFacts


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine is from now on, with its certificate (PEM). ``settings`` are those of the cloud's configuration that
    hold on every host."""

    host: str
    identity: str
    certificate: str
    zones: tuple[str, ...]
    settings: dict[str, object] = {}


def make_token(connection: Connection, authority: Authority, now: float, seconds: float, host: str = "",
               zone: str = "") -> Token:
    """A token for one machine: to become ``host`` if that is told, which may be there already and is then another machine
    from the joining on; to serve ``zone`` if that is told. Raises SkysailError for a name that no host can have."""
    if host and not NAME.fullmatch(host):
        raise SkysailError(f"{host!r} is no name for a host: it takes small letters, digits and hyphens")
    connection.execute(delete(join_tokens).where(join_tokens.c.expires_at < now))
    made = Token(id=secrets.token_hex(4), secret=secrets.token_hex(32), authority=authority.fingerprint)
    connection.execute(insert(join_tokens).values(
        id=made.id, secret_hash=_hash(made.secret), host=host, zone=zone, created_at=now, expires_at=now + seconds))
    return made


def admit(connection: Connection, authority: Authority, asked: Application, zones: Sequence[str], now: float) -> Admission:
    """Make the machine a host. ``zones`` are the names of the cloud's zones, the first of which is that of who asks for none.
    Raises :class:`Refused`; then nothing has changed."""
    token = _token(connection, asked, now)
    if contract.common(asked.facts.contract) is None:
        raise Refused(f"this machine's Skysail speaks version {asked.facts.contract} of the contract, the controller's "
                      f"{contract.VERSION}", "use the same version of Skysail on both")
    try:
        key = hashlib.sha256(certificates.public_pem(certificates.requested_key(asked.request.encode()))).hexdigest()
    except (ValueError, TypeError) as wrong:
        raise Refused(f"this is no request for a certificate: {wrong}") from wrong
    if not _is_place(asked.address):
        raise Refused(f"{asked.address!r} is no address", "join with --address, an IP address or a host name of this machine")
    if token["used_at"] is not None:
        return _again(connection, authority, token, key, asked, now)
    name = token["host"] or asked.name
    if not NAME.fullmatch(name):
        raise Refused(f"{name!r} is no name for a host: it takes small letters, digits and hyphens", "join with --name")
    zone = token["zone"] or asked.zone or zones[0]
    if asked.zone and asked.zone != zone:
        raise Refused(f"this token is for the zone {zone}, not {asked.zone}", "leave --zone out")
    if zone not in zones:
        raise Refused(f"this cloud has no zone {zone}", f"it has {', '.join(zones)}")
    there = connection.execute(select(hosts).where(hosts.c.id == name)).mappings().first()
    if there is not None and token["host"] != name:
        raise Refused(f"there is a host {name} already", "join with another --name; to let this machine be that host from "
                      f"now on, make a token with: sudo ./skysail host token --host {name}")
    identity = secrets.token_hex(16)
    moved = overlay.moved(connection, name, msgspec.to_builtins(asked.facts))
    facts = {"address": f"https://{identity}@{_at(asked.address)}:{asked.port}", "facts": msgspec.to_builtins(asked.facts),
             "accelerator": asked.facts.accelerator}
    if there is None:
        connection.execute(insert(hosts).values(id=name, name_server=False, **facts))
        region, letter = zone[:-1], zone[-1]
        connection.execute(insert(host_zones).values(host_id=name, region=region, zone=letter))
    else:
        connection.execute(update(hosts).where(hosts.c.id == name).values(**facts))
        forget_tokens(connection, name)
    if moved:
        overlay.bump(connection)
    connection.execute(update(join_tokens).where(join_tokens.c.id == token["id"]).values(
        used_at=now, used_key=key, host=name))
    return _admission(connection, authority, name, identity, asked, now)


def forget_tokens(connection: Connection, host: str) -> None:
    """Whoever became the host by them is it no more: with one of these it would get its successor's identity."""
    connection.execute(delete(join_tokens).where(join_tokens.c.host == host, join_tokens.c.used_at.is_not(None)))


def _token(connection: Connection, asked: Application, now: float) -> RowMapping:
    row = connection.execute(select(join_tokens).where(join_tokens.c.id == asked.token)).mappings().first()
    if row is None or not hmac.compare_digest(row["secret_hash"], _hash(asked.secret)):
        raise Refused("this token is not known here", "make another one: sudo ./skysail host token")
    if row["expires_at"] < now:
        raise Refused("this token's time is over", "make another one: sudo ./skysail host token")
    return row


def _again(connection: Connection, authority: Authority, token: RowMapping, key: str, asked: Application,
           now: float) -> Admission:
    """The same machine asks again: the answer to it was lost."""
    row = connection.execute(select(hosts).where(hosts.c.id == token["host"])).mappings().first()
    if token["used_key"] != key or row is None:
        raise Refused("this token was used already", "make another one: sudo ./skysail host token")
    identity = row["address"].removeprefix("https://").partition("@")[0]
    connection.execute(update(hosts).where(hosts.c.id == row["id"]).values(
        address=f"https://{identity}@{_at(asked.address)}:{asked.port}"))
    return _admission(connection, authority, row["id"], identity, asked, now)


def _admission(connection: Connection, authority: Authority, host: str, identity: str, asked: Application,
               now: float) -> Admission:
    served = connection.execute(select(host_zones).where(host_zones.c.host_id == host)
                                .order_by(host_zones.c.region, host_zones.c.zone))
    return Admission(host=host, identity=identity, zones=tuple(row.region + row.zone for row in served),
                     certificate=authority.certify_host(identity, asked.request.encode(), now).decode())


def _is_place(text: str) -> bool:
    """Whether it is an address, without a scope, which Python takes anything for and which means nothing on another machine,
    or a host name. No name ends in digits (RFC 1123, 2.1): that is an address with a mistake in it."""
    try:
        return "%" not in text and bool(ipaddress.ip_address(text))
    except ValueError:
        labels = text.split(".")
        return not labels[-1].isdigit() and all(NAME.fullmatch(label) for label in labels)


def _at(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def zone_names(regions: Mapping[str, Sequence[str]], home: str) -> list[str]:
    """The names of a cloud's zones, those of its home region first."""
    ordered = [home, *(name for name in regions if name != home)]
    return [name + letter for name in ordered for letter in regions[name]]
