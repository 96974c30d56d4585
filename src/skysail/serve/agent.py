"""The agent process of one host: names the engines and serves the agent's socket. ``python -m skysail.serve.agent``."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import ipaddress
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import IO, ClassVar, Literal

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from skysail.agent import stock
from skysail.agent.app import application
from skysail.agent.identity import Identity
from skysail.agent.keeper import Keeper
from skysail.agent.ledger import Ledger
from skysail.agent.samples import SampleLog, Sampler
from skysail.agent.traffic import Traffic
from skysail.contract.identity import CONTROLLER
from skysail.contract.report import HostReport, ImageReport
from skysail.dns import Zones
from skysail.dns.powerdns import PowerDns
from skysail.dns.sim import SimZones
from skysail.hypervisor import Hypervisor
from skysail.hypervisor.accelerator import probe
from skysail.hypervisor.engine import Qemu
from skysail.hypervisor.personality import Surroundings
from skysail.hypervisor.sim import SimHypervisor
from skysail.hypervisor.template import Image, Templates
from skysail.hypervisor.workshop import Workshop
from skysail.images import renewal
from skysail.images.library import Library
from skysail.ingress import Ingress
from skysail.ingress.haproxy import HaProxy
from skysail.ingress.jump import Jump
from skysail.ingress.sim import SimIngress
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.process import allow_open_files, in_thread, machine_boot, started_at
from skysail.metadata.process import Answerer, kept_key
from skysail.metadata.sim import SimResponder
from skysail.network import Fabric
from skysail.network.frr import Frr
from skysail.network.linux import LinuxFabric
from skysail.network.plan import GATEWAY_IPV6, HTTP_PORT, JUMP_PORT, TLS_PORT, Layout
from skysail.network.sim import SimFabric
from skysail.serve import beside, jump, membership, processes
from skysail.serve.facts import Facts
from skysail.serve.membership import Membership
from skysail.storage import Pool, Shelf
from skysail.storage.ceph import Cluster
from skysail.storage.files import FilePool
from skysail.storage.rbd import RbdPool
from skysail.storage.rbd_shelf import RbdShelf
from skysail.storage.shelf import FileShelf
from skysail.storage.sim import SimPool, SimShelf

log = logging.getLogger(__name__)
# Controllers end connections that they have no use for before that.
KEEP_ALIVE_SECONDS = 60
# Whoever opens a connection to its port takes one of them for a minute, also without a certificate. HAProxy, which inherits
# this, reckons what it may carry by it.
OPEN_FILES = 16384
# How often is tried to answer controllers where that was not possible.
UNREACHABLE_SECONDS = 2.0
_SIM_IMAGE = ImageReport(digest="0" * 64, blueprint="debian_12", name="Debian", user="admin", version="12.0",
                         size_gib=2, templated=True)


def build(config: Config) -> tuple[Keeper, Sampler]:
    """The keeper and the sampler with the engines that the configuration names; raises SkysailError when one does not
    work here."""
    ledger, traffic = Ledger(config.root / "agent" / "document.json"), Traffic(config.root / "agent" / "traffic.json")
    if config.engines == "sim":
        volumes, shelf = SimPool(), SimShelf()
        simulated = SimHypervisor(volumes.ensure, shelf=shelf)
        network = SimFabric(simulated.flow)
        keeper = Keeper(simulated_capacity(config), simulated, volumes, shelf, network, lambda: [_SIM_IMAGE], ledger, traffic,
                        name_server(config), SimResponder(), ingress=[SimIngress()], boot=present_boot(config))
        return keeper, _sampler(config, simulated, network, traffic, keeper)
    library = Library(config.images_dir)
    for folder in (config.images_dir, config.templates_dir, config.guests_dir, config.volumes_dir,
                   config.snapshots_dir):
        folder.mkdir(parents=True, exist_ok=True)
    stock.recover(config)
    accelerator = probe(config.accelerator_file).accelerator
    pool, snapshots = storage(config)
    fabric = LinuxFabric(Layout.of(config, membership.underlay(config)), router(config))
    workshop = Workshop(
        guests=config.guests_dir, accelerator=accelerator, find_image=lambda digest: _image(library, digest),
        templates=Templates(config.templates_dir, accelerator, config.guest_uid_base, config.template_memory),
        make_volume=pool.ensure, drop_volume=pool.remove, volumes=pool.observe, open_port=fabric.open_port,
        give_volume=pool.give, reclaim_volume=pool.reclaim, shelf=snapshots, around=lambda: surroundings(config),
        cluster=cluster(config), underlay=membership.underlay(config) or "127.0.0.1", announce=fabric.announce)
    hypervisor = Qemu(workshop, config.guest_uid_base, config.relay_uid)
    keeper = Keeper(capacity(config, accelerator), hypervisor, pool, snapshots, fabric, lambda: _reports(library), ledger,
                    traffic, name_server(config), responder(config, fabric),
                    lambda digest: in_thread(renewal.renews, library, digest), ingress(config), present_boot(config))
    return keeper, _sampler(config, hypervisor, fabric, traffic, keeper)


def present_boot(config: Config) -> str:
    """The machine's present boot, where others may take it for lost and start its guests elsewhere: where it joined a cloud.
    A controller on this machine itself cannot. The guests of a simulated machine end with its agent, which is its boot."""
    if membership.find(config) is None:
        return ""
    return machine_boot() if config.engines == "real" else f"{machine_boot()}-{os.getpid()}-{started_at(os.getpid())}"


def cluster(config: Config) -> Cluster | None:
    """The Ceph cluster that volumes are in; None where they are files."""
    return Cluster.of(config) if config.storage == "ceph" else None


def storage(config: Config) -> tuple[Pool, Shelf]:
    """The engines that the configuration names, for volumes and for snapshots."""
    found = cluster(config)
    if found is None:
        return FilePool(config.volumes_dir), FileShelf(config.snapshots_dir)
    return (RbdPool(found, config.volumes_dir, config.importer_uid),
            RbdShelf(found, config.snapshots_dir, config.importer_uid))


def _sampler(config: Config, hypervisor: Hypervisor, fabric: Fabric, traffic: Traffic, keeper: Keeper) -> Sampler:
    return Sampler(SampleLog(config.root / "agent" / "samples.jsonl"), hypervisor, fabric, traffic, keeper.wanted,
                   keeper.metadata.tokenless, interval_seconds=config.sample_seconds, throttles=config.cpu_burst)


def router(config: Config) -> Frr:
    """What tells other hosts which guests are here; where there are none it is ended, should it run."""
    return Frr(config.routing_dir, config.namespace, processes.log_folder(config))


def responder(config: Config, fabric: LinuxFabric) -> Answerer:
    """The process that tells guests of themselves."""
    return Answerer(fabric.listen, mark=f"skysail-metadata:{config.data}", uid=config.metadata_uid,
                    key=lambda: kept_key(config.root / "agent" / "metadata.key"))


def name_server(config: Config) -> Zones:
    """The engine that the configuration names."""
    return PowerDns(config.dns_api_port, config.dns_key_file) if config.powerdns else SimZones()


def ingress(config: Config) -> list[Ingress]:
    """Those who share the machine's single address; without one they are ended, should they run."""
    layout = Layout.of(config)
    return [HaProxy(config.ingress_dir / "haproxy", namespace=layout.namespace, address=str(layout.namespace_address),
                    ports=(HTTP_PORT, TLS_PORT), user=config.ingress_user, log=processes.log_path(config, "haproxy")),
            Jump(config.ingress_dir / "jump", namespace=layout.namespace, address=str(layout.namespace_address),
                 port=JUMP_PORT, user=config.jump_user, log=processes.log_path(config, "jump"),
                 program=Path(jump.__file__))]


