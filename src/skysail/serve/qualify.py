"""The operator's trials of versions of QEMU, before guests move between them; and what is known of such pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from skysail.contract.qualification import Qualification
from skysail.hosts import qualification
from skysail.hosts.roster import Host
from skysail.hypervisor import qemu
from skysail.hypervisor.accelerator import probe
from skysail.hypervisor.trial import matrix, programs
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.serve import dev, hosts
from skysail.store.visit import visit


def qualify(config: Config, names: Sequence[str], words: Sequence[str], machine: str, quick: bool,
            told: Callable[[str, int, int], None]) -> list[Qualification]:
    """Move guests between two versions of QEMU on this machine, in both directions: those of two hosts, or those that
    ``words`` say (see :func:`skysail.hypervisor.trial.programs.find`). Raises SkysailError."""
    require_root()
    if (len(names), len(words)) not in ((2, 0), (0, 2)):
        raise SkysailError("two versions are compared", "sudo ./skysail qualify HOST HOST, or --qemu VERSION --qemu VERSION")
    verdict = probe(config.accelerator_file)
    if names:
        pair = [hosts.get(config, name) for name in names]
        words = [_version(one, verdict.accelerator) for one in pair]
        if words[0] == words[1]:
            raise SkysailError(f"{names[0]} and {names[1]} both have QEMU {words[0]}", "nothing is to be tried")
    one, other = (programs.find(word, verdict.accelerator, _folders(config), config.root / "qemu") for word in words)
    return matrix.qualify(one, other, verdict.accelerator, machine or qemu.MACHINE, quick, told)


def _version(host: Host, accelerator: str) -> str:
    """The version of a host's QEMU. Raises SkysailError where this machine cannot try it in its place."""
    if host.facts is None or host.facts.accelerator == "sim":
        raise SkysailError(f"host {host.id} has no QEMU that could be tried")
    if host.facts.accelerator != accelerator:
        raise SkysailError(f"host {host.id} runs guests by {host.facts.accelerator}, this machine by {accelerator}",
                           f"on a machine with {host.facts.accelerator}: sudo ./skysail qualify --qemu VERSION --qemu "
                           "VERSION --json > FILE; and here: sudo ./skysail qualifications --add FILE")
    return host.facts.qemu


def _folders(config: Config) -> list[str]:
    """Where a fleet on this machine has other QEMUs."""
    plan = dev.find(config)
    found = [config.qemu_folder]
    for number in range(1, (plan.hosts if plan else 0) + 1):
        if (folder := dev.data_folder(config, number)).exists():
            found.append(load(str(folder)).qemu_folder)
    return [one for one in found if one]


def note(config: Config, found: Sequence[Qualification]) -> list[Qualification]:
    """Keep what was tried with the rows of the cloud; what was kept. Raises SkysailError where there is no cloud."""
    hosts.on_the_controller(config)
    found = list(found)
    return visit(config, lambda connection: qualification.note(connection, found), list[Qualification], write=True)


def read(file: Path) -> list[Qualification]:
    """What another machine tried, as ``qualify --json`` said it there. Raises SkysailError."""
    try:
        return msgspec.json.decode(file.read_bytes().strip().splitlines()[-1], type=list[Qualification])
    except (OSError, IndexError, msgspec.MsgspecError) as strange:
        raise SkysailError(f"{file} is not what qualify --json says: {strange}") from strange


def listed(config: Config) -> list[Qualification]:
    """All that is known, the newest first."""
    hosts.on_the_controller(config)
    return visit(config, qualification.listed, list[Qualification])


def against_upgrade(config: Config, host: str, version: str) -> tuple[str, list[str]]:
    """See :func:`skysail.hosts.qualification.against_upgrade`."""
    hosts.on_the_controller(config)
    return visit(config, lambda connection: qualification.against_upgrade(connection, host, version),
                 tuple[str, list[str]])


def summary(one: Qualification) -> dict[str, Any]:
    """A pair in the few words of a table."""
    failed = sum(bool(trial.differences) for trial in one.trials)
    return {"from": one.sender, "to": one.receiver, "machine": one.machine, "by": one.accelerator,
            "verdict": "whole" if one.good else f"{failed} failed",
            "trials": f"{len(one.trials)}{', quick' if one.quick else ''}",
            "tried (UTC)": time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.at))}


def cells(found: Sequence[Qualification]) -> list[dict[str, Any]]:
    """Each trial in the few words of a table."""
    return [{"from": matrix.short(one.sender), "to": matrix.short(one.receiver), "guest": trial.shape,
             "condition": trial.condition, "way": trial.way, "seconds": trial.seconds,
             "verdict": "whole" if not trial.differences else f"{len(trial.differences)} lost"}
            for one in found for trial in one.trials]


def explained(found: Sequence[Qualification], most: int = 12) -> list[str]:
    """Why trials failed, line by line."""
    lines = []
    for one, trial in matrix.bad(found):
        lines.append(f"{matrix.short(one.sender)} to {matrix.short(one.receiver)}, {trial.shape}, {trial.condition}, "
                     f"{trial.way}:")
        lines += [f"    {difference}" for difference in trial.differences[:most]]
        if len(trial.differences) > most:
            lines.append(f"    and {len(trial.differences) - most} more (--json says all)")
    return lines
