"""What two hosts and the controller may do to a guest that moves, in every order: it runs once, and comes to rest.

The hosts are what decision 0040 promises of them, no more: what is delivered may be late, a report may be old, a copy may
fail at any moment, the line between the two may be away, either host may die. Everything that can follow is tried.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest

from skysail.contract.document import Guest, Personality, Port, Volume
from skysail.contract.migration import Destination, MovingDisk, Passport, Progress, Pull, Shape, Terms
from skysail.hosts import transit
from skysail.hosts.transit import Move, Owner

PASSPORT = Passport(
    shape=Shape(number=1, type="pc", accelerator="tcg", cpu="c", vcpus=1, memory_mib=64, pluggable=False), plugged_mib=0,
    disks=(MovingDisk(name="disk", volume="a", size_bytes=1),), generation_id="", host_key="", ours=True, authority="")
DESTINATION = Destination(address="b", memory_port=1, disks_port=2, word_port=3, authority="")


def guest(role: str) -> Guest:
    return Guest(id="a", instance="one", role=role, starts=1, reboots=0, vcpus=1, memory_mib=64,  # type: ignore[arg-type]
                 volume=Volume(id="a", image="i", size_gib=1), personality=Personality(hostname="one", user="admin"),
                 port=Port(id="a", mac="52:54:00:00:00:01", network=1, private_ipv4="172.26.0.2"))


class Source(NamedTuple):
    """``runs``: its process does; of one that is off, it is this host that may start it. ``phase`` as in its record;
    ``heard``: the target said that it runs."""

    runs: bool = True
    phase: str = ""
    heard: bool = False
    gone: bool = False

    def progress(self) -> Progress | None:
        states = {"ready": "ready", "moving": "copying", "sent": "sent", "failed": "failed"}
        if not self.phase:
            return None
        reasons = {"sent": "" if self.heard else "nobody answers", "failed": "it broke"}
        return Progress(guest="b", state=states[self.phase], reason=reasons.get(self.phase, ""))  # type: ignore[arg-type]


class World(NamedTuple):
    """Both hosts as they are (``target``: '', listening, ran, never or gone), the controller's row of the attempt, and what
    the owner wants. ``pooled``: its disks are where both hosts see them. ``dead``: the target's host is off for good. A guest
    that is off "ran" there when that host took it over. ``whole``: what listens there has all of it. ``lost``: the source's
    host is off for good, and ``fenced``: that is known. ``comes``: it runs at the target, and some of its memory is
    still at the source."""

    source: Source
    target: str
    move: Move
    role: str
    pooled: bool
    dead: bool = False
    whole: bool = False
    lost: bool = False
    fenced: bool = False
    comes: bool = False


def follows(world: World, owners: bool) -> Iterator[tuple[str, World]]:
    """Whatever may happen next, by name."""
    yield from controller(world)
    yield from source(world)
    yield from target(world)
    if owners and world.role == world.move.rest:
        yield "its owner wants it otherwise", world._replace(role="run" if world.move.off else "stop")
    if owners and not world.move.called_off:
        yield "its operator calls it off", world._replace(move=msgspec.structs.replace(world.move, called_off="called off"))
    if not world.dead and (world.target in ("listening", "never", "") or (
            world.comes and world.move.phase == "landed")):
        # Whether it had run for a moment nobody knows; what matters is that it never will again.
        yield "the target's host dies", world._replace(dead=True)
    if world.dead and world.move.phase in ("owed", "returning") and not world.move.lost:
        yield "its operator vouches", world._replace(move=msgspec.structs.replace(world.move, lost=True))
    if not world.dead and not world.lost and not world.source.gone:
        yield "the source's host dies", world._replace(lost=True, source=world.source._replace(runs=False))
    if world.lost and not world.fenced:
        yield "the source is fenced", world._replace(fenced=True)


def controller(world: World) -> Iterator[tuple[str, World]]:
    move, said = world.move, world.source.progress()
    values = {"progress": said, "source_state": "gone" if world.source.gone else "running" if world.source.runs else (
        "sent" if world.source.phase == "sent" else "stopped")}
    if said is not None and move.passport is None:
        values["passport"] = msgspec.structs.replace(PASSPORT, pool="pool" if world.pooled else "")
    if not world.lost:
        yield "the source reports", world._replace(move=msgspec.structs.replace(move, **values))
    if not world.dead and world.target:
        state = {"ran": "stopped" if move.off else "running", "never": "failed"}.get(world.target, world.target)
        told: dict[str, object] = {"destination": DESTINATION} if state == "listening" else {}
        if world.target == "ran" and move.terms.post_copy:
            told["pull"] = Pull(state="coming" if world.comes else "whole")
        yield "the target reports", world._replace(move=msgspec.structs.replace(move, target_state=state, **told))
        if state == "listening" and move.phase != "meeting":
            # Its agent could not look after it for a while; it has promised nothing.
            yield "the target is out of breath", world._replace(move=msgspec.structs.replace(move, target_state="failed"))
    silent = "the target is silent" if world.dead else "the source is silent" if world.lost else ""
    # Time is over in which the last word is waited for, or it is not.
    for now in (0.0, 100.0):
        following = transit.turn(move, Owner(
            role=world.role, silent=silent, fenced=world.fenced, target_fenced=world.dead), now)
        if following.phase != move.phase:
            yield f"{move.phase} to {following.phase}", world._replace(move=msgspec.structs.replace(
                move, phase=following.phase, called_off=move.called_off or following.reason))


def source(world: World) -> Iterator[tuple[str, World]]:
    held = world.source
    if world.lost:
        return
    wanted = transit.at_source(guest(world.role), world.move)
    if world.move.phase == "clearing" or not held.gone:
        assert wanted.role != "gone" or wanted.leaves_disks == world.pooled, "the target has its disks"
        yield from ((f"the source is told {wanted.role}", world._replace(source=one))
                    for one in told(held, wanted, world.move.off))
    if held.phase == "moving":
        yield "it fails to go", world._replace(source=held._replace(phase="failed"))
        if world.target == "listening" and not world.dead:
            yield "all of it is there", world._replace(source=held._replace(phase="sent", runs=False), whole=True)
    if held.phase == "sent" and not held.heard and not world.dead:
        # Its word to the target, and the answer.
        if world.target == "listening":
            yield "the target is told to run, the answer is lost", world._replace(
                target="ran", comes=world.move.terms.post_copy)
        if world.target == "ran" and world.comes:
            yield "all of its memory has come", world._replace(comes=False)
        elif world.target == "ran":
            yield "the target says that it runs", world._replace(source=held._replace(heard=True))
        if world.target == "never":
            yield "the target says never", world._replace(source=held._replace(phase="failed", runs=True))


def told(held: Source, wanted: Guest, off: bool) -> Iterator[Source]:
    if wanted.role == "gone":
        yield Source(runs=False, gone=True)
        return
    if wanted.sending is not None:
        assert wanted.role == ("stop" if off else "send")
        if held.phase == "" and held.runs:
            yield held._replace(phase="ready")
        if held.phase == "ready" and wanted.sending.destination is not None:
            yield held._replace(phase="moving")
        return
    plain = Source(runs=off or wanted.role == "run")
    if held.phase == "sent":
        if wanted.lost == "b":
            yield plain
    elif held.phase == "moving" or held != plain:
        yield plain  # called off before it was through


def target(world: World) -> Iterator[tuple[str, World]]:
    if world.dead:
        return
    wanted = transit.at_target(guest(world.role), world.move)
    if wanted is not None:
        match wanted.role, world.target:
            case "receive", "":
                yield "the target makes room", world._replace(target="listening")
                yield "the target cannot", world._replace(target="never")
            case "run" | "stop", "listening":
                # One that the source had not sent whole cannot begin, and says so; of one that is off nobody can tell.
                assert wanted.receiving is not None
                whole = wanted.receiving.whole or (world.whole and not world.move.off)
                yield "the target's document says that it is its own", world._replace(
                    target="ran" if whole else "never", comes=whole and world.move.terms.post_copy)
            case "gone", "" | "listening" | "never" | "ran":
                assert wanted.leaves_disks == world.pooled, "the source has its disks"
                yield "the target lets it go", world._replace(target="gone")
    if world.target == "listening":
        yield "the target's process dies", world._replace(target="never")
    if world.comes and world.lost:
        yield "it starts from its disk", world._replace(comes=False)


def explored(owners: bool, off: bool = False, pooled: bool = False, after: bool = False) -> tuple[
        dict[World, tuple[World | None, str]], dict[World, list[World]]]:
    first = World(Source(), "", Move(id="b", instance_id="i", guest="a", source="x", target="y", phase="meeting",
                                     phase_at=0.0, terms=Terms(off=off, post_copy=after)), "stop" if off else "run", pooled)
    came: dict[World, tuple[World | None, str]] = {first: (None, "it begins")}
    ways: dict[World, list[World]] = {}
    ahead = deque((first,))
    while ahead:
        world = ahead.popleft()
        ways[world] = []
        for name, after in follows(world, owners):
            if after != world:
                ways[world].append(after)
                if after not in came:
                    came[after] = (world, name)
                    ahead.append(after)
    return came, ways


def story(came: dict[World, tuple[World | None, str]], world: World) -> str:
    names = []
    at: World | None = world
    while at is not None:
        at, name = came[at]
        names.append(name)
    return " > ".join(reversed(names)) + f": {world}"


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("off", "after"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("owners", [False, True])
def test_whatever_happens_it_runs_once_and_comes_to_rest(owners: bool, off: bool, after: bool, pooled: bool) -> None:
    came, ways = explored(owners, off, pooled, after)
    assert len(came) > 200
    for world in came:
        runs_there = world.target == "ran" and not world.dead
        assert not (world.source.runs and runs_there), f"it runs twice: {story(came, world)}"
        if world.source.gone:
            assert world.target == "ran", f"nothing is left of it: {story(came, world)}"
            assert not world.comes or world.dead, f"what it needs of its memory is gone: {story(came, world)}"
        if world.target == "gone":
            assert not world.source.gone
        assert (world.move.phase, world.target) != ("failed", "ran"), f"what it wrote there is lost: {story(came, world)}"
    # From wherever it is, it can come to a place where all is settled, and there one of the two has it.
    backwards: dict[World, list[World]] = {}
    for world, afters in ways.items():
        for after in afters:
            backwards.setdefault(after, []).append(world)
    rest = [world for world in came if transit.settled(world.move)]
    for world in rest:
        ours = world.source.runs or ((world.role != world.move.rest or world.lost) and not world.source.gone)
        assert ours != (world.target == "ran"), f"settled, and it is not at one of the two: {story(came, world)}"
        if world.move.phase == "failed" and not world.dead:
            assert world.target in ("", "gone"), f"something of it is left: {story(came, world)}"
    # A host that is off for good lets nothing go: what is left of the attempt there waits for it.
    rest += [world for world in came if world.lost and world.move.phase == "clearing" and world.target == "ran"]
    reached, ahead = set(rest), deque(rest)
    while ahead:
        for before in backwards.get(ahead.popleft(), ()):
            if before not in reached:
                reached.add(before)
                ahead.append(before)
    stuck = [world for world in came if world not in reached and not world.dead]
    assert not stuck, f"there is no way on: {story(came, stuck[0])}"


def test_a_source_that_has_it_outweighs_a_target_that_claims_to() -> None:
    move = Move(id="b", instance_id="i", guest="a", source="x", target="y", phase="going", phase_at=0.0, terms=Terms(),
                passport=PASSPORT, target_state="running")
    owner, later = Owner(role="run"), 2 * transit.LAST_WORD_SECONDS

    def after(phase: transit.Phase, state: str, owner: Owner = owner) -> str:
        return transit.turn(msgspec.structs.replace(move, phase=phase, progress=Progress(
            guest="b", state=state)), owner, later).phase  # type: ignore[arg-type]

    assert after("going", "copying") == "landed", "its word may come later than the target's"
    assert after("going", "failed") == "failed"
    assert after("landed", "failed") == after("landed", "copying") == "landed", "nothing is cleared away there"
    assert after("landed", "copying", Owner(role="run", silent="x is away")) == "clearing"
    assert after("landed", "failed", Owner(role="run", fenced=True)) == "clearing"
    assert after("landed", "sent") == "clearing"


def test_every_phase_is_come_to() -> None:
    came, _ = explored(True)
    assert {world.move.phase for world in came} == {*transit.BEFORE, "landed", "clearing"}