def capacity(config: Config, accelerator: str) -> HostReport:
    """What this machine has; where disks are in a cluster, their room is what its pool has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return HostReport(host=membership.host(config), boot="", sequence=0, generation=0, vcpus=os.cpu_count() or 1,
                      memory_mib=memory, disk_gib=_room_gib(config), accelerator=accelerator)


def simulated_capacity(config: Config) -> HostReport:
    """A simulated host is as large as a small cluster, so that limits come from the controller and not from it."""
    return HostReport(host=membership.host(config), boot="", sequence=0, generation=0, vcpus=4096,
                      memory_mib=16 * 1024 * 1024, disk_gib=1024 * 1024, accelerator="sim")


def _room_gib(config: Config) -> int:
    if config.storage == "ceph":
        try:
            return Cluster.of(config, seconds=10.0).room_gib()
        except SkysailError as failed:
            log.warning("how much room the cluster has is not known, and taken for this machine's disk's: %s", failed)
    return shutil.disk_usage(config.root).total >> 30


def surroundings(config: Config) -> Surroundings:
    """What guests are told of their network."""
    private = ipaddress.IPv4Network(config.private_network)
    found = config.resolvers or resolvers(6 if config.public_ipv6 else 4)
    return Surroundings(prefix=private.prefixlen, gateway=str(private[1]), resolvers=found,
                        gateway_ipv6=str(GATEWAY_IPV6) if config.public_ipv6 else "")


def resolvers(version: Literal[4, 6], paths: tuple[str, ...] = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"),
              ) -> tuple[str, ...]:
    """The machine's own resolvers, at most three (resolv.conf(5)): of IPv4, and with ``version`` 6 one of IPv6, which guests
    without a public IPv4 address need. One that listens on the machine's loopback, or on its link alone, cannot be reached by
    a guest, so the ones behind it are looked for; none is an honest answer (set ``resolvers`` in skysail.toml)."""
    for path in paths:
        with contextlib.suppress(OSError):
            words = [line.split() for line in Path(path).read_text().splitlines() if line.startswith("nameserver")]
            found: dict[int, list[str]] = {4: [], 6: []}
            for word in words:
                with contextlib.suppress(ValueError, IndexError):
                    address = ipaddress.ip_address(word[1])
                    if not (address.is_loopback or address.is_link_local):
                        found[address.version].append(str(address))
            routed = found[6][:1] if version == 6 else []
            if found[4] or routed:
                return (*found[4][:3 - len(routed)], *routed)
    return ()


def _image(library: Library, digest: str) -> Image | None:
    # A disk that came from elsewhere needs no image: it is whole.
    held = library.find(digest) or library.noted(digest)
    return None if held is None else Image(digest=digest, path=library.path(digest), ours=bool(held.recipe))


def _reports(library: Library) -> list[ImageReport]:
    """The newest image of each blueprint: older ones stay for the guests that were made of them, and launch no more."""
    newest = {one.blueprint: one for one in library.list()}
    return [ImageReport(digest=one.digest, blueprint=one.blueprint, name=one.name, user=one.user, version=one.version,
                        size_gib=-(-one.size_bytes >> 30), templated=bool(one.recipe)) for one in newest.values()]


def hold(config: Config) -> IO[bytes]:
    """The data folder's lock, held as long as the file is open: two agents would each start the same guests.

    Raises SkysailError while another agent has it.
    """
    path = config.root / "agent" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as taken:
        lock.close()
        raise SkysailError(f"another agent works in {config.root}", "see: sudo ./skysail status") from taken
    return lock


def listen(config: Config) -> socket.socket:
    """The agent's socket, for root and the controller's group only."""
    path = config.agent_socket
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # a socket left by an agent that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mask is set before the bind: there is no moment in which others could connect.
    mask = os.umask(0o117)
    listener.bind(str(path))
    os.umask(mask)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(config.controller_user).gr_gid)
    return listener


async def serve(config: Config, keeper: Keeper, sampler: Sampler) -> None:
    """Answer at the agent's socket, and where this machine joined a cloud, to its controllers."""
    joined, held = membership.find(config), membership.identity(config)
    identity = held if joined is not None and held.whole else None
    facts = Facts(config, keeper.host, present_boot(config))
    made = application(keeper, sampler, processes.log_folder(config), facts.tell, identity,
                       lambda: len(Callers.here))
    own = uvicorn.Server(_answering(made))
    serving = asyncio.create_task(own.serve(sockets=[listen(config)]))
    # Not before what runs here was adopted: nobody's document comes first.
    while not own.started and not serving.done():
        await asyncio.sleep(0.05)
    remote = asyncio.create_task(_answer_controllers(made, joined, identity)) if joined and own.started else None
    await serving
    if remote is not None:
        remote.cancel()
        await asyncio.gather(remote, return_exceptions=True)


