"""The registers of a guest's processors, as QEMU prints them, and what differs between two of them.

State that one side of a migration keeps and the other drops shows here, and often only here: a guest whose code segment has
lost a bit stands still, and nothing says why. Source: QEMU "Monitor", info registers (x86_cpu_dump_state in
target/i386/cpu-dump.c); Intel SDM volume 3, 3.4.5 (segment descriptors) and 2.5 (control registers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

# One processor's registers by name, each as it is printed.
Processor = Mapping[str, str]

_CPU = re.compile(r"^\s*CPU#(\d+)\s*$")
_SEGMENT = re.compile(r"^(ES|CS|SS|DS|FS|GS|LDT|TR) *= *([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]{8}) ([0-9a-f]{8})")
_TABLE = re.compile(r"^(GDT|IDT) *= *([0-9a-f]+) ([0-9a-f]{8})")
_REGISTER = re.compile(r"([A-Z][A-Z0-9]*) *= *([0-9a-f]+(?: [0-9a-f]+)?)")
# Bits of a descriptor's second word, as the dump has it: 8 to 11 the type, and so on.
_ATTRIBUTES = {12: "S (code or data)", 15: "P (present)", 20: "AVL", 21: "L (64-bit code)", 22: "D/B (default size)",
               23: "G (limit in pages)"}
_FLAGS = {
    "CR0": {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"},
    "CR4": {0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
            10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE", 20: "SMEP",
            21: "SMAP", 22: "PKE"},
    "EFER": {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE"}}
# What QEMU computes while it emulates: lazily kept condition codes, and whether the processor waits, are no state of a guest
# that is lost.
_FLEETING = {"CCS", "CCD", "CCO", "HLT"}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One register that is not the same; ``meaning`` names the bits, where they have names. A missing one is empty."""

    cpu: int
    register: str
    before: str
    after: str
    meaning: str = ""

    def __str__(self) -> str:
        said = f"CPU {self.cpu} {self.register}: {self.before or 'nothing'} became {self.after or 'nothing'}"
        return f"{said} ({self.meaning})" if self.meaning else said


def parse(text: str) -> dict[int, dict[str, str]]:
    """The registers of every processor, from the output of ``info registers -a``."""
    found: dict[int, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.replace("\r", "").splitlines():
        if header := _CPU.match(line):
            current = found.setdefault(int(header[1]), {})
        elif segment := _SEGMENT.match(line):
            name = segment[1]
            for part, value in zip(("selector", "base", "limit", "flags"), segment.groups()[1:], strict=True):
                current[f"{name}.{part}"] = value
        elif table := _TABLE.match(line):
            current[f"{table[1]}.base"], current[f"{table[1]}.limit"] = table[2], table[3]
        else:
            current.update({name: value for name, value in _REGISTER.findall(line) if name not in _FLEETING})
    return found


def differences(before: Mapping[int, Processor], after: Mapping[int, Processor]) -> list[Difference]:
    """What is not the same, in the order of processors and registers."""
    return [Difference(cpu=cpu, register=name, before=old, after=new, meaning=_meaning(name, old, new))
            for cpu in sorted(before.keys() | after.keys())
            for name, old, new in _pairs(before.get(cpu, {}), after.get(cpu, {})) if old != new]


def _pairs(before: Processor, after: Processor) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys((*before, *after)):
        yield name, before.get(name, ""), after.get(name, "")


def _meaning(name: str, before: str, after: str) -> str:
    if not before or not after:
        return ""
    named = _ATTRIBUTES if name.endswith(".flags") else _FLAGS.get(name, {})
    old, new = (int(one.replace(" ", ""), 16) for one in (before, after))
    words = [f"{text} {'set' if new >> bit & 1 else 'lost'}" for bit, text in named.items() if (old ^ new) >> bit & 1]
    if name.endswith(".flags"):
        words += [f"{text} {old >> at & mask} became {new >> at & mask}"
                  for text, at, mask in (("type", 8, 15), ("DPL", 13, 3)) if (old ^ new) >> at & mask]
    return ", ".join(words)
