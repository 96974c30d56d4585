"""What a host is, as its agent sees it: asked for when a controller begins to speak with it, and now and then."""

from __future__ import annotations

import msgspec

from skysail.contract import VERSION


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One machine and the programs on it. ``contract`` is the newest version that its agent speaks, ``program`` that of
    Skysail. ``accelerator_seen`` says what the probe of KVM saw. ``cpu`` is the processor's name, ``cpu_flags`` are the
    kernel's words for what it can do; ``cpu_models`` and ``machine_types`` are those of QEMU that guests can have here,
    ``guest_cpu`` and ``guest_machine`` the ones that they get. ``underlay`` is its address in the network between the hosts,
    by which they reach each other; '' where it has none. ``pool`` is where the disks of its guests are, when other hosts
    see that, too; '' where they are files of its own. ``certificate_until`` is when the host's certificate runs out, in
    seconds since the epoch; None where it has none. ``boot`` names the machine's present boot, of a host that starts nothing
    in another one before its controller has spoken; '' of one that does. ``no_post_copy`` is why no guest can come by
    post-copy, '' where one can; None of an agent that knows nothing of it."""

    host: str
    program: str
    kernel: str
    qemu: str
    accelerator: str
    accelerator_seen: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cpu_models: tuple[str, ...]
    machine_types: tuple[str, ...]
    guest_cpu: str
    guest_machine: str
    underlay: str = ""
    certificate_until: float | None = None
    pool: str = ""
    boot: str = ""
    no_post_copy: str | None = None
    contract: int = VERSION
