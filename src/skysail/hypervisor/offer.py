"""What the QEMU of this machine offers: machine types, and CPU models that run here.

Source: QEMU QMP Reference Manual, query-machines, query-cpu-definitions ("unavailable-features": what keeps a model from
running with this accelerator on this processor).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from skysail.hypervisor.accelerator import Accelerator
from skysail.hypervisor.process import PROGRAM
from skysail.kit.errors import SkysailError
from skysail.kit.process import run

# No guest: QEMU without a machine answers, and leaves.
_ASKED = b'{"execute":"qmp_capabilities"}{"execute":"query-machines"}{"execute":"query-cpu-definitions"}{"execute":"quit"}'
ASK_SECONDS = 60.0


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """``qemu`` is its version with the packager's, as in ``10.0.2 (Debian 1:10.0.2+ds-2)``."""

    qemu: str
    machine_types: tuple[str, ...]
    cpu_models: tuple[str, ...]


def ask(accelerator: Accelerator, program: str = PROGRAM) -> Offer:
    """Ask QEMU, with the accelerator that guests get. Raises SkysailError when it does not answer."""
    said = run([program, "-machine", "none", "-accel", accelerator, "-nodefaults", "-no-user-config", "-display", "none",
                "-qmp", "stdio"], input=_ASKED, timeout=ASK_SECONDS)
    try:
        return understood(map(msgspec.json.decode, said.splitlines()))
    except (msgspec.DecodeError, KeyError, ValueError, TypeError) as strange:
        raise SkysailError(f"{program} does not say what it offers: {strange}", "reinstall qemu-system-x86") from strange


def understood(lines: Iterable[Mapping[str, Any]]) -> Offer:
    """The offer in QEMU's greeting and its answers; events between them are left out."""
    greeting, _capable, machines, models, *_rest = [line for line in lines if "event" not in line]
    return Offer(
        qemu=version(greeting["QMP"]["version"]),
        # ``none`` is the machine without a machine that we asked with.
        machine_types=tuple(sorted(one["name"] for one in machines["return"] if one["name"] != "none")),
        # A model such as ``max`` or ``host`` is another one on each machine: nobody can count on finding it again.
        cpu_models=tuple(sorted(one["name"] for one in models["return"]
                                if one["migration-safe"] and not one.get("unavailable-features", ["unknown"]))))


def version(told: Mapping[str, Any]) -> str:
    """The version in the words of an offer, from QEMU's own: its greeting's, or its answer to ``query-version``."""
    numbers = ".".join(str(told["qemu"][part]) for part in ("major", "minor", "micro"))
    package = told["package"].strip()
    return f"{numbers} ({package.strip('()')})" if package else numbers