def _answering(made: Starlette, http: type[asyncio.Protocol] | Literal["auto"] = "auto") -> uvicorn.Config:
    # qemu.qmp passes descriptors through the event loop's own socket, which uvloop hides.
    return uvicorn.Config(made, log_level="warning", access_log=False, loop="asyncio", http=http,
                          timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1)


async def _answer_controllers(made: Starlette, joined: Membership, identity: Identity | None) -> None:
    """Answer where controllers call this host, until cancelled. While that cannot be, because the port is taken or a name
    cannot be resolved yet, guests are looked after all the same: a host without its controller holds to the last document."""
    if identity is None:
        log.error("this host has no certificate: no controller reaches it")
        return
    trouble = ""
    while True:
        try:
            context = identity.context()
            listener = await asyncio.to_thread(beside.listen, joined.address, joined.port)
            async with beside.served(_answering(made, Callers), listener, context):
                await asyncio.Event().wait()
        except (SkysailError, OSError) as unreachable:
            if trouble != str(unreachable):
                log.error("no controller reaches this host: %s", unreachable)
            trouble = str(unreachable)
        except Exception:
            log.exception("controllers could not be answered; it is tried again")
        await asyncio.sleep(UNREACHABLE_SECONDS)


class Callers(HttpToolsProtocol):
    """A connection by mutual TLS. OpenSSL let in who has a certificate of a caller by our authority; only controllers have
    one, and it says so. ``here`` are those that are open."""

    here: ClassVar[set[int]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shown = transport.get_extra_info("ssl_object").getpeercert() or {}
        if ("DNS", CONTROLLER) in shown.get("subjectAltName", ()):
            self.here.add(id(self))
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.here.discard(id(self))
        super().connection_lost(exc)


def main() -> None:
    """Serve the host in ``$SKYSAIL_DATA`` until told to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A socket that is not there yet is looked for again: nothing to log.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per look at the zones is noise
    config = load()
    allow_open_files(count=OPEN_FILES)
    alone = hold(config)
    keeper, sampler = build(config)
    asyncio.run(serve(config, keeper, sampler))
    alone.close()


if __name__ == "__main__":
    main()
