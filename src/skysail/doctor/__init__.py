"""The doctor: looks at this machine and says what was seen, where, and what cures it. Changes nothing that stays.

Each look is a function that returns one :class:`Finding`; one that breaks is itself a finding, never a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from skysail.agent.stock import Stock, free
from skysail.dns.powerdns import PowerDns
from skysail.hypervisor.accelerator import probe
from skysail.ingress.haproxy import HaProxy
from skysail.kit import process
from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.metadata.process import Answerer
from skysail.network import conflicts, frr
from skysail.network.linux import LinuxFabric
from skysail.network.plan import MTU, VXLAN_BYTES, Layout
from skysail.resources import image_use
from skysail.storage.ceph import Cluster
from skysail.storage.rbd import RbdPool

Verdict = Literal["good", "weak", "bad"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One look. ``weak`` works, but less well than it could; ``bad`` keeps guests from running."""

    subject: str
    verdict: Verdict
    saw: str
    where: str
    cure: str = ""


def examine(config: Config, underlay: str = "") -> list[Finding]:
    """Take every look, in the order in which a launch needs them. ``underlay`` is where other hosts reach this machine."""
    between: Callable[[Config], Finding] = partial(overlay, underlay=underlay)
    return [_careful(subject, look, config) for subject, look in (*LOOKS, ("overlay", between))]


def _careful(subject: str, look: Callable[[Config], Finding], config: Config) -> Finding:
    try:
        return look(config)
    except SkysailError as failed:
        return Finding(subject=subject, verdict="bad", saw=failed.what, where=subject, cure=failed.cure)
    except (OSError, ImportError, ValueError) as failed:
        return Finding(subject=subject, verdict="bad", saw=str(failed), where=subject)


def qemu_version(config: Config) -> Finding:
    """Is QEMU here, and new enough to map a template's memory read-only?"""
    said = process.run(["qemu-system-x86_64", "--version"], timeout=20).decode()
    match = re.search(r"version (\d+)\.(\d+)", said)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    fits = version >= (10, 0)
    return Finding(subject="qemu", verdict="good" if fits else "weak", saw=said.splitlines()[0],
                   where="qemu-system-x86_64 --version",
                   cure="" if fits else "QEMU 10 or newer: run sudo ./skysail up (takes it from backports)")


def accelerator(config: Config) -> Finding:
    """Does KVM really run a guest? The verdict comes from starting one (kept until kernel or QEMU change)."""
    try:
        found = probe(config.accelerator_file)
    except PermissionError:
        return Finding(subject="accelerator", verdict="weak", saw="not looked at", where="a tiny guest", cure="run with sudo")
    kvm = found.accelerator == "kvm"
    return Finding(subject="accelerator", verdict="good" if kvm else "weak", where="a tiny 64-bit guest",
                   saw="KVM runs guests" if kvm else f"guests are emulated (tcg), for KVM does not: {found.seen}",
                   cure="" if kvm else "bare metal, or nested virtualisation by whoever runs this machine; slow until then")


def namespaces(config: Config) -> Finding:
    """May network namespaces be made here? One is made and removed again."""
    probe = f"{config.namespace}-doctor-{os.getpid()}"
    if os.geteuid() != 0:
        return Finding(subject="namespaces", verdict="weak", saw="not looked at", where="ip netns add",
                       cure="run with sudo")
    process.run(["ip", "netns", "add", probe], timeout=20)
    process.run(["ip", "netns", "delete", probe], timeout=20)
    return Finding(subject="namespaces", verdict="good", saw="a network namespace was made and removed",
                   where="ip netns add")


def network(config: Config) -> Finding:
    """Does the kernel take the guests' rules and devices, and is nothing of this machine in their way? Nothing is loaded."""
    where = "nft --check, /dev/net/tun, addresses, rules of others"
    if os.geteuid() != 0:
        return Finding(subject="network", verdict="weak", saw="not looked at", where=where, cure="run with sudo")
    problems = asyncio.run(LinuxFabric(Layout.of(config)).check())
    return Finding(subject="network", verdict="bad" if problems else "good", where=where,
                   saw="; ".join(problems) or "rules and devices are accepted, no network of this machine is hidden",
                   cure="as said" if problems else "")


def overlay(config: Config, underlay: str) -> Finding:
    """Can private networks span hosts from here, and do packets between them pass whole?"""
    if not underlay:
        return Finding(subject="overlay", verdict="good", saw="private networks are on this host alone", where="skysail.toml")
    where = f"{underlay}, {frr.PROGRAMS}"
    layout = Layout.of(config, underlay)
    problems = frr.problems() + conflicts.underlay(layout)
    if problems:
        return Finding(subject="overlay", verdict="bad", saw="; ".join(problems), where=where, cure="as said")
    room = conflicts.underlay_mtu(layout) - VXLAN_BYTES
    if room < MTU:
        return Finding(subject="overlay", verdict="weak", where=where,
                       saw=f"packets of more than {room} bytes between hosts go in two parts",
                       cure=f"give the underlay's device, and what lies between, an MTU of {MTU + VXLAN_BYTES} or more")
    return Finding(subject="overlay", verdict="good", saw="FRR is installed, the address is this machine's", where=where)


