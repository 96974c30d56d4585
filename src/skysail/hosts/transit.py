"""A guest between two hosts: what each of them is told, and what follows from what they say (see docs/decisions/0041).

An attempt to move a guest has a row of its own for as long as it is not settled. Its guest's row names the host that the
guest is at: the source, and from the moment on in which the guest has gone over the target, under the attempt's id. So there
is one row of the guest at any time, and the attempt's row stands for the other end.

A guest that is off goes by the same phases, and is stopped at both ends: what is said of running below is said of being
there. Where its disks are in a pool, both ends have the same ones, and neither lets them go but as the guest's last place.

Pure: rows in, words of documents and the next phase out. A phase is what both documents say; it changes only by what a host
reported, or by its owner's or the operator's wish, so that whoever reads the rows after a crash goes on from there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec
from sqlalchemy import RowMapping

from skysail.contract.document import Guest, Volume
from skysail.contract.migration import SYSTEM_DISK, Destination, Passport, Progress, Pull, Receiving, Sending, Terms

# meeting    the source shall say who its guest is
# building   the target shall make a process for it
# going      the source knows where to: it goes
# ending     it is called off, and may have gone already
# owed       the source has handed it over, and cannot tell the target so: its document does. Or the source is off for
#            certain, and nobody knows whether it had: the target runs it if it has all of it
# returning  the target never will run it, and the source cannot be told so by the target: its document does, once the target
#            has let everything go
# landed     it runs at the target; the source may still tell how it went, and by post-copy has some of its memory
# clearing   what is left of it at the source goes
# failed     it is at the source, and what was made of it at the target goes
Phase = Literal["meeting", "building", "going", "ending", "owed", "returning", "landed", "clearing", "failed"]
# In these the guest's row is at the source, and in these an attempt counts among those that are under way.
BEFORE: tuple[Phase, ...] = ("meeting", "building", "going", "ending", "owed", "returning", "failed")
UNDER_WAY: tuple[Phase, ...] = ("meeting", "building", "going", "ending", "owed", "returning")
# What a target says of a guest whose process has ended.
ENDED = ("stopped", "halted", "crashed", "failed", "gone")
# So long the source is waited for to tell how it went, once the guest runs at the target.
LAST_WORD_SECONDS = 30.0


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. ``guest`` is what its guest is called at the source. ``progress`` is the source's last word on this
    attempt, None where its last report has none. ``called_off``: why nobody wants it any more. ``lost``: the operator vouches
    that nothing runs at the target. ``remains``: block storage whose copy at the source is still there. ``pull`` is the
    target's last word on memory that comes after its guest. ``phase_at`` is when its phase began."""

    id: str
    instance_id: str
    guest: str
    source: str
    target: str
    phase: Phase
    phase_at: float
    terms: Terms
    passport: Passport | None = None
    destination: Destination | None = None
    progress: Progress | None = None
    source_state: str = ""
    target_state: str = ""
    target_reason: str = ""
    balance_seconds: float | None = None
    called_off: str = ""
    lost: bool = False
    remains: tuple[str, ...] = ()
    pull: Pull | None = None

    @classmethod
    def of(cls, row: RowMapping) -> Move:
        """The attempt of a row of ``moves``."""
        return msgspec.convert({name: row[name] for name in cls.__struct_fields__ if row[name] is not None}, cls)

    @property
    def before(self) -> bool:
        """Whether the guest's row is at the source."""
        return self.phase in BEFORE

    @property
    def off(self) -> bool:
        """Whether it goes without running."""
        return self.terms.off

    @property
    def rest(self) -> str:
        """The role of its guest that is at rest at one of the ends, as long as nobody wants it otherwise."""
        return "stop" if self.off else "run"

    @property
    def shared(self) -> bool:
        """Whether its disks are where both hosts see them; not known before the source has said who it is."""
        return self.passport is not None and bool(self.passport.pool)

    @property
    def come(self) -> bool:
        """Whether the target has said that it has it."""
        return self.target_state == "running" or (self.off and self.target_state == "stopped")

    @property
    def pulls(self) -> bool:
        """Whether it runs at the target, and needs what its source has of its memory."""
        over = self.heard or self.target_state in ENDED or (self.pull is not None and self.pull.state != "coming")
        return self.terms.post_copy and not over

    @property
    def disks(self) -> frozenset[str]:
        """The block storage that goes along; none before the source has said."""
        found = self.passport.disks if self.passport is not None else ()
        return frozenset(disk.volume for disk in found if disk.name != SYSTEM_DISK)

    @property
    def heard(self) -> bool:
        """Whether the source has said its last word on a guest that went."""
        return self.progress is not None and self.progress.state == "sent" and not self.progress.reason


# --- what documents say


def at_source(guest: Guest, move: Move) -> Guest:
    """The guest in the document of the source. ``guest`` is as its row says, in the role that its owner wants."""
    guest = _called(guest, move, move.guest)
    sending = msgspec.structs.replace(guest, role="stop" if move.off else "send",
                                      sending=Sending(guest=move.id, terms=move.terms))
    # One that its owner stops, starts or deletes stays what it is told to be, unless it is the target's already.
    wants = guest.role == move.rest
    match move.phase:
        case "meeting" | "building" if wants:
            return sending
        case "going" | "owed" if wants or move.phase == "owed":
            return _to(sending, move)
        case "returning":
            lost = move.lost or move.target_state == "gone"
            return msgspec.structs.replace(guest, lost=move.id) if lost else _to(sending, move)
        case "landed":
            return _to(sending, move)
        case "clearing":
            return msgspec.structs.replace(guest, role="gone", force=True, leaves_disks=move.shared)
    return guest


