"""What a host keeps of a guest on its disk."""

from __future__ import annotations

import msgspec

from skysail.contract.report import Mount
from skysail.hypervisor.personality import Identity
from skysail.hypervisor.process import Pid
from skysail.storage import Manifest


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known about a guest after a crash of everything else.

    ``starts``: the owner's start that it last ran for. ``reboots``: the owner's reboots that are done. ``leaving``: the boot
    that the reboot under way is to end, as the guest itself names it. ``halted``: it powered itself off. ``stopped``: its
    owner stopped it. ``grown``: it has all of its plan's disk and memory, not only the template's. ``parent``: its volume's;
    one that was made from a snapshot has all of its ``parents`` here instead, snapshots or, once it was flattened, what is
    left. ``disks``: the block storage that may be given to it; ``mounts`` are those of them that were mounted in its present
    process, or failed to be. ``freezing``: its file systems may be frozen by us. ``copying``: the snapshots that its process
    writes. ``ipv6``: the address that its own network configuration has; None before it is known.
    """

    id: str
    uid: int
    identity: Identity
    made: bool = False
    parent: str = ""
    process: Pid | None = None
    starts: int = 0
    reboots: int = 0
    leaving: str = ""
    halted: bool = False
    stopped: bool = False
    grown: bool = True
    parents: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    mounts: dict[str, Mount] = {}
    freezing: bool = False
    copying: dict[str, Manifest] = {}
    ipv6: str | None = None