def metadata(config: Config) -> Finding:
    """Does the confined process run that tells instances of themselves? One is started without sockets, and ended."""
    where = "a process of its own user id, without network"
    if os.geteuid() != 0:
        return Finding(subject="metadata", verdict="weak", saw="not looked at", where=where, cure="run with sudo")

    async def nowhere() -> tuple[socket.socket, ...]:
        return ()

    probe = Answerer(nowhere, mark=f"skysail-metadata:{config.data}", uid=config.metadata_uid, key=lambda: bytes(32))
    problems = asyncio.run(probe.check())
    return Finding(subject="metadata", verdict="bad" if problems else "good", where=where,
                   saw="; ".join(problems) or "it starts and answers", cure="as said" if problems else "")


def name_server(config: Config) -> Finding:
    """Is PowerDNS here, and does nobody else have the name server's address?"""
    where = f"{config.dns_listen}, port {config.dns_port}"
    if not config.powerdns:
        return Finding(subject="dns", verdict="good", saw="simulated", where="skysail.toml")
    server = PowerDns(config.dns_api_port, config.dns_key_file)
    problems = asyncio.run(server.check())
    if problems:
        return Finding(subject="dns", verdict="bad", saw="; ".join(problems), where="/usr/sbin", cure="as said")
    with contextlib.suppress(SkysailError):
        held = asyncio.run(server.serials())
        return Finding(subject="dns", verdict="good", saw=f"PowerDNS answers for {len(held)} zones", where=where)
    try:
        address = ipaddress.ip_address(config.dns_listen)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
                probe.bind((config.dns_listen, config.dns_port))
    except PermissionError:
        return Finding(subject="dns", verdict="weak", saw="not looked at", where=where, cure="run with sudo")
    except OSError as taken:
        return Finding(subject="dns", verdict="bad", saw=f"the address cannot be had: {taken.strerror}", where=where,
                       cure="set dns_listen or dns_port in skysail.toml")
    return Finding(subject="dns", verdict="good", saw="PowerDNS is installed, its address is free", where=where)


def single_address(config: Config) -> Finding:
    """Is the address that instances share this machine's own, and does nobody else answer on the ports that they take?"""
    address = config.single_address
    where = f"{address}, ports 80, 443 and {config.jump_port}" if address else "skysail.toml"
    if not address:
        return Finding(subject="ingress", verdict="good", saw="each instance has an address of its own", where=where)
    problems = asyncio.run(HaProxy(config.ingress_dir / "haproxy", namespace=config.namespace, address=address,
                                   ports=(80, 443), user=config.ingress_user, log=Path(os.devnull)).check())
    if problems:
        return Finding(subject="ingress", verdict="bad", saw="; ".join(problems), where=where, cure="as said")
    hidden = []
    for port in (80, 443, config.jump_port):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except PermissionError:
                return Finding(subject="ingress", verdict="weak", saw="not looked at", where=where, cure="run with sudo")
            except OSError as refused:
                if refused.errno == errno.EADDRNOTAVAIL:
                    return Finding(subject="ingress", verdict="bad", saw="it is not an address of this machine", where=where,
                                   cure="set single_address in skysail.toml to one that `ip address` shows")
                hidden.append(str(port))
    if hidden:
        return Finding(subject="ingress", verdict="weak", where=where,
                       saw=f"a program of this machine listens on {', '.join(hidden)}: nobody outside reaches it there",
                       cure="move it to another port or address, or set jump_port in skysail.toml")
    return Finding(subject="ingress", verdict="good", saw="HAProxy is installed, the address is this machine's", where=where)


def storage(config: Config) -> Finding:
    """Can guests' disks be where the configuration says? A cluster is asked for its images, and for its room."""
    if config.storage == "files" or config.engines != "real":
        return Finding(subject="storage", verdict="good", where=str(config.volumes_dir),
                       saw="disks are files of this machine")
    where = f"pool {config.ceph_pool}, by {config.ceph_conf}"
    if os.geteuid() != 0:
        return Finding(subject="storage", verdict="weak", saw="not looked at", where=where, cure="run with sudo")
    pool = RbdPool(Cluster.of(config, seconds=10.0), config.volumes_dir, config.importer_uid)
    problems = asyncio.run(pool.check())
    if problems:
        return Finding(subject="storage", verdict="bad", saw="; ".join(problems), where=where, cure="as said")
    return Finding(subject="storage", verdict="good", where=where,
                   saw=f"the Ceph cluster answers, QEMU has its driver, {len(asyncio.run(pool.observe()))} disks are there")


