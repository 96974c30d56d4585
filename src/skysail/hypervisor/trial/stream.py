"""What a migration's stream says of each device, field by field, and what is not the same in another one.

The stream describes itself: behind the state of all devices is a JSON text with the names and sizes of what came. So it can
be taken apart whatever version of QEMU it is of. Source: QEMU docs/devel/migration/main.rst (stream structure),
scripts/analyze-migration.py, migration/savevm.c and migration/ram.c.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from skysail.kit.errors import SkysailError

MAGIC = b"QEVM\0\0\0\3"
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND, _FOOTER = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 0x7E)
# Flags of the memory's part of it: each comes with an offset.
_ZERO, _SIZES, _PAGE, _ENDED, _CONTINUED = 0x02, 0x04, 0x08, 0x10, 0x20
_PAGE_BYTES = 4096


class Unreadable(SkysailError):
    """It is no stream that is understood."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise Unreadable("the stream ends in the middle")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        return self.take(self.number(1)).decode(errors="replace")


def devices(data: bytes) -> dict[str, bytes]:
    """The value of each field of each device, by names such as ``cpu 1: env.efer``. ``data`` is what went over the first
    connection of a migration. Raises Unreadable."""
    if not data.startswith(MAGIC):
        raise Unreadable("it does not begin as a migration does")
    described = {(one["name"], int(one["instance_id"])): one for one in _description(data)["devices"]}
    reader, found = _Reader(data), dict[str, bytes]()
    reader.take(len(MAGIC))
    while (kind := reader.number(1)) != _EOF:
        match kind:
            case 0x07:
                reader.take(reader.number(4))
                # What may follow is described too, beside the devices; the next section is found by its own kind.
                _skip_configuration(reader, data)
            case 0x01 | 0x04:
                reader.number(4)
                key = reader.name(), reader.number(4)
                reader.number(4)
                if kind == _START:
                    _skip_memory(reader, key[0])
                elif key in described:
                    label = key[0] if key[1] == 0 else f"{key[0]} {key[1]}"
                    found.update(_fields(reader, described[key], f"{label}: "))
                else:
                    raise Unreadable(f"nothing describes {key[0]}")
            case 0x02 | 0x03:
                reader.number(4)
                _skip_memory(reader, "ram")
            case 0x08:
                reader.number(2)
                reader.take(reader.number(2))
                continue
            case other:
                raise Unreadable(f"a section of kind {other} is not known")
        if kind != _CONFIGURATION and reader.number(1) == _FOOTER:
            reader.number(4)
    return found


def differences(sent: Mapping[str, bytes], kept: Mapping[str, bytes]) -> list[str]:
    """What of a state that was sent the receiver does not have, in words: ``kept`` is what it sends itself. That a receiver
    of another version has more than was sent is no loss."""
    said = []
    for device in dict.fromkeys(name.partition(": ")[0] for name in sent):
        if device == _SENDER:
            continue
        ours, theirs = _of(sent, device), _of(kept, device)
        if not theirs:
            said.append(f"{device}: its state was sent and is not kept")
        elif b"".join(ours.values()) != b"".join(theirs.values()):
            said += _device(device, ours, theirs)
    return said


def _of(state: Mapping[str, bytes], device: str) -> dict[str, bytes]:
    return {name.partition(": ")[2]: value for name, value in state.items() if name.startswith(f"{device}: ")}


