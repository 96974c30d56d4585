"""Which host takes a guest, and which addresses it gets. Pure: facts in, choice out."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

# The controller, the agents and QEMU itself live on the host too.
RESERVED_MEMORY_MIB = 512
# So many are named in words that say why none of the hosts takes a guest.
NAMED = 20
# A host that has not answered for so long is given nothing. Until then it may be an agent that is just being upgraded, and is
# taken where no other fits.
SILENT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A host with what it has and what its guests were promised. ``promisable_vcpus`` and ``disk_gib`` are what it may
    promise, which is more than it has: few guests use theirs all the time. ``images`` has, by blueprint, the size in GiB of
    the image that it makes guests of. ``of_owner``: how many of the owner's instances it holds. ``cpu_models`` and
    ``machine_types`` are what its QEMU offers. ``pool`` is where the disks of its guests are, when other hosts see that, too;
    ``promised_gib`` is what is promised of all of it then."""

    id: str
    zones: frozenset[str]
    vcpus: int
    promisable_vcpus: int
    memory_mib: int
    disk_gib: int
    promised_vcpus: int = 0
    promised_mib: int = 0
    promised_gib: int = 0
    images: Mapping[str, int] = field(default_factory=dict)
    of_owner: int = 0
    cordoned: bool = False
    refused: str = ""
    silent_seconds: float = 0.0
    accelerator: str = ""
    cpu_models: frozenset[str] = frozenset()
    machine_types: frozenset[str] = frozenset()
    pool: str = ""

    @property
    def free_mib(self) -> int:
        return self.memory_mib - RESERVED_MEMORY_MIB - self.promised_mib


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a guest asks of its host. ``blueprint``: its image has to be there ('' for one whose disk is). A guest that runs
    already, and goes on elsewhere, is bound to its ``accelerator``, ``cpu_model`` and ``machine_type``; '' for one that
    starts. One that has disks is bound to where they are, the ``pool`` that other hosts see, too, or files (''); None for one
    that has none yet."""

    zone: str
    blueprint: str
    vcpus: int
    memory_mib: int
    disk_gib: int
    accelerator: str = ""
    cpu_model: str = ""
    machine_type: str = ""
    pool: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What speaks against a host, all of it; nothing does where it could take the guest."""

    host: str
    refusals: tuple[str, ...]


class NoHost(Exception):
    """No host can take the guest; the message says why, for each of the first :data:`NAMED` of them."""


def choose(candidates: Sequence[Candidate], need: Need) -> str:
    """The id of the host that takes the guest; raises :class:`NoHost`."""
    verdicts = judge(candidates, need)
    if not verdicts or verdicts[0].refusals:
        more = f"; and {len(verdicts) - NAMED} other hosts neither" if len(verdicts) > NAMED else ""
        raise NoHost(("; ".join(f"{one.host} {', '.join(one.refusals)}" for one in verdicts[:NAMED])
                      or "no host has reported yet") + more)
    return verdicts[0].host


def choose_several(candidates: Sequence[Candidate], need: Need, count: int) -> list[str]:
    """The same for ``count`` guests of one owner, each as if those before it were there."""
    found = {host.id: host for host in candidates}
    chosen = []
    for _ in range(count):
        host = found[choose([*found.values()], need)]
        found[host.id] = replace(
            host, promised_vcpus=host.promised_vcpus + need.vcpus, promised_mib=host.promised_mib + need.memory_mib,
            of_owner=host.of_owner + 1)
        for one in [one for one in found.values() if one.id == host.id or (host.pool and one.pool == host.pool)]:
            found[one.id] = replace(one, promised_gib=one.promised_gib + need.disk_gib)
        chosen.append(host.id)
    return chosen


def judge(candidates: Sequence[Candidate], need: Need) -> list[Verdict]:
    """Every host: those that could take the guest first, the one that does before them. Before others comes who answers, then
    who holds fewer of the owner's instances, so that one machine's failure takes few of them, then who has more memory free.
    Memory is never over-committed."""
    def order(host: Candidate) -> tuple[bool, bool, int, int, str]:
        return (bool(refusals[host.id]), host.silent_seconds > 0, host.of_owner, -host.free_mib, host.id)

    refusals = {host.id: tuple(_refusals(host, need)) for host in candidates}
    return [Verdict(host=host.id, refusals=refusals[host.id]) for host in sorted(candidates, key=order)]


def _refusals(host: Candidate, need: Need) -> Iterator[str]:
    if host.cordoned:
        yield "is cordoned"
    if host.refused:
        yield f"is not spoken with ({host.refused})"
    if host.silent_seconds > SILENT_SECONDS:
        yield f"has not answered for {host.silent_seconds:.0f} s"
    if need.zone not in host.zones:
        yield f"does not serve the zone {need.zone}"
    if need.blueprint and need.blueprint not in host.images:
        yield f"does not hold an image of {need.blueprint}"
    elif need.blueprint and host.images[need.blueprint] > need.disk_gib:
        yield f"has an image of {need.blueprint} that needs a disk of {host.images[need.blueprint]} GiB"
    if need.accelerator and host.accelerator != need.accelerator:
        yield f"runs guests by {host.accelerator or 'it is not known what'}, not {need.accelerator}"
    if need.cpu_model and need.cpu_model not in host.cpu_models:
        yield f"cannot give the processor {need.cpu_model}"
    if need.machine_type and need.machine_type not in host.machine_types:
        yield f"has a QEMU without the machine type {need.machine_type}"
    if need.pool is not None and need.pool != host.pool:
        yield f"has disks {_where(host.pool)}, and these are {_where(need.pool)}"
    if need.vcpus > host.vcpus:
        yield f"has {host.vcpus} of the {need.vcpus} processors"
    elif need.vcpus > host.promisable_vcpus - host.promised_vcpus:
        yield f"may promise {max(host.promisable_vcpus - host.promised_vcpus, 0)} of the {need.vcpus} processors"
    if need.memory_mib > host.free_mib:
        yield f"has {max(host.free_mib, 0)} of the {need.memory_mib} MiB of memory free"
    if need.disk_gib > host.disk_gib - host.promised_gib:
        yield f"may promise {max(host.disk_gib - host.promised_gib, 0)} of the {need.disk_gib} GiB of disk"


def _where(pool: str) -> str:
    return f"in {pool}" if pool else "in files of its own"


def draw_addresses(network: str, count: int, *, skip: int) -> set[str]:
    """Up to ``count`` addresses of ``network`` by chance, none of its first ``skip`` ones; none where it has no others."""
    block = ipaddress.ip_network(network)
    there = block.num_addresses - skip - 2
    return {str(block[1 + skip + secrets.randbelow(there)]) for _ in range(count if there > 0 else 0)}


def choose_address(network: str, taken: Collection[str], *, skip: int) -> str:
    """The lowest free address of ``network`` after its first ``skip`` ones; raises :class:`NoHost` when it is full."""
    block = ipaddress.ip_network(network)
    used = set(taken)
    for number in range(1 + skip, block.num_addresses - 1):
        address = str(block[number])
        if address not in used:
            return address
    raise NoHost(f"every address of {network} is taken")