def failure(config: Config) -> Finding:
    """Can hosts that fail be turned off for certain, where their instances shall go on elsewhere?"""
    where = config.fence[0] if config.fence else "skysail.toml"
    if not config.fence:
        waits = config.on_host_failure == "wait"
        return Finding(subject="failure", verdict="good" if waits else "weak", where=where,
                       saw=f"on_host_failure is \"{config.on_host_failure}\"" + (
                           "" if waits else ", and nothing turns a host off: its instances wait until you vouch for that"),
                       cure="" if waits else "set fence in skysail.toml to a program that turns a host off")
    if not Path(config.fence[0]).is_file():
        return Finding(subject="failure", verdict="weak", saw="there is no such program", where=where,
                       cure="set fence in skysail.toml to one that turns a host off")
    user = config.controller_user
    if os.geteuid() == 0:
        try:
            process.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "test", "-x", where], timeout=20)
        except ProcessFailed:
            return Finding(subject="failure", verdict="weak", saw=f"the controller runs it as the user {user}, who may not",
                           where=where, cure=f"chmod a+rx {where}, and the folders above it")
    return Finding(subject="failure", verdict="good", saw="hosts that fail can be turned off by it", where=where)


def disk(config: Config) -> Finding:
    """Room for images and guests."""
    place = config.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    verdict: Verdict = "good" if free >= 20 else "weak" if free >= 6 else "bad"
    return Finding(subject="disk", verdict=verdict, saw=f"{free:.1f} GiB free", where=str(place),
                   cure="" if verdict == "good" else "free some space, or set SKYSAIL_DATA to another disk")


def images(config: Config) -> Finding:
    """How much of the disk do images and templates take that nobody needs?"""
    where = str(config.images_dir)
    if config.engines != "real" or os.geteuid() != 0:
        return Finding(subject="images", verdict="good" if config.engines != "real" else "weak", where=where,
                       saw="simulated" if config.engines != "real" else "not looked at",
                       cure="" if config.engines != "real" else "run with sudo")
    pieces = Stock(config, lambda: image_use.known(config)).look()
    spare = free(pieces)
    size = sum(piece.bytes for piece in spare) / 2**30
    return Finding(subject="images", verdict="weak" if size >= 1 else "good", where=where,
                   saw=f"{sum(piece.bytes for piece in pieces) / 2**30:.1f} GiB, of which nobody needs {size:.1f} GiB",
                   cure="sudo ./skysail images remove --unused" if spare else "")


def memory(_config: Config) -> Finding:
    """Memory that guests could take now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    return Finding(subject="memory", verdict="good" if free >= 2 else "weak", saw=f"{free:.1f} GiB available",
                   where="/proc/meminfo", cure="" if free >= 2 else "stop other programs, or use smaller bundles")


def cgroups(_config: Config) -> Finding:
    """Can guests be held to their bundle's processor and memory share?"""
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        has = set(unified.read_text().split())
        lacking = sorted({"cpu", "memory"} - has)
        return Finding(subject="cgroups", verdict="weak" if lacking else "good", where=str(unified),
                       saw=f"version 2, controllers: {' '.join(sorted(has)) or 'none'}",
                       cure=f"enable the controllers {' '.join(lacking)} for this machine" if lacking else "")
    old = [name for name in ("cpu", "memory", "pids") if Path("/sys/fs/cgroup", name, "tasks").exists()]
    fits = {"cpu", "memory"} <= set(old)
    return Finding(subject="cgroups", verdict="good" if fits else "weak", where="/sys/fs/cgroup",
                   saw=f"version 1, controllers: {' '.join(old) or 'none'}",
                   cure="" if fits else "boot with systemd.unified_cgroup_hierarchy=1")


def clock(_config: Config) -> Finding:
    """Signatures are refused when clocks differ by more than 5 minutes; a clock in the past is a clock not set."""
    now = time.time()
    newest = max(path.stat().st_mtime for path in (Path("/etc/os-release"), Path(__file__)))
    fits = now >= newest
    return Finding(subject="time", verdict="good" if fits else "bad", where="the machine's clock",
                   saw=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
                   cure="" if fits else "set the clock: it is earlier than the files on this machine")


LOOKS: tuple[tuple[str, Callable[[Config], Finding]], ...] = (
    ("qemu", qemu_version), ("accelerator", accelerator), ("namespaces", namespaces), ("network", network),
    ("metadata", metadata), ("dns", name_server), ("ingress", single_address), ("storage", storage), ("failure", failure),
    ("disk", disk), ("images", images), ("memory", memory), ("cgroups", cgroups), ("time", clock),
)
