"""Whether the state of devices that one QEMU sends can be loaded by another, as far as their own descriptions of it say.

``qemu-system-x86_64 -machine TYPE -dump-vmstate FILE`` writes down how each device's state is laid out. What one has and the
other does not, sections, subsections, fields, sizes, versions, is found without a guest; a field that both have, and one of
them computes otherwise, is not. Source: QEMU docs/devel/migration/main.rst (VMState, versions) and
scripts/vmstate-static-checker.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

# The devices of a guest of ours (see qemu.py) by the types that QEMU describes their state under. Processors are not among
# what it describes.
DEVICES = frozenset((
    "ICH9-LPC", "ICH9-SMB", "fw_cfg", "fw_cfg_io", "hpet", "i8042", "i8257", "ich9-ahci", "ioapic", "isa-i8259", "isa-pcspk",
    "isa-pit", "isa-serial", "kvm-i8259", "kvm-ioapic", "kvm-pit", "kvmclock", "mc146818rtc", "mch", "pcie-root-port",
    "port92", "ps2-kbd", "ps2-mouse", "scsi-hd", "virtio-blk-device", "virtio-net-device", "virtio-rng-device",
    "virtio-scsi-device", "virtio-serial-device", "vmgenid"))


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One place at which a state does not fit. ``fatal``: loading it is refused; else it depends on what the guest does."""

    device: str
    place: str
    problem: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.device}, {self.place}: {self.problem}{'' if self.fatal else ' (only where it is in use)'}"


def check(sender: Mapping[str, Any], receiver: Mapping[str, Any], devices: Collection[str] = DEVICES) -> list[Finding]:
    """What of ``sender``'s state does not fit into ``receiver``; both are the content of dumps for one machine type."""
    found = [Finding(device="machine", place="type", problem=f"{_machine(sender)} is not {_machine(receiver)}")] \
        if _machine(sender) != _machine(receiver) else []
    for name in sorted(devices):
        if name in sender and "Description" in sender[name]:
            if "Description" not in receiver.get(name, {}):
                found.append(Finding(device=name, place="device", problem="the receiver does not know its state"))
            else:
                found += _section(name, sender[name]["Description"], receiver[name]["Description"], "state")
    return found


def _machine(dump: Mapping[str, Any]) -> str:
    return str(dump.get("vmschkmachine", {}).get("Name", ""))


def _section(device: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> Iterator[Finding]:
    """``ours`` is sent, ``theirs`` loads it."""
    version, most, least = ours["version_id"], theirs["version_id"], theirs["minimum_version_id"]
    if not least <= version <= most:
        yield Finding(device=device, place=place, problem=f"version {version} is sent, {least} to {most} is loaded")
        return
    sent = [field for field in ours.get("Fields", ()) if _exists(field, version)]
    loaded = [field for field in theirs.get("Fields", ()) if _exists(field, version)]
    yield from _fields(device, sent, loaded, place)
    known = {one["name"]: one for one in theirs.get("Subsections", ())}
    for one in ours.get("Subsections", ()):
        name = one["name"]
        if name in known:
            yield from _section(device, one, known[name], f"{place} > {name}")
        else:
            yield Finding(device=device, place=f"{place} > {name}", fatal=False,
                          problem="this part is sent, and the receiver does not know it")


def _exists(field: Mapping[str, Any], version: int) -> bool:
    """Whether a field is part of the state in this version: it is from ``version_id`` on."""
    return int(field.get("version_id", 0)) <= version


def _fields(device: str, sent: list[Mapping[str, Any]], loaded: list[Mapping[str, Any]], place: str) -> Iterator[Finding]:
    """Fields have no names on the wire: what counts is their order and their sizes. A field that is only there under a
    condition, which no description tells, may be missing on one side."""
    ours, theirs = list(sent), list(loaded)
    while ours or theirs:
        left, right = (ours[0] if ours else None), (theirs[0] if theirs else None)
        if left is not None and right is not None and _alike(left, right):
            ours.pop(0)
            theirs.pop(0)
            if "Description" in left and "Description" in right:
                # Its size is that in QEMU's memory, not on the wire.
                yield from _section(device, left["Description"], right["Description"], f"{place}.{left['field']}")
            elif left.get("size") != right.get("size"):
                yield Finding(device=device, place=f"{place}.{left['field']}",
                              problem=f"{left.get('size')} bytes are sent, {right.get('size')} are loaded")
        elif left is not None and not any(_alike(left, one) for one in theirs):
            ours.pop(0)
            if right is not None and left.get("size") == right.get("size") and not any(_alike(one, right) for one in ours):
                theirs.pop(0)  # it has another name there
                continue
            yield Finding(device=device, place=f"{place}.{left['field']}", fatal=not _conditional(left),
                          problem="this field is sent, and the receiver does not load it")
        else:
            assert right is not None
            theirs.pop(0)
            yield Finding(device=device, place=f"{place}.{right['field']}", fatal=not _conditional(right),
                          problem="the receiver loads this field, and it is not sent")


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["field"] == other["field"])


def _conditional(field: Mapping[str, Any]) -> bool:
    return bool(field.get("field_exists"))
