"""What two hosts tell each other by way of the controller while a guest that runs moves from one to the other. Nothing in it
is secret. An attempt is named by the id of the guest that it makes, the target's."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

# The version of the contract from which on hosts can let guests go, and take them in.
SINCE = 3
# What both processes take for granted of each other.
STREAMS = 4
# The system disk among the disks of a passport; the others go by their names (``xvdf``).
SYSTEM_DISK = "disk"


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """On which terms a guest moves. ``bytes_per_second`` bounds its memory, and each of its disks; 0 sets no bound.
    ``pause_ms`` is for how long memory may go while the guest stands still, as QEMU reckons it; devices, disks and the
    hand-over take some thirty milliseconds more. An attempt that is not through after ``seconds`` is cancelled. One that is
    ``off`` is stopped, and stays so: its disks move, and it runs at neither end. One by ``post_copy`` runs at the target
    before all of its memory is there (docs/decisions/0046); only hosts that say in their facts that they can are told so."""

    bytes_per_second: Annotated[int, msgspec.Meta(ge=0)] = 0
    pause_ms: Annotated[int, msgspec.Meta(ge=1)] = 20
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    off: bool = False
    post_copy: bool = False


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a QEMU process was started as, as far as a guest can see it: all that has to be the same where its state is
    loaded. ``number`` counts Skysail's own changes of the devices. There is a seed disk when there is a ``seed_serial``."""

    number: int
    type: str
    accelerator: Literal["kvm", "tcg"]
    cpu: str
    vcpus: int
    memory_mib: int
    pluggable: bool
    seed_serial: str = ""


class MovingDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk by its device's name. ``address`` is its place on the bus of block-storage disks."""

    name: Annotated[str, msgspec.Meta(pattern=r"\A(disk|xvd[f-z])\Z")]
    volume: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    address: int = 0


class Passport(msgspec.Struct, frozen=True, kw_only=True):
    """Who a guest is, beyond what documents say of it. ``plugged_mib`` is the memory that it was given while it ran.
    ``base``: the image, by its digest, that its system disk stands on, where that is all that it stands on. ``ours``: it
    carries our agents. ``mounted`` are the volumes that it mounted by itself. ``authority`` is a certificate, in PEM: whoever
    shows one that it signed is the process that sends, or its agent. ``pool`` is where its disks are, when other hosts see
    that, too: they are not copied; '' for files of its host."""

    shape: Shape
    plugged_mib: int
    disks: tuple[MovingDisk, ...]
    generation_id: str
    host_key: str
    ours: bool
    authority: str
    base: str = ""
    seed_bytes: Annotated[int, msgspec.Meta(ge=0, le=16 << 20)] = 0
    ipv6: str | None = None
    mounted: tuple[str, ...] = ()
    starts: int = 0
    reboots: int = 0
    pool: str = ""


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """Where a guest is awaited: by its memory, by its disks, and by its agent's word; a port is 0 where nothing comes by it.
    ``authority`` as in a passport.
    ``over`` names the disks of which only the topmost file is wanted: what is below is there."""

    address: str
    memory_port: int
    disks_port: int
    word_port: int
    authority: str
    over: tuple[str, ...] = ()


class Sending(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that shall move, and become the guest ``guest``; without a destination it only says who it is."""

    guest: str
    destination: Destination | None = None
    terms: Terms = Terms()


class Receiving(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that shall come. ``balance_seconds``: the processor credits that it brings along. ``whole``: its source said
    that all of it went. Where the source failed before it could, the guest runs only if its process has all of it."""

    passport: Passport
    terms: Terms = Terms()
    balance_seconds: float | None = None
    whole: bool = True


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt stands at its source. ``ready``: it has a passport. ``copying``: the guest runs here, or stands still
    for its memory to go. ``sent``: it does not run, and never will unless the target is lost. ``failed``: it runs here, and
    the attempt is over.

    ``percent`` is of disks and of memory, with their zeros; ``memory_bytes`` and ``disk_bytes`` went over, of disks what the
    agent that tells it saw go. ``rounds``: how often the memory was gone through. ``gap_ms`` is from the guest's stop here
    until it ran there, by the clock of this host, 0 where that is not known. ``pause_ms`` is QEMU's own count of the pause,
    or the gap of one that stood still. ``slowed_percent``: how much auto-converge held it back. ``post_copy``: it was handed
    over before all of its memory had gone; ``cut`` is why the rest of that never came, and it was started from its disk.
    """

    guest: str
    state: Literal["ready", "copying", "sent", "failed"]
    reason: str = ""
    percent: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    rounds: int = 0
    pause_ms: float = 0.0
    gap_ms: float = 0.0
    slowed_percent: int = 0
    post_copy: bool = False
    cut: str = ""


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """How the memory of a guest that came by post-copy stands at its target, where it runs. ``coming``: the source is needed
    for it. ``whole``: all of it is there. ``cut``: the rest never comes, and the guest starts from its disk, for this
    ``reason``."""

    state: Literal["coming", "whole", "cut"]
    reason: str = ""