def _device(device: str, ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> Iterator[str]:
    """Fields have names for people only; what has no namesake is held against the next that has none either, and its size."""
    spare = [(name, value) for name, value in theirs.items() if name not in ours]
    lost = list[str]()
    for name, before in ours.items():
        place = next((number for number, (_, value) in enumerate(spare) if len(value) == len(before)), None)
        if name in theirs:
            after = theirs[name]
        elif place is not None:
            after = spare.pop(place)[1]
        else:
            lost.append(name)
            continue
        if not _alike(f"{device}: {name}", before, after):
            yield f"{device}: {name}: {_changed(before, after)}"
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        yield f"{device}: {', '.join(lost[:3])}{more} was sent and is not kept"


# What differs after each migration, also of one version: the host's time goes on while the guest stands still, and the guest
# is told that its generation may be another one (bit 5 of the general-purpose events).
_TIME = re.compile(r"mc146818rtc: (update_timer|last_update|next_alarm_time|next_periodic_time|base_rtc|offset)\b")
_CMOS, _CMOS_TIME = "mc146818rtc: cmos_data", (0, 2, 4, 6, 7, 8, 9, 10, 12, 0x32)
# Whether it ran when it was sent is a matter of the sending.
_SENDER = "globalstate"
_EVENTS, _GENERATION = re.compile(r"ICH9LPC: .*gpe\.sts\[0\]"), 0x20


def _alike(name: str, before: bytes, after: bytes) -> bool:
    if before == after or _TIME.search(name):
        return True
    if name == _CMOS and len(before) == len(after):
        return all(one == other for at, (one, other) in enumerate(zip(before, after, strict=True)) if at not in _CMOS_TIME)
    return bool(_EVENTS.search(name)) and len(before) == len(after) == 1 and before[0] | _GENERATION == after[0]


def _changed(before: bytes, after: bytes) -> str:
    if len(before) != len(after):
        return f"{len(before)} bytes became {len(after)}"
    if len(before) <= 16:
        return f"{before.hex()} became {after.hex()}"
    at = next(number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
    return f"{before[at:at + 8].hex()} became {after[at:at + 8].hex()} (at byte {at} of {len(before)})"


def _description(data: bytes) -> Any:
    """The JSON at the end: behind its kind and its length."""
    at = data.rfind(b'{"configuration"')
    at = at if at >= 0 else data.rfind(b'{"page_size"')
    if at < 5 or data[at - 5] != _DESCRIPTION:
        raise Unreadable("nothing describes it at its end")
    length = struct.unpack(">I", data[at - 4:at])[0]
    try:
        return json.loads(data[at:at + length])
    except ValueError as broken:
        raise Unreadable(f"what describes it is broken: {broken}") from broken


def _skip_configuration(reader: _Reader, data: bytes) -> None:
    described = _description(data).get("configuration")
    if described is None:
        return
    for one in described.get("subsections", ()):
        if reader.data[reader.at] == _SUBSECTION:
            list(_subsection(reader, one, ""))


def _skip_memory(reader: _Reader, name: str) -> None:
    if name != "ram":
        raise Unreadable(f"{name} is sent in parts")
    while True:
        word = reader.number(8)
        flags = word & (_PAGE_BYTES - 1)
        if flags & _SIZES:
            left = word & ~(_PAGE_BYTES - 1)
            while left > 0:
                reader.name()
                left -= reader.number(8)
            flags &= ~_SIZES
        if flags & (_ZERO | _PAGE) and not flags & _CONTINUED:
            reader.name()
        if flags & _ZERO:
            reader.number(1)
        elif flags & _PAGE:
            reader.take(_PAGE_BYTES)
        elif flags & _ENDED:
            return


def _fields(reader: _Reader, described: Mapping[str, Any], place: str) -> Iterator[tuple[str, bytes]]:
    for field in described.get("fields", ()):
        count = int(field.get("array_len", 1))
        name = f"{place}{field['name']}" + (f"[{field['index']}]" if "index" in field else "")
        for number in range(count):
            value = reader.take(int(field["size"]))
            own = f"{name}[{number}]" if count > 1 else name
            parts = _inside(value, field["struct"], own) if "struct" in field else None
            yield from parts if parts is not None else [(own, value)]
    for one in described.get("subsections", ()):
        yield from _subsection(reader, one, place)


def _subsection(reader: _Reader, described: Mapping[str, Any], place: str) -> Iterator[tuple[str, bytes]]:
    if reader.number(1) != _SUBSECTION:
        raise Unreadable(f"{place}{described.get('vmsd_name', '')} does not come where it is described")
    name = reader.name()
    reader.number(4)
    yield f"{place}({name})", b""
    yield from _fields(reader, described, f"{place}({name}).")


def _inside(value: bytes, described: Mapping[str, Any], place: str) -> list[tuple[str, bytes]] | None:
    """The fields of a structure; None where their sizes do not say how it is made up."""
    reader = _Reader(value)
    try:
        found = list(_fields(reader, described, f"{place}."))
    except Unreadable:
        return None
    return found if reader.at == len(value) else None
