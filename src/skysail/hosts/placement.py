"""Which host takes a guest, and which addresses it gets. Pure: facts in, choice out."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# The controller, the agents and QEMU itself live on the host too.
RESERVED_MEMORY_MIB = 512


@dataclass(frozen=True)
class Candidate:
    """A host with what it has and what its guests were promised."""

    id: str
    zones: frozenset[str]
    vcpus: int
    memory_mib: int
    promised_mib: int
    disk_gib: int
    promised_gib: int
    images: frozenset[str]


class NoHost(Exception):
    """No host can take the guest; the message says why, per host."""


def choose(candidates: Sequence[Candidate], *, zone: str, image: str, vcpus: int, memory_mib: int, disk_gib: int) -> str:
    """The id of the host with the most free memory that fits; raises :class:`NoHost`. Memory is never over-committed;
    ``Candidate.disk_gib`` is what a host may promise, which is more than it has: few disks are ever full."""
    reasons: list[str] = []
    fitting: list[tuple[int, str]] = []
    for host in candidates:
        free = host.memory_mib - RESERVED_MEMORY_MIB - host.promised_mib
        if zone not in host.zones:
            reasons.append(f"{host.id} does not serve the zone {zone}")
        elif image not in host.images:
            reasons.append(f"{host.id} does not hold the blueprint's image")
        elif vcpus > host.vcpus:
            reasons.append(f"{host.id} has {host.vcpus} processors, the bundle asks for {vcpus}")
        elif memory_mib > free:
            reasons.append(f"{host.id} has {max(free, 0)} MiB of memory free, the bundle asks for {memory_mib}")
        elif disk_gib > host.disk_gib - host.promised_gib:
            left = max(host.disk_gib - host.promised_gib, 0)
            reasons.append(f"{host.id} may promise {left} GiB of disk more, the bundle asks for {disk_gib}")
        else:
            fitting.append((-free, host.id))
    if not fitting:
        raise NoHost("; ".join(reasons) or "no host has reported yet")
    return min(fitting)[1]


def choose_address(network: str, taken: Collection[str], *, skip: int) -> str:
    """The lowest free address of ``network`` after its first ``skip`` ones; raises :class:`NoHost` when it is full."""
    block = ipaddress.ip_network(network)
    used = set(taken)
    for number in range(1 + skip, block.num_addresses - 1):
        address = str(block[number])
        if address not in used:
            return address
    raise NoHost(f"every address of {network} is taken")
