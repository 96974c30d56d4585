"""What is tried before guests move between two versions of QEMU: shapes, conditions and ways, in both directions."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from skysail.contract.qualification import Qualification, Trial
from skysail.hypervisor import offer, qemu, vmstate
from skysail.hypervisor.accelerator import Accelerator
from skysail.hypervisor.offer import Offer
from skysail.hypervisor.trial import cell
from skysail.hypervisor.trial.cell import Condition, Shape
from skysail.kit.errors import SkysailError
from skysail.kit.process import run

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
# Beyond the model that guests get: another one, with further instructions. KVM runs those alone that the processor has.
OTHER_MODELS = ("Westmere",)


class Plan(NamedTuple):
    """One trial that is to be made."""

    shape: Shape
    condition: Condition
    live: bool


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU, by the path of its program, and what it offers."""

    path: str
    offer: Offer

    @classmethod
    def at(cls, path: str, accelerator: Accelerator) -> Program:
        return cls(path=path, offer=offer.ask(accelerator, path))


def planned(accelerator: Accelerator, machine: str, models: Iterable[str], quick: bool) -> list[Plan]:
    """What is tried in each direction. Every condition, while the guest runs and while it stands; processors, CPU models and
    devices beyond that with guests that work. The quick one has each condition once."""
    own = qemu.cpu_model(accelerator)
    usual = Shape(machine=machine, accelerator=accelerator, cpu=own, vcpus=2)
    if quick:
        return [Plan(usual, condition, condition not in ("computing", "rebooted")) for condition in CONDITIONS]
    shapes = [msgspec.structs.replace(usual, vcpus=1, full=False), msgspec.structs.replace(usual, vcpus=4)]
    shapes += [msgspec.structs.replace(usual, cpu=model) for model in OTHER_MODELS if model != own and model in models]
    working: tuple[Condition, ...] = ("computing", "busy")
    return [Plan(*one) for one in (*product((usual,), CONDITIONS, (False, True)), *product(shapes, working, (False, True)))]


def qualify(one: Program, other: Program, accelerator: Accelerator, machine: str, quick: bool,
            told: Callable[[str, int, int], None]) -> list[Qualification]:
    """Try both directions; ``told`` is what is tried next, how much was, and how much there is. Needs root. Raises
    SkysailError where a machine type or CPU model is not known to both."""
    for program in (one, other):
        if machine not in program.offer.machine_types:
            raise SkysailError(f"QEMU {program.offer.qemu} has no machine type {machine}")
        if qemu.cpu_model(accelerator) not in program.offer.cpu_models:
            raise SkysailError(f"QEMU {program.offer.qemu} does not run the processor {qemu.cpu_model(accelerator)} here")
    models = set(one.offer.cpu_models) & set(other.offer.cpu_models)
    plans = planned(accelerator, machine, models, quick)
    found, done, whole = [], 0, 2 * (len(plans) + 1)
    for sender, receiver in ((one, other), (other, one)):
        way = f"{short(sender.offer.qemu)} to {short(receiver.offer.qemu)}"
        told(f"{way}: what they say of their devices", done, whole)
        trials = [described(sender, receiver, machine)]
        done += 1
        for plan in plans:
            told(f"{way}: {plan.shape}, {plan.condition}, {'live' if plan.live else 'paused'}", done, whole)
            trials.append(tried(sender, receiver, plan))
            done += 1
        found.append(Qualification(
            sender=sender.offer.qemu, receiver=receiver.offer.qemu, machine=machine, accelerator=accelerator,
            kernel=platform.release(), at=round(time.time(), 3), quick=quick, trials=tuple(trials)))
    return found


def tried(sender: Program, receiver: Program, plan: Plan) -> Trial:
    """Move one guest."""
    began = time.monotonic()
    differences = cell.run(sender.path, receiver.path, plan.shape, plan.condition, plan.live)
    return Trial(shape=str(plan.shape), condition=plan.condition, way="live" if plan.live else "paused",
                 seconds=round(time.monotonic() - began, 1), differences=tuple(differences))


def described(sender: Program, receiver: Program, machine: str) -> Trial:
    """Hold what the two say of their devices' states against each other."""
    began = time.monotonic()
    findings = vmstate.check(_dump(sender, machine), _dump(receiver, machine))
    return Trial(shape=machine, condition="devices", way="described", seconds=round(time.monotonic() - began, 1),
                 differences=tuple(str(one) for one in findings if one.fatal),
                 notes=tuple(str(one) for one in findings if not one.fatal))


def _dump(program: Program, machine: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="sky") as folder:
        path = Path(folder) / "devices.json"
        run([program.path, "-machine", machine, "-display", "none", "-dump-vmstate", str(path)], timeout=60)
        return json.loads(path.read_text())


def short(version: str) -> str:
    """A version without its packager's."""
    return version.partition(" ")[0]


def bad(found: Iterable[Qualification]) -> Iterator[tuple[Qualification, Trial]]:
    """The trials in which something was lost."""
    for one in found:
        for trial in one.trials:
            if trial.differences:
                yield one, trial
