"""What a host keeps of a guest on its disk."""

from __future__ import annotations

from typing import Literal

import msgspec

from skysail.contract.migration import Destination, Passport, Progress, Pull, Sending, Shape
from skysail.contract.report import Mount
from skysail.hypervisor.personality import Identity
from skysail.hypervisor.process import Pid
from skysail.storage import Manifest


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's attempt to move to another host. ``process`` is the one that the ``passport`` is of; None for a guest that is
    off, and whose disks are in a pool.

    ``ready``: nothing has begun. ``mirroring``: its disks are being copied. ``moving``: from here on the target may have been
    told to run; it is asked before this guest runs again, unless QEMU itself says that its state has not gone over. ``sent``:
    the target may run, and this guest may not. One that is off is not ``moving`` at any time: it is ``sent`` before its
    target is told anything. ``failed``: this guest may run, and the target never will.

    ``heard``: the target has said that it runs, and has all of it. ``stood``: when we stopped it, in seconds since this
    machine was booted, because its QEMU cannot send the memory of a guest that runs, or because the rest of that goes after
    it; 0 for one that runs until QEMU stops it. ``parted``: its memory goes by post-copy from here on. It is the target's
    then, whatever QEMU says of the migration.
    """

    sending: Sending
    process: Pid | None
    passport: Passport
    phase: Literal["ready", "mirroring", "moving", "sent", "failed"]
    began: float = 0.0
    stood: float = 0.0
    heard: bool = False
    parted: bool = False
    progress: Progress | None = None


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that comes from another host. ``never``: why it will not run, once that has been decided: its source may have
    been told so, and may run again. ``shared``: its disks are not copies, but in a pool. ``off``: it comes without
    running. ``pull``: how its memory stands, of one that runs here and came by post-copy."""

    destination: Destination
    never: str = ""
    shared: bool = False
    off: bool = False
    pull: Pull | None = None

    @property
    def bare(self) -> bool:
        """Whether no process waits for it: nothing comes but word of it."""
        return self.shared and self.off


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known about a guest after a crash of everything else.

    ``starts``: the owner's start that it last ran for. ``reboots``: the owner's reboots that are done. ``leaving``: the boot
    that the reboot under way is to end, as the guest itself names it. ``halted``: it powered itself off. ``stopped``: its
    owner stopped it. ``grown``: it has all of its plan's disk and memory, not only the template's. ``parent``: its volume's;
    one that was made from a snapshot has all of its ``parents`` here instead, snapshots or, once it was flattened, what is
    left. ``disks``: the block storage that may be given to it; ``mounts`` are those of them that were mounted in its present
    process, or failed to be. ``freezing``: its file systems may be frozen by us. ``copying``: the snapshots that its process
    writes. ``ipv6``: the address that its own network configuration has; None before it is known. ``shape``: what its present
    process was started as, ``qemu`` the version that it is of. ``ours``: it carries our agents; None where its image says
    so. One that came from another host has a key that only itself knows, and stands on its ``parents``, or on nothing.
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
    shape: Shape | None = None
    qemu: str = ""
    ours: bool | None = None
    departure: Departure | None = None
    arrival: Arrival | None = None
