"""The desired document of one host: everything its agent shall make true.

Missing from a document never means kill: a guest or a zone goes away only by the explicit role ``gone``, so an empty database
or a bad restore stops nobody's server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Literal

import msgspec

from skysail.contract import VERSION
from skysail.contract.migration import Receiving, Sending

# ``send`` and ``receive``: it runs, and moves to another host; it comes from one.
Role = Literal["run", "stop", "gone", "send", "receive"]
Kept = Literal["keep", "gone"]
# The agent, which is root, makes names of files and devices from it, and removes them.
Id = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9-]{0,62}\Z")]
# Refresh, retry and expire of every zone's SOA record, and for how many seconds an answer that there is nothing is kept.
SOA_TIMES = "7200 900 1209600 60"


class FirewallRule(msgspec.Struct, frozen=True, kw_only=True):
    """One opening. ``protocol`` is tcp, udp, icmp, icmpv6 or all; ports are inclusive (for icmp: type and code, -1 = any)."""

    protocol: str
    from_port: int
    to_port: int
    cidrs: tuple[str, ...] = ("0.0.0.0/0",)
    ipv6_cidrs: tuple[str, ...] = ("::/0",)


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's place in the network. ``network`` numbers its private network: guests of one reach each other privately.
    A guest without ``public_ipv6`` has IPv4 alone, one without ``public_ipv4`` reaches nobody by IPv4 but its neighbours.
    ``ssh_port`` of the machine's single address leads to its port 22, where the machine has one. The guest of an ``awaited``
    port is on its way from another host: there its addresses are, until the port is announced here. Its card's frames carry
    packets of up to ``mtu`` bytes."""

    id: Id
    mac: str
    # Records of guests that earlier versions made have it by the older name.
    network: int = msgspec.field(name="tenant")
    private_ipv4: str
    public_ipv4: str = ""
    public_ipv6: str = ""
    firewall: tuple[FirewallRule, ...] = ()
    ssh_port: int = 0
    awaited: bool = False
    mtu: int = 1500

    @property
    def public_addresses(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.public_ipv4, self.public_ipv6)))

    def sources(self, tcp_port: int) -> tuple[str, ...]:
        """The IPv4 networks to which its firewall opens a TCP port, none where it is closed."""
        return tuple(sorted({cidr for rule in self.firewall for cidr in rule.cidrs if rule.protocol == "all" or (
            rule.protocol == "tcp" and rule.from_port <= tcp_port <= rule.to_port)}))


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """A private network that is joined with others or spans hosts; one that no document names is alone, and here. Its guests
    and those of its ``peers`` reach each other privately; when it is ``routed``, so do its guests and the peer subnets of the
    host's configuration. Between hosts its frames carry the VXLAN network identifier ``vni`` (RFC 7348), the same on all; 0
    for a network that is on this host only."""

    number: int
    peers: tuple[int, ...] = ()
    routed: bool = False
    vni: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)] = 0


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """What this host's networks need to span hosts. ``hosts`` are the underlay addresses of all others, which alone may send
    frames. Addresses are told by BGP, among routers of the number ``autonomous_system``: to every other host, or, where there
    are ``reflectors``, to those (among the hosts or beside them), which pass them on. Packets for public addresses on other
    hosts carry the identifier ``vni``."""

    hosts: tuple[str, ...] = ()
    reflectors: tuple[str, ...] = ()
    autonomous_system: int = 64512
    vni: Annotated[int, msgspec.Meta(gt=0, lt=1 << 24)] = (1 << 24) - 2


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a volume was made of: the copy of ``volume`` in ``snapshot``."""

    snapshot: Id
    volume: Id


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A disk, ``size_gib`` large: a copy-on-write child of its ``origin``, else of image ``image`` (its digest), else
    (block storage, without an image) blank."""

    id: Id
    image: str
    size_gib: int
    origin: Origin | None = None


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A block-storage disk in a guest, which finds it by its serial ``name``. ``mount``: it is mounted there, and formatted
    first when it is blank."""

    volume: Volume
    name: Annotated[str, msgspec.Meta(pattern=r"\Axvd[f-z]\Z")]
    mount: bool = False


class Personality(msgspec.Struct, frozen=True, kw_only=True):
    """Who the guest is at first boot. ``user_data`` is the owner's launch script, run once as root."""

    hostname: str
    user: str
    authorized_keys: tuple[str, ...] = ()
    trusted_user_ca: tuple[str, ...] = ()
    user_data: str = ""


class MetadataOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an instance may read its metadata, in the API's words. ``http_put_response_hop_limit`` is the IP time to live of
    the answer that carries a token."""

    http_tokens: Literal["optional", "required"] = "optional"
    http_endpoint: Literal["enabled", "disabled"] = "enabled"
    http_put_response_hop_limit: int = 1
    http_protocol_ipv6: Literal["enabled", "disabled"] = "disabled"


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest's metadata say beyond what the guest itself is. ``instance_id`` is the controller's, ``launched_at`` in
    seconds since the epoch."""

    instance_id: str
    account: str
    region: str
    zone: str
    bundle: str
    key_name: str
    launched_at: float
    options: MetadataOptions = MetadataOptions()


