"""What a host reports: the state it observes, never what it was told."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from skysail.contract import VERSION
from skysail.contract.document import MetadataOptions, RecordSet
from skysail.contract.migration import Destination, Passport, Progress, Pull

# ``listening``: its process waits for the state of the guest that comes, or for the word to run. ``sent``: its process stands
# still for good, the guest runs elsewhere or is about to.
GuestState = Literal["preparing", "starting", "running", "rebooting", "stopping", "stopped", "halted", "crashed",
                     "failed", "gone", "listening", "sent"]

# What useradd(8) takes for a user's name, or nothing.
USER = r"\A([a-z_][a-z0-9_-]{0,31})?\Z"

# Lightsail's words for a disk that mounts by itself.
Mount = Literal["Mounted", "Pending", "Failed"]

# ``waiting``: not begun. ``copying``: the moment that it holds is past, and it is being written.
SnapshotState = Literal["waiting", "copying", "available", "failed", "gone"]


class GuestReport(msgspec.Struct, frozen=True, kw_only=True):
    """One guest as seen on its host. ``halted``: it powered itself off; ``crashed``: it died and will be restarted after
    a back-off; ``failed``: it could not be made at all, ``reason`` says why. ``stages`` maps a launch stage to the
    seconds since its start. ``disks`` are the block-storage disks that it holds; ``refused`` maps one that could not be
    plugged in while it runs to the reason, ``mounts`` one that mounts by itself to how that went. ``alone``: its system
    disk stands on no snapshot, or not any more. ``metadata_options`` are those by which its metadata are answered
    now; None while they are not. ``public_addresses``: those that lead to it now. ``ours``: it carries our
    agents; None before that is known. Of one that moves: its ``passport`` and ``progress`` at the source, the
    ``destination`` at the target, and there, once it has come by post-copy, ``pull``. ``qemu`` is the version that its
    process is of, '' where that is not known: the host's program may be another one by now."""

    id: str
    state: GuestState
    starts: int = 0
    reboots: int = 0
    reason: str = ""
    host_keys: tuple[str, ...] = ()
    rx_bytes: int = 0
    tx_bytes: int = 0
    stages: dict[str, float] = {}
    disks: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    mounts: dict[str, Mount] = {}
    alone: bool = False
    metadata_options: MetadataOptions | None = None
    public_addresses: tuple[str, ...] = ()
    ours: bool | None = None
    passport: Passport | None = None
    destination: Destination | None = None
    progress: Progress | None = None
    pull: Pull | None = None
    qemu: str = ""


class DiskReport(msgspec.Struct, frozen=True, kw_only=True):
    """One block-storage disk. ``alone``: it stands on no snapshot any more."""

    id: str
    state: Literal["preparing", "available", "failed", "gone"]
    reason: str = ""
    alone: bool = False


class SnapshotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. ``progress`` is in percent. ``consistency``: the guest's file systems were ``frozen`` for
    ``frozen_ms``, or the disks are as a power cut would have left them (``crash``), or nobody wrote them (``off``).
    ``parents`` are the snapshots whose files it stands on."""

    id: str
    state: SnapshotState
    progress: int = 0
    consistency: Literal["", "frozen", "crash", "off"] = ""
    frozen_ms: float = 0.0
    parents: tuple[str, ...] = ()
    reason: str = ""


class ImageReport(msgspec.Struct, frozen=True, kw_only=True):
    """An image that the host holds and can launch. ``user`` is whom one logs in as: a name that useradd(8) takes, since
    clients make command lines of it."""

    digest: str
    blueprint: str
    name: str
    user: Annotated[str, msgspec.Meta(pattern=USER)]
    version: str
    size_gib: int
    templated: bool


class ZoneReport(msgspec.Struct, frozen=True, kw_only=True):
    """One zone as its host's name server has it. ``pending``: not written since the document changed it; ``failed``: it could
    not be, ``reason`` says why, and it is tried again. ``serial`` is that of its SOA record, ``ds`` the delegation signer
    records of its keys (RFC 4034, 5), without owner."""

    id: str
    name: str
    state: Literal["pending", "served", "failed", "gone"]
    serial: int = 0
    ds: tuple[str, ...] = ()
    reason: str = ""


class EntranceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The shared address's entrance. ``pending``: not as the document says yet; ``failed``: it could not be made so,
    ``reason`` says why, and it is tried again."""

    state: Literal["pending", "served", "failed"]
    reason: str = ""


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a host observes, at one moment. ``sequence`` grows by one with every change, within one agent's life
    (``boot``): a reader keeps the pair to know what it has seen. ``networked`` is the newest generation whose networks are
    joined as it says. One that ``waits`` has booted, and starts nothing before a document comes that was written for this
    life of its agent."""

    host: str
    boot: str
    sequence: int
    generation: int
    vcpus: int
    memory_mib: int
    disk_gib: int
    accelerator: str
    guests: tuple[GuestReport, ...] = ()
    images: tuple[ImageReport, ...] = ()
    disks: tuple[DiskReport, ...] = ()
    snapshots: tuple[SnapshotReport, ...] = ()
    zones: tuple[ZoneReport, ...] = ()
    entrance: EntranceReport | None = None
    networked: int = 0
    waits: bool = False
    version: int = VERSION


class HeldZone(msgspec.Struct, frozen=True, kw_only=True):
    """A zone as the name server really holds it, in the terms of :class:`skysail.contract.document.Zone`."""

    name: str
    serial: int
    record_sets: tuple[RecordSet, ...] = ()
    ds: tuple[str, ...] = ()


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What a host really holds at this moment, by id: guests, those of them that have a process, volumes (block storage
    too), ports, snapshots. ``strays`` says in words what is there of guests that the host does not hold.
    ``zones``: what its name server has. ``reached_by`` has the numbers of the networks whose guests reach each port,
    ``routed`` the ports that peer subnets do; ``names`` the host names that lead to guests, with the private address of
    each. ``metadata``: a digest of what each guest is told of itself, by id; None when nobody answers guests that ask."""

    guests: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    zones: tuple[HeldZone, ...] = ()
    reached_by: dict[str, tuple[int, ...]] = {}
    routed: tuple[str, ...] = ()
    names: dict[str, str] = {}
    metadata: dict[str, str] | None = None