def at_target(guest: Guest, move: Move) -> Guest | None:
    """The guest in the document of the target; None where there is nothing to say of it but what its row does."""
    guest = _called(guest, move, move.id)
    if move.passport is None or move.phase == "meeting":
        return None
    coming = msgspec.structs.replace(guest, receiving=Receiving(
        passport=move.passport, terms=move.terms, balance_seconds=move.balance_seconds,
        whole=move.phase == "landed" or (move.progress is not None and move.progress.state == "sent")))
    if move.phase == "landed":
        return coming
    # Until it has gone over its addresses are at the source; the target's agent announces them by itself when it runs.
    awaited = msgspec.structs.replace(coming, port=msgspec.structs.replace(coming.port, awaited=True))
    match move.phase:
        case "building" | "going" | "ending":
            return msgspec.structs.replace(awaited, role="receive")
        case "owed":
            return msgspec.structs.replace(awaited, role="stop" if move.off else "run")
        case "clearing":
            return None  # it is a guest like any other
    return msgspec.structs.replace(guest, role="gone", force=True, leaves_disks=move.shared)


def _to(sending: Guest, move: Move) -> Guest:
    return msgspec.structs.replace(sending, sending=Sending(guest=move.id, destination=move.destination, terms=move.terms))


def _called(guest: Guest, move: Move, identifier: str) -> Guest:
    """The same guest by the name that it has on one of the hosts: its port is called as it is, and so is its system disk
    where each of the two has its own."""
    if identifier == guest.id:
        return guest
    volume = guest.volume if move.shared else Volume(
        id=identifier, image=guest.volume.image, size_gib=guest.volume.size_gib)
    return msgspec.structs.replace(guest, id=identifier, volume=volume,
                                   port=msgspec.structs.replace(guest.port, id=identifier))


# --- what follows


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """What the other rows say of a guest that moves: the ``role`` that its owner wants, the ``disks`` that are attached to
    it, and, in words, why one of the two hosts cannot be reckoned with (``silent``). ``fenced``: the source's host is off for
    certain, and has not been heard since; ``target_fenced``: the target's is."""

    role: str
    disks: Collection[str] = ()
    silent: str = ""
    fenced: bool = False
    target_fenced: bool = False


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The phase that follows, and why it is not the way on; '' where it is."""

    phase: Phase
    reason: str = ""


def turn(move: Move, owner: Owner, now: float) -> Turn:
    """What follows from what both hosts said last; the present phase while there is to wait."""
    stay = Turn(phase=move.phase)
    if move.before and move.phase != "failed" and owner.role == "gone":
        # Nobody wants it anywhere: both hosts are told so.
        return Turn(phase="failed", reason="its owner deletes it")
    said = move.progress.state if move.progress is not None else ""
    reason = move.progress.reason if move.progress is not None else ""
    match move.phase:
        case "meeting" | "building":
            if hindrance := _hindrance(move, owner) or owner.silent:
                # The source does not know where to: nothing has begun.
                return Turn(phase="failed", reason=hindrance)
            if move.phase == "meeting":
                return Turn(phase="building") if move.passport is not None else stay
            if move.target_state == "failed":
                return Turn(phase="failed", reason=f"{move.target} cannot take it in: {move.target_reason}")
            return Turn(phase="going") if move.destination is not None else stay
        case "going" | "ending":
            # A source that has it and says so outweighs a target that claims to.
            if move.heard or (move.come and said != "failed"):
                return Turn(phase="landed")
            if said == "sent":
                return Turn(phase="owed")
            if said == "failed":
                return Turn(phase="failed", reason=move.called_off or reason)
            if owner.fenced:
                # It may have handed it over in its last moment. Whoever has all of it runs it.
                return Turn(phase="owed", reason=f"{move.source} has failed")
            if move.phase == "ending":
                # Only a source that has put the attempt away says nothing of it any more.
                return Turn(phase="failed", reason=move.called_off) if said == "" and move.source_state else stay
            hindrance = _hindrance(move, owner)
            return Turn(phase="ending", reason=hindrance) if hindrance else stay
        case "owed":
            if move.heard or move.come:
                return Turn(phase="landed")
            if said == "failed":
                return Turn(phase="failed", reason=reason)
            if move.lost or move.target_state in ("failed", "gone"):
                return Turn(phase="returning", reason=move.target_reason or f"{move.target} is lost")
        case "returning":
            over = move.lost or move.target_state == "gone"
            if said == "failed" or (over and (owner.fenced or (said == "" and move.source_state))):
                return Turn(phase="failed", reason=move.called_off or reason)
        case "landed":
            # One whose memory still comes would end with its source. How long that may take, the target knows.
            needed = move.pulls and not owner.target_fenced
            # Nor is anything cleared away at a source that says that it has the guest: a target that was wrong about
            # it, or lied, has nothing whole.
            needed = needed or (not owner.fenced and (said == "failed" or (said == "copying" and not owner.silent)))
            if move.heard or (not needed and now - move.phase_at > LAST_WORD_SECONDS):
                return Turn(phase="clearing")
    return stay


def settled(move: Move) -> bool:
    """Whether nothing is left of an attempt that is over: its row may go."""
    if move.phase == "failed":
        # Before the source has said who it is, the target was told nothing.
        return move.passport is None or move.target_state == "gone"
    return move.phase == "clearing" and move.source_state == "gone" and not move.remains


def _hindrance(move: Move, owner: Owner) -> str:
    """Why it shall not go on; '' while nothing keeps it from that."""
    if move.called_off:
        return move.called_off
    if owner.role != move.rest:
        return "its owner starts it" if move.off else "its owner stops it"
    if move.passport is not None and move.disks != frozenset(owner.disks):
        return "its owner attached a disk, or detached one"
    return ""