class Heritage(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a guest whose host failed, beyond its disks, which are in a pool and whole as a power cut leaves them:
    the public half of its own host key, and whether it carries our agents (None: as its image says)."""

    host_key: str = ""
    ours: bool | None = None


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """One QEMU process that shall exist (or not). ``starts`` and ``reboots`` count the owner's requests: a guest that
    powered itself off stays off until ``starts`` grows; a reboot is due while the agent has done fewer than ``reboots``.
    ``force`` skips the orderly shutdown when the role is ``stop``. All its disks together take ``iops`` operations a
    second; 0 sets no bound. ``baseline_percent`` of each processor is what its plan gives for good, more is burst; 100 for a
    plan without burst. Without ``metadata`` it is told none: its instance is deleted. One that is gone and ``leaves_disks``
    has none of its own: they are in a pool, and the guest's that it is, or was, on another host. One that is ``stranded`` is
    what is left of a guest that went on elsewhere when its host failed: it has no place in the network. One with a
    ``heritage`` went on here."""

    id: Id
    instance: str
    role: Role
    starts: int
    reboots: int
    vcpus: int
    memory_mib: int
    volume: Volume
    port: Port
    personality: Personality
    force: bool = False
    disks: tuple[Attachment, ...] = ()
    iops: int = 0
    baseline_percent: float = 100.0
    metadata: Metadata | None = None
    sending: Sending | None = None
    receiving: Receiving | None = None
    lost: str = ""
    leaves_disks: bool = False
    stranded: bool = False
    heritage: Heritage | None = None


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A block-storage disk that shall exist (or not). One that was ``made`` is never made again: a blank disk in the place of
    somebody's would hide the loss."""

    volume: Volume
    role: Kept
    made: bool

    @property
    def id(self) -> str:
        return self.volume.id


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of ``volumes``, all of one moment, that shall exist (or not). ``guest`` has them; '' when none does. One that
    ``duplicates`` another is made of that one's files; one that ``arrived`` was laid on the host by an import. Neither looks
    at the volumes. One that is ``leaving`` is wanted by nobody but those that stand on it: they are moved off."""

    id: Id
    role: Kept
    guest: str
    volumes: tuple[Volume, ...]
    duplicates: Id | None = None
    arrived: bool = False
    leaving: bool = False


class RecordSet(msgspec.Struct, frozen=True, kw_only=True):
    """All records of one name and type (RFC 2181, 5). ``name`` is absolute, in lower case, with its final dot; ``records``
    are sorted, in the form of a master file (RFC 1035, 5.1), names in them absolute; an IPv6 address has its eight groups."""

    name: str
    type: str
    ttl: int
    records: tuple[str, ...]


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """A zone that the host's name server shall answer for (or not). ``record_sets`` are all of it but the SOA record, which
    names ``primary`` and ``hostmaster``. Its serial is ``serial``, or more: a host raises it when record sets change under
    the same ``serial``, as those of an alias do. ``signing_key`` signs the zone (RFC 4034, algorithm 13, one key for keys and
    zone; the text of BIND's private key files, v1.2); empty, the zone is not signed."""

    id: str
    name: str
    role: Literal["serve", "gone"]
    serial: int
    primary: str
    hostmaster: str
    record_sets: tuple[RecordSet, ...] = ()
    signing_key: str = ""


class ZoneOutline(msgspec.Struct, frozen=True, kw_only=True):
    """A :class:`Zone` that shall be served, its record sets by reference: ``parts`` are the digests of its parts, each of
    which is, in JSON, the record sets of some of its names. A change of one record set makes one part new, and no other."""

    id: str
    name: str
    serial: int
    primary: str
    hostmaster: str
    parts: tuple[str, ...]
    signing_key: str = ""

    def zone(self, parts: Iterable[tuple[RecordSet, ...]]) -> Zone:
        """The zone that is made of these parts."""
        return Zone(id=self.id, name=self.name, role="serve", serial=self.serial, primary=self.primary,
                    hostmaster=self.hostmaster, signing_key=self.signing_key,
                    record_sets=tuple(chain.from_iterable(parts)))


def part_digest(part: bytes) -> str:
    """By what a part of a zone is known: half of its SHA-256, in hexadecimal."""
    return hashlib.sha256(part).hexdigest()[:32]


class HostName(msgspec.Struct, frozen=True, kw_only=True):
    """A name by which guest ``guest`` is asked for: in lower case, without a final dot; ``*.`` before it stands for one
    label."""

    name: Annotated[str, msgspec.Meta(pattern=r"\A(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\Z", max_length=255)]
    guest: Id


class JumpAccount(msgspec.Struct, frozen=True, kw_only=True):
    """Who may jump to the guests of these private networks: the holders of these public keys (in OpenSSH's form)."""

    networks: tuple[int, ...]
    keys: tuple[str, ...]


class Entrance(msgspec.Struct, frozen=True, kw_only=True):
    """How guests are reached where all share the machine's one public address: on ports 80 and 443 by name, and by the
    SSH jump."""

    names: tuple[HostName, ...] = ()
    accounts: tuple[JumpAccount, ...] = ()


class HostDocument(msgspec.Struct, frozen=True, kw_only=True):
    """All that one host shall hold. The agent refuses a ``generation`` older than the one that it has. On its way to the
    agent, and in the agent's ledger, large zones are ``outlines``; everywhere else all of them are ``zones``. ``life`` is the
    agent's (:class:`skysail.contract.report.HostReport`) in which the controller had heard it when it wrote this; '' where
    nobody asked it to."""

    host: str
    generation: int
    guests: tuple[Guest, ...] = ()
    disks: tuple[Disk, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    zones: tuple[Zone, ...] = ()
    entrance: Entrance | None = None
    networks: tuple[Network, ...] = ()
    overlay: Overlay | None = None
    outlines: tuple[ZoneOutline, ...] = ()
    life: str = ""
    version: int = VERSION


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A document on its way, with parts of its zones by their digests: those that the agent may not have yet. If others are
    missing, it takes nothing and names them."""

    document: HostDocument
    parts: dict[str, msgspec.Raw] = {}
