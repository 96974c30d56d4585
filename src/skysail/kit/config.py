"""Configuration of one cloud: read once from ``<data>/skysail.toml``, defaults where the file is silent."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

from skysail.kit.errors import SkysailError

_MAIL = re.compile(r"[^\s@<>]+@[A-Za-z0-9.-]+")
_HOST_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_REVERSE_ZONE = re.compile(r"(\d{1,3}\.){1,3}in-addr\.arpa|([0-9a-f]\.){1,31}ip6\.arpa")
_ZONE = re.compile(r"[a-z]")
_CEPH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The names that clients take for a region: RegionName of Lightsail's service model, to which a test holds them.
REGIONS = ("us-east-1", "us-east-2", "us-west-1", "us-west-2", "eu-west-1", "eu-west-2", "eu-west-3", "eu-central-1",
           "eu-north-1", "eu-south-2", "ca-central-1", "ap-east-1", "ap-south-1", "ap-southeast-1", "ap-southeast-2",
           "ap-northeast-1", "ap-northeast-2", "ap-southeast-3", "ap-southeast-5", "sa-east-1")
# Below the data folder of a host that joined: what the cloud says that it is in.
CLOUD_SETTINGS = "agent/cloud.json"
# What a host that joins takes over from the cloud.
_OF_EVERY_HOST = ("private_network", "peer_subnets", "public_pool", "public_ipv6", "sample_seconds", "cpu_burst")
# How many user ids guests may take, from ``guest_uid_base`` on.
GUEST_UIDS = 60_000
# How many ports of a single address lead to instances' SSH, from ``ssh_ports`` on.
SSH_PORTS = 9_000


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator can choose. Every path derives from ``data``.

    ``database`` is '' for a SQLite file, or names a PostgreSQL: ``postgresql://[user@]host[:port]/name``, for a socket
    ``postgresql:///name?host=/run/postgresql``. Its password, where it takes one, is in ``database_password_file``.
    ``regions`` has the letters of each region's zones; ``default_region`` is the one that clients are pointed at and that
    domains are managed in, the first unless told. For a cloud of one region, ``default_region`` and ``zones`` (its letters)
    say the same. ``tls`` is on by itself where the API listens beyond this machine, for its answers carry private keys;
    ``tls_names`` are further host names and addresses that the endpoint's certificate is good for. ``public_address`` says
    whether an instance keeps its public IPv4 address over stop and start, or gets another one at each start, as on Lightsail.
    Each guest has one address of the IPv6 prefix ``public_ipv6``: a unique local one (RFC 4193) leaves the machine
    masqueraded, '' gives none. ``disk_overcommit`` is how many times its disk a host may promise to guests, which rarely fill
    theirs; ``cpu_overcommit`` the same of its processors, of which the smallest plans have a twentieth for good.
    Peered private networks reach the IPv4 networks ``peer_subnets`` beside this machine, and are reached from there.
    ``qemu_folder`` is where QEMU's programs are looked for before the machine's own. ``detached``: our programs are started
    as where no systemd runs, though it does: there may be several hosts on the machine.
    ``template_memory`` is how clones come to their template's memory (see ``hypervisor/template.py``).
    ``dns_listen`` and ``dns_port`` say where the name server answers, ``dns_api_port`` where its REST API does on the
    loopback address; ``name_servers`` are the host names that domains are delegated to.
    ``reverse_zones`` are those zones of addresses' names that were delegated to them.
    ``single_address`` is the machine's only public IPv4 address, which all instances then share: ports 80 and 443 by host
    name, SSH by ports from ``ssh_ports`` on and by the jump on ``jump_port``. Instances have names below
    ``instance_domain``, if there is one.
    Further machines join at ``join_listen``, an address of this one, and its ``join_port``; '' lets none join. With
    ``local_host`` this machine runs guests itself, not only the controller. Hosts reach each other at their
    ``underlay_address``: where the controller calls them, unless told; over an IPv4 one private networks span hosts.
    Public addresses of instances here are answered for on the network device ``segment``, and told by BGP to ``routers``:
    the IPv4 addresses of the operator's, with the number of each one's autonomous system.
    ``migrations_per_host``: how many guests may go from a host or come to it at a time; ``migration_mib_per_second`` bounds
    the memory of each, and each of its disks, 0 sets no bound.
    A host that has not answered for ``fence_after_seconds`` has failed. ``fence`` is the program, with its arguments, that
    turns one off: it is given the host's name and address as further arguments, and its exit status 0 says that the host is
    off for certain; it has ``fence_seconds`` for that. ``on_host_failure`` says what becomes of the host's instances: they
    ``wait`` for it; or, once it is off for certain, those ``restart`` on another host whose disks are in a pool that both
    see; or also those whose disks are files begin again from their last ``snapshot``, where another host has one, without
    what was written since.
    ``certificate_hours``: for how long the certificates of hosts are good, which are renewed after a third of that.
    ``storage`` says where guests' disks and snapshots are: ``files`` of this host, or images in the pool ``ceph_pool`` of a
    Ceph cluster (or in its namespace ``ceph_namespace``), which must be nobody else's. ``ceph_user`` is the cluster's client,
    whose key is in ``ceph_keyring``; ``ceph_networks`` are the networks that its monitors and OSDs are in, the only ones that
    a guest's process reaches.
    ``sample_seconds``: how often guests are measured. ``cpu_burst``: whether a guest that spent its credits is held to its
    plan's baseline, as on Lightsail. Notices of alarms go out by the relay ``smtp_host``, from ``mail_from``, and to webhooks
    of the origins in ``webhooks``; ``public_url`` is where their receivers reach this cloud. With a token in
    ``metrics_token_file`` others than this machine may read ``/metrics``.
    """

    data: str = "/var/lib/skysail"
    database: str = ""
    database_password_file: str = ""
    listen: str = "127.0.0.1"
    port: int = 8700
    tls: bool | None = None
    tls_names: tuple[str, ...] = ()
    default_region: str = ""
    zones: tuple[str, ...] = ()
    regions: dict[str, tuple[str, ...]] = {}
    namespace: str = "skysail"
    link: str = "skysail0"
    transit: str = "100.115.92.0/30"
    private_network: str = "172.26.0.0/16"
    peer_subnets: tuple[str, ...] = ()
    public_pool: str = "100.115.93.0/24"
    public_address: Literal["kept", "changes"] = "kept"
    public_ipv6: str = "fd53:6b79:7361::/64"
    disk_overcommit: float = 4.0
    cpu_overcommit: float = 20.0
    images: str = ""
    templates: str = ""
    resolvers: tuple[str, ...] = ()
    controller_user: str = "skysail"
    guest_uid_base: int = 200_000
    engines: Literal["real", "sim"] = "real"
    template_memory: Literal["auto", "mapped", "private"] = "auto"
    qemu_folder: str = ""
    detached: bool = False
    dns: Literal["powerdns", "sim"] | None = None
    dns_listen: str = "127.0.0.1"
    dns_port: int = 5300
    dns_api_port: int = 5301
    dns_user: str = "skysail-dns"
    name_servers: tuple[str, ...] = ("ns1.skysail.internal", "ns2.skysail.internal")
    reverse_zones: tuple[str, ...] = ()
    single_address: str = ""
    instance_domain: str = ""
    ssh_ports: int = 22000
    jump_port: int = 2222
    ingress_user: str = "skysail-ingress"
    jump_user: str = "skysail-jump"
    segment: str = ""
    routers: dict[str, int] = {}

    certificate_hours: float = 168.0
    join_listen: str = ""
    join_port: int = 8702
    local_host: bool = True
    underlay_address: str = ""
    migrations_per_host: int = 2
    migration_mib_per_second: float = 0.0
    on_host_failure: Literal["wait", "restart", "snapshot"] = "wait"
    fence: tuple[str, ...] = ()
    fence_after_seconds: float = 300.0
    fence_seconds: float = 120.0

    storage: Literal["files", "ceph"] = "files"
    ceph_pool: str = "skysail"
    ceph_namespace: str = ""
    ceph_user: str = "skysail"
    ceph_conf: str = "/etc/ceph/ceph.conf"
    ceph_keyring: str = ""
    ceph_networks: tuple[str, ...] = ()

    sample_seconds: float = 60.0
    cpu_burst: bool = False
    smtp_host: str = ""
    smtp_port: int = 25
    smtp_security: Literal["none", "starttls", "tls"] = "none"
    smtp_user: str = ""
    smtp_password_file: str = ""
    mail_from: str = ""
    webhooks: tuple[str, ...] = ()
    public_url: str = ""
    metrics_token_file: str = ""

    def __post_init__(self) -> None:
        self._settle_regions()
        self._check_database()
        own = [ipaddress.IPv4Network(network) for network in (self.private_network, self.public_pool, self.transit)]
        for subnet in map(ipaddress.IPv4Network, self.peer_subnets):
            if any(map(subnet.overlaps, own)):
                raise ValueError(f"peer_subnets has {subnet}, which overlaps a network of the cloud's own")
        if not 0.001 <= self.certificate_hours <= 8760:
            raise ValueError("certificate_hours takes 0.001 to 8760")
        if self.migrations_per_host < 1 or self.migration_mib_per_second < 0:
            raise ValueError("migrations_per_host takes 1 or more, migration_mib_per_second 0 or more")
        if self.fence and not self.fence[0].startswith("/"):
            raise ValueError("fence takes a program by its absolute path, and its arguments")
        if self.fence_after_seconds < 1 or not 1 <= self.fence_seconds <= 3600:
            raise ValueError("fence_after_seconds takes 1 or more, fence_seconds 1 to 3600")
        self._vet_ceph()
        if not 0.1 <= self.sample_seconds <= 300:
            raise ValueError("sample_seconds takes 0.1 to 300")
        if self.smtp_host and not _MAIL.fullmatch(self.mail_from):
            raise ValueError("smtp_host needs mail_from, the address that notices come from")
        if self.smtp_user and self.smtp_security == "none":
            raise ValueError("smtp_user needs smtp_security: a password is not sent in the clear")
        if not self.name_servers or not all(_HOST_NAME.fullmatch(name) and len(name) <= 253 for name in self.name_servers):
            raise ValueError("name_servers takes host names such as ns1.example.com, in lower case, without a final dot")
        if not all(_REVERSE_ZONE.fullmatch(name) for name in self.reverse_zones):
            raise ValueError("reverse_zones takes zones such as 113.0.203.in-addr.arpa or 8.b.d.0.1.0.0.2.ip6.arpa")
        if self.underlay_address and not _is_address(self.underlay_address):
            raise ValueError("underlay_address takes an address of this machine")
        if not all(map(_is_ipv4, self.routers)):
            raise ValueError("routers takes the IPv4 addresses of routers beside this machine")
        if not all(0 < number < 2**32 for number in self.routers.values()):
            raise ValueError("routers takes the autonomous system of each, such as 64513")
        if self.routers and not self.underlay_address:
            raise ValueError("routers needs underlay_address, which this machine speaks to them from")
        if self.single_address and not _is_ipv4(self.single_address):
            raise ValueError("single_address takes an IPv4 address of this machine")
        if self.instance_domain and not (_HOST_NAME.fullmatch(self.instance_domain) and len(self.instance_domain) <= 150):
            raise ValueError("instance_domain takes a domain name such as cloud.example.com, in lower case")
        if not 1024 <= self.ssh_ports <= 32768 - SSH_PORTS or not 0 < self.jump_port < 65536:
            raise ValueError(f"ssh_ports takes 1024 to {32768 - SSH_PORTS}, below the ports that this machine itself dials "
                             "from; jump_port takes a port")

    def _vet_ceph(self) -> None:
        """Raises ValueError where volumes cannot be in a cluster as it is said."""
        if self.storage != "ceph":
            return
        if not all(map(_CEPH_NAME.fullmatch, filter(None, (self.ceph_pool, self.ceph_namespace or None, self.ceph_user)))):
            raise ValueError("ceph_pool, ceph_namespace and ceph_user take letters, digits, '.', '_' and '-'")
        if not self.ceph_networks:
            raise ValueError("storage = \"ceph\" needs ceph_networks, the networks that the cluster's monitors and OSDs are "
                             "in, such as [\"10.0.8.0/24\"]")
        for network in self.ceph_networks:
            ipaddress.ip_network(network)
        for path in (self.ceph_conf, str(self.ceph_keyring_file)):
            if not path.startswith("/") or ":" in path or "," in path:
                raise ValueError("ceph_conf and ceph_keyring take absolute paths without ':' and ','")

    def _settle_regions(self) -> None:
        """Whichever of the three fields were given, all say the same afterwards. Raises ValueError."""
        home = self.default_region or next(iter(self.regions), "us-east-1")
        regions = self.regions or {home: self.zones or ("a",)}
        for name, letters in regions.items():
            if name not in REGIONS:
                raise ValueError(f"there is no region {name!r} that clients accept; they take " + ", ".join(REGIONS))
            if not letters or len(set(letters)) != len(letters) or not all(map(_ZONE.fullmatch, letters)):
                raise ValueError(f"the zones of {name} are one or more different letters, such as [\"a\", \"b\"]")
        if home not in regions:
            raise ValueError(f"default_region {home} is not among the regions {', '.join(regions)}")
        if self.zones and self.zones != regions[home]:
            raise ValueError(f"zones and regions do not say the same of {home}: leave zones out")
        for field, value in (("default_region", home), ("zones", regions[home]), ("regions", regions)):
            msgspec.structs.force_setattr(self, field, value)

    def _check_database(self) -> None:
        """Raises ValueError, which does not repeat what may hold a password."""
        if not self.database:
            return
        parts = urlsplit(self.database)
        if parts.scheme != "postgresql" or not parts.path.strip("/"):
            raise ValueError("database takes a PostgreSQL such as postgresql://skysail@db.example.com/skysail")
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError("database takes no password: write it to a file, and its path to database_password_file")

    @property
    def ceph_keyring_file(self) -> Path:
        """Where ceph-authtool(8) puts it, unless told otherwise."""
        return Path(self.ceph_keyring or f"/etc/ceph/ceph.client.{self.ceph_user}.keyring")

    @property
    def root(self) -> Path:
        return Path(self.data)

    @property
    def secure(self) -> bool:
        """Whether the API speaks TLS."""
        return self.tls if self.tls is not None else not (self.listen == "localhost" or _is_loopback(self.listen))

    @property
    def powerdns(self) -> bool:
        """Whether a PowerDNS answers for the domains, or a simulation."""
        return (self.dns or ("sim" if self.engines == "sim" else "powerdns")) == "powerdns"

    @property
    def naming_domain(self) -> str:
        """The domain below which addresses have names that have no other: that of the instances, else that of the name
        servers."""
        return self.instance_domain or self.name_servers[0].partition(".")[2]

    @property
    def ingress_dir(self) -> Path:
        return self.root / "ingress"

    @property
    def routing_dir(self) -> Path:
        return self.root / "routing"

    @property
    def dns_dir(self) -> Path:
        return self.root / "dns"

    @property
    def dns_key_file(self) -> Path:
        return self.dns_dir / "api.key"

    def of_every_host(self) -> dict[str, object]:
        """What holds on every host of the cloud, whichever machine it was chosen on. Only the first one has a name server."""
        return {name: msgspec.to_builtins(getattr(self, name)) for name in _OF_EVERY_HOST} | {"dns": "sim"}

    @property
    def certificate_seconds(self) -> float:
        return self.certificate_hours * 3600

    @property
    def certificates(self) -> Path:
        return self.root / "controller" / "tls"

    @property
    def sqlite_file(self) -> Path:
        return self.root / "controller" / "skysail.sqlite"

    @property
    def master_key(self) -> Path:
        return self.root / "controller" / "master.key"

    @property
    def agent_socket(self) -> Path:
        return self.root / "run" / "agent.sock"

    @property
    def images_dir(self) -> Path:
        return Path(self.images) if self.images else self.root / "images"

    @property
    def templates_dir(self) -> Path:
        return Path(self.templates) if self.templates else self.root / "templates"

    @property
    def accelerator_file(self) -> Path:
        return self.root / "agent" / "accelerator.json"

    @property
    def guests_dir(self) -> Path:
        return self.root / "guests"

    @property
    def importer_uid(self) -> int:
        """Under which foreign images are converted: behind the ones that guests are given."""
        return self.guest_uid_base + GUEST_UIDS

    @property
    def metadata_uid(self) -> int:
        """Under which guests are told of themselves: behind the importer's."""
        return self.importer_uid + 1

    @property
    def relay_uid(self) -> int:
        """Under which what a guest that moves is sent to another host is carried: none of the guests', which reach storage
        and nothing else where their disks are in a cluster."""
        return self.metadata_uid + 1

    @property
    def volumes_dir(self) -> Path:
        return self.root / "volumes"

    @property
    def snapshots_dir(self) -> Path:
        return self.root / "snapshots"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _is_ipv4(address: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(address))
    except ValueError:
        return False


def load(data: str | None = None) -> Config:
    """Read the configuration of the cloud in ``data`` (else ``$SKYSAIL_DATA``, else /var/lib/skysail): what the cloud says
    that this machine joined, and over it what stands in its own ``skysail.toml``.

    Raises :class:`SkysailError` when ``skysail.toml`` is not TOML, or says what no field takes.
    """
    root = data or os.environ.get("SKYSAIL_DATA") or Config().data
    path = Path(root) / "skysail.toml"
    values: dict[str, object] = {}
    try:
        for one in (Path(root) / CLOUD_SETTINGS, path):
            if one.exists():
                values |= msgspec.toml.decode(one.read_bytes()) if one == path else msgspec.json.decode(one.read_bytes())
        return msgspec.convert(values | {"data": root}, Config)
    except msgspec.MsgspecError as wrong:
        raise SkysailError(f"{path} cannot be used: {wrong}", "its names and types: src/skysail/kit/config.py") from wrong
