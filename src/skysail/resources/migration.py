"""Instances that go to another host, while they run or while they are stopped: the operator's work, of which their owners
notice nothing.

The operation is of no region, so that no customer lists it. Its workflow walks through the phases of
:mod:`skysail.hosts.transit`; its arguments say where from, where to and why there, and in the end how it went. Until the
guest has gone over, whatever fails leaves it at its source; from then on there is nothing to undo.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, or_, select, update

from skysail.contract.facts import HostFacts
from skysail.contract.migration import SINCE, Progress, Terms
from skysail.hosts import desired, outages, placement, qualification, transit
from skysail.hosts.placement import Candidate, Need, Verdict
from skysail.hosts.transit import Move, Owner, Phase
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.operations import history
from skysail.operations.workflow import Step, StepAction, StepFailed, Workflow
from skysail.resources import attachments, metering, placing
from skysail.store.schema import accounts, disks, guests, hosts, instances, moves, operations, remains, snapshots

WORKFLOW = "migrate"
# A host that has been away for so long is not waited for. An agent that is upgraded is back before that.
SILENT_SECONDS = 60.0
CODE = "MigrationFailed"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a migration went. ``seconds`` are from the moment that it was its turn; ``memory_bytes`` and ``disk_bytes``
    went over. ``rounds``: how often the memory was gone through. ``gap_ms`` is from the guest's stop at the source until it
    ran at the target, by the source's clock; ``pause_ms`` QEMU's own count, or the gap of one that stood still for its memory
    to go; ``outside_ms`` the longest time in which its address did not answer a probe, ``broken`` whether the probe's
    connection broke, where there was a probe. ``post_copy``: it ran at the target before all of its memory was there; ``cut``
    is why the rest never came, and it was started from its disk there."""

    seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    rounds: int = 0
    pause_ms: float = 0.0
    gap_ms: float = 0.0
    slowed_percent: int = 0
    outside_ms: float | None = None
    broken: bool | None = None
    post_copy: bool = False
    cut: str = ""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """A migration as its operator sees it. ``phase`` is '' while it waits for its turn, ``why`` says why it goes there. One
    that is ``off`` goes while it is stopped."""

    id: str
    instance: str
    region: str
    state: Literal["waiting", "under way", "succeeded", "failed"]
    phase: str = ""
    source: str = ""
    target: str = ""
    why: str = ""
    percent: int = 0
    error: str = ""
    asked_at: float = 0.0
    off: bool = False
    report: Report = Report()


class _Operator(NamedTuple):
    """Who asks for what concerns one account's instance, in no region."""

    account_id: str
    region: str = ""


def begin(connection: Connection, instance: RowMapping, now: float, to: str, terms: Terms, force: bool = False) -> str:
    """Move the instance to another host, to the host ``to`` unless that is ''; the operation's id. With ``force`` also to a
    version of QEMU that nobody has tried, or that did not do. Raises SkysailError where that makes no sense."""
    if instance["state"] not in ("running", "stopped"):
        raise SkysailError(f"the instance {instance['name']} is {instance['state']}",
                           "only one that is running or stopped moves")
    off = instance["state"] == "stopped"
    terms = msgspec.structs.replace(terms, off=off, post_copy=terms.post_copy and not off)
    if to and connection.execute(select(hosts.c.id).where(hosts.c.id == to)).first() is None:
        raise SkysailError(f"there is no host {to}", "see: sudo ./skysail host list")
    if find_open(connection, instance["id"]) is not None:
        raise SkysailError(f"the instance {instance['name']} moves already", "see: sudo ./skysail migrations")
    at = connection.execute(select(guests.c.host_id).where(guests.c.instance_id == instance["id"])).scalar_one()
    if at == to:
        raise SkysailError(f"the instance {instance['name']} is on {to} already")
    made = history.record(
        connection, _Operator(instance["account_id"]), now=now, type="MigrateInstance", resource_name=instance["name"],
        resource_type="Instance", resource_id=instance["id"], status="Started", workflow=WORKFLOW,
        arguments={"to": to, "terms": msgspec.to_builtins(terms), "source": at, "region": instance["region"],
                   "force": force})
    return str(made["id"])


def find_instance(connection: Connection, name: str, region: str, account: str) -> RowMapping:
    """The row of an instance; raises SkysailError."""
    row = connection.execute(select(instances).join(accounts, accounts.c.id == instances.c.account_id).where(
        instances.c.name == name, instances.c.region == region, accounts.c.name == account)).mappings().first()
    if row is None:
        raise SkysailError(f"there is no instance {name} of {account} in {region}", "see: sudo ./skysail list")
    return row


def find_open(connection: Connection, instance_id: str) -> RowMapping | None:
    """The operation that moves the instance, if one is not over."""
    return connection.execute(_open().where(operations.c.resource_id == instance_id)).mappings().first()


def call_off(connection: Connection, instance: RowMapping, reason: str) -> None:
    """Leave the instance where it is, unless it has gone already. Raises SkysailError where it does not move."""
    operation = find_open(connection, instance["id"])
    if operation is None:
        raise SkysailError(f"the instance {instance['name']} does not move")
    _note(connection, operation["id"], called_off=reason)
    connection.execute(update(moves).where(moves.c.operation_id == operation["id"], moves.c.called_off == "")
                       .values(called_off=reason))


def give_up_target(connection: Connection, instance: RowMapping) -> None:
    """The operator vouches that nothing of the instance runs at the host that it was handed over to, and never will: it goes
    on where it stood. Raises SkysailError where it was not handed over."""
    row = connection.execute(select(moves).where(
        moves.c.instance_id == instance["id"], moves.c.phase.in_(("owed", "returning")))).mappings().first()
    if row is None:
        raise SkysailError(f"the instance {instance['name']} is not between two hosts",
                           "see: sudo ./skysail migrations")
    connection.execute(update(moves).where(moves.c.id == row["id"]).values(lost=True))
    desired.bump(connection, row["source"])  # it is what the source's document says, and may have its phase already


def seen(connection: Connection, wanted: Collection[str] = ()) -> list[Migration]:
    """Migrations, the newest first: those ``wanted``, else all of which an operation is kept."""
    found = select(operations).where(operations.c.workflow == WORKFLOW, operations.c.region == "",
                                     operations.c.account_id.in_(select(accounts.c.id)))
    if wanted:
        found = found.where(operations.c.id.in_(wanted))
    rows = connection.execute(found.order_by(operations.c.created_at.desc(), operations.c.id)).mappings().all()
    under_way = {move["operation_id"]: move for move in connection.execute(
        select(moves).where(moves.c.operation_id.in_([row["id"] for row in rows]))).mappings()}
    return [_migration(row, under_way.get(row["id"])) for row in rows]


def _migration(operation: RowMapping, move: RowMapping | None) -> Migration:
    told = operation["arguments"]
    over = operation["status"] in ("Succeeded", "Failed")
    progress = msgspec.convert(move["progress"], Progress | None) if move is not None else None
    return Migration(
        id=operation["id"], instance=operation["resource_name"], region=told["region"], source=told["source"],
        target=told.get("target", ""), why=told.get("why", ""), asked_at=operation["created_at"],
        off=told["terms"].get("off", False),
        state=("succeeded" if operation["status"] == "Succeeded" else "failed") if over
        else "under way" if move is not None else "waiting",
        phase=move["phase"] if move is not None and not over else "", error=operation["error_details"] or "",
        percent=100 if operation["status"] == "Succeeded" else progress.percent if progress is not None else 0,
        report=msgspec.convert(told["report"], Report) if "report" in told
        else _report(progress, 0.0) if progress is not None else Report())


def note_outside(connection: Connection, operation_id: str, outside_ms: float, broken: bool) -> None:
    """Keep with the operation what a probe saw of its pause."""
    told = history.find(connection, operation_id)["arguments"]
    report = msgspec.convert(told.get("report", {}), Report)
    _note(connection, operation_id, report=msgspec.to_builtins(
        msgspec.structs.replace(report, outside_ms=outside_ms, broken=broken)))


def sweep(connection: Connection) -> int:
    """Forget attempts of which nothing is left; how many."""
    over = [move for row in connection.execute(select(moves).where(moves.c.phase.in_(("failed", "clearing")))).mappings()
            if transit.settled(move := Move.of(row))]
    for move in over:
        desired.bump(connection, move.source)
        connection.execute(delete(moves).where(moves.c.id == move.id))
    return len(over)


# --- behind the operation


def workflow(config: Config) -> Workflow:
    """The steps of a migration, in a cloud of this configuration."""
    return Workflow(WORKFLOW, (
        Step("find a host", partial(_find_host, config), _give_up),
        Step("learn who it is", _until("building", "going", "landed", "clearing"), _give_up),
        Step("make room", _until("going", "landed", "clearing"), _give_up),
        Step("go over", _until("landed", "clearing"), _give_up),
        Step("tell how it went", _until("clearing"))))


def _find_host(config: Config, connection: Connection, operation: RowMapping, now: float) -> bool:
    """Its turn has come, and a host is found that takes it in."""
    told = operation["arguments"]
    off = told["terms"].get("off", False)
    if told.get("called_off"):
        raise StepFailed(CODE, told["called_off"])
    guest = _guest(connection, operation["resource_id"])
    if guest is None or guest["role"] != ("stop" if off else "run"):
        raise StepFailed(CODE, "it is not stopped any more" if off else "it does not run any more")
    if guest["host_id"] == told["to"]:
        raise StepFailed(CODE, f"it is on {told['to']} already")
    every = [Move.of(row) for row in connection.execute(select(moves)).mappings()]
    own = [move for move in every if move.instance_id == operation["resource_id"]]
    busy = Counter(host for move in every if move.phase in transit.UNDER_WAY for host in (move.source, move.target))
    if (guest["observed_state"] != ("stopped" if off else "running") or guest["observed_reboots"] < guest["reboots"]
            or busy[guest["host_id"]] >= config.migrations_per_host
            or any(move.phase not in ("failed", "clearing") for move in own) or _is_copied(connection, guest)):
        return False
    # Where something of a former attempt is left, there is no room for another one of the same disks.
    stained = {move.target if move.phase == "failed" else move.source for move in own}
    if told["to"] in stained:
        return False
    post_copy = bool(told["terms"].get("post_copy"))
    if not _able(connection, guest["host_id"], post_copy):
        raise StepFailed(CODE, f"the agent of {guest['host_id']} is too old to let it go{' by post-copy' * post_copy}")
    fit = _verdicts(config, connection, guest, told["to"], off, now, bool(told.get("force")), post_copy)
    if all(one.refusals for one in fit):
        raise StepFailed(CODE, "no host can take it in: " + ("; ".join(
            f"{one.host} {', '.join(one.refusals)}" for one in fit) or "there is no other one"))
    free = [one for one in fit if not one.refusals and one.host not in stained
            and busy[one.host] < config.migrations_per_host]
    if not free:
        return False
    target = free[0].host
    identifier = "g-" + secrets.token_hex(5)
    connection.execute(insert(moves).values(
        id=identifier, operation_id=operation["id"], instance_id=operation["resource_id"], guest=guest["id"],
        source=guest["host_id"], target=target, phase="meeting", phase_at=now, terms=told["terms"]))
    desired.bump(connection, guest["host_id"])
    _note(connection, operation["id"], source=guest["host_id"], target=target, attempt=identifier, began=now,
          why=_why(target, fit, told["to"], set(stained) | {one for one, count in busy.items()
                                                            if count >= config.migrations_per_host}))
    return True


def _verdicts(config: Config, connection: Connection, guest: RowMapping, to: str, off: bool, now: float,
              force: bool, post_copy: bool) -> list[Verdict]:
    """Every host that it could go to, or ``to`` alone. One that is ``off`` starts there as what that host makes of it."""
    found = placing.candidates(connection, config, guest["account_id"], now, without=[guest["id"]], bound=True)
    here = connection.execute(select(hosts.c.facts, hosts.c.pool).where(hosts.c.id == guest["host_id"])).one()
    facts = msgspec.convert(here.facts, HostFacts | None) if not off else None
    # In a pool its disks take no more room than they do.
    more = 0 if here.pool else guest["disk_gib"] + _attached_gib(connection, guest["instance_id"])
    instance = connection.execute(select(instances).where(instances.c.id == guest["instance_id"])).mappings().one()
    others: Sequence[Candidate] = [one for one in found if one.id != guest["host_id"] and to in ("", one.id)]
    judged = placement.judge(others, Need(
        zone=instance["region"] + instance["zone"], blueprint="", vcpus=guest["vcpus"], memory_mib=guest["memory_mib"],
        disk_gib=more, pool=here.pool, accelerator=facts.accelerator if facts else "",
        cpu_model=facts.guest_cpu if facts else "", machine_type=facts.guest_machine if facts else ""))
    left = set(connection.execute(select(remains.c.host_id).where(remains.c.instance_id == instance["id"])).scalars())

    def hindrances(host: str) -> Iterator[str]:
        there = msgspec.convert(connection.execute(select(hosts.c.facts).where(hosts.c.id == host)).scalar_one(),
                                HostFacts | None)
        if there is None or there.contract < SINCE:
            yield "has an agent that is too old to take it in"
        elif facts is not None and not force and (odd := qualification.lacking(
                connection, guest["observed_qemu"] or facts.qemu, there.qemu, facts.guest_machine, facts.accelerator)):
            yield odd
        if post_copy and there is not None and (why := _SILENT if there.no_post_copy is None else there.no_post_copy):
            yield f"cannot take it in so ({why})"
        if host in left:
            yield "still has what is left of it since it failed"

    return sorted((Verdict(host=one.host, refusals=(*one.refusals, *hindrances(one.host))) for one in judged),
                  key=lambda one: bool(one.refusals))


_SILENT = "its agent knows nothing of post-copy"


def _able(connection: Connection, host_id: str, post_copy: bool) -> bool:
    """Whether the host's agent understands documents with guests that move."""
    facts = connection.execute(select(hosts.c.facts).where(hosts.c.id == host_id)).scalar_one()
    return facts is not None and facts["contract"] >= SINCE and (not post_copy or facts.get("no_post_copy") is not None)


def _why(target: str, fit: Sequence[Verdict], to: str, passed: Collection[str]) -> str:
    """In words, why it is this host."""
    if to:
        return "its operator wants it there"
    others = [f"{one.host} {', '.join(one.refusals)}" if one.refusals else f"{one.host} has others coming or going"
              for one in fit if one.host != target and (one.refusals or one.host in passed)]
    rest = [one.host for one in fit if one.host != target and not one.refusals and one.host not in passed]
    if rest:
        others.append(f"{', '.join(rest)} would have come after it")
    return "; ".join(others) or "there is no other one"


def _until(*through: Phase) -> StepAction:
    """The step that is through in one of these phases."""
    def step(connection: Connection, operation: RowMapping, now: float) -> bool:
        move = _move(connection, operation)
        following = transit.turn(move, _owner(connection, move, now), now)
        if following.phase == "failed":
            raise StepFailed(CODE, following.reason or "it did not go over")
        if following.phase != move.phase:
            _enter(connection, move, following, now)
        if following.phase == "clearing":
            _keep_report(connection, operation, move, now)
        return following.phase in through
    return step


def _enter(connection: Connection, move: Move, following: transit.Turn, now: float) -> None:
    """Let the documents of both hosts say the next phase."""
    values: dict[str, Any] = {"phase": following.phase, "phase_at": now}
    if following.reason and not move.called_off:
        values["called_off"] = following.reason
    if following.phase == "building":
        values["balance_seconds"] = _balance(connection, move, now)
    if following.phase == "landed":
        _land(connection, move)
        values["remains"] = [] if move.shared else sorted(move.disks)
    connection.execute(update(moves).where(moves.c.id == move.id).values(**values))
    desired.bump(connection, move.source)


def _land(connection: Connection, move: Move) -> None:
    """It is the target's: its rows say so, and whatever was asked of it, and has not been done, is asked of it there. A copy
    of a disk stands on nothing; one in a pool is what it was, under its former name."""
    seen: dict[str, Any] = {"observed_state": move.target_state} if move.come else {}
    alone: dict[str, Any] = {} if move.shared else {"origin": None}
    guest = _guest(connection, move.instance_id)
    if guest is not None:
        volume = (guest["volume"] or guest["id"]) if move.shared else ""
        connection.execute(update(guests).where(guests.c.instance_id == move.instance_id).values(
            id=move.id, host_id=move.target, volume=volume, observed_qemu="", **alone, **seen))
    connection.execute(update(disks).where(disks.c.id.in_(move.disks)).values(host_id=move.target, **alone))
    for row in connection.execute(select(operations).where(
            operations.c.done.is_(False), operations.c.arguments["guest"].as_string() == move.guest)).mappings().all():
        _note(connection, row["id"], guest=move.id)
    for row in connection.execute(select(snapshots).where(
            snapshots.c.guest_id == move.guest, snapshots.c.host_id == move.source)).mappings().all():
        if desired.waits(row):
            connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(
                host_id=move.target, guest_id=move.id, volumes=row["volumes"] if move.shared else [
                    volume | {"origin": None} | ({"id": move.id} if volume["id"] == move.guest else {})
                    for volume in row["volumes"]]))


def _give_up(connection: Connection, operation: RowMapping, now: float) -> None:
    """It stays where it is; what was made of it at the target goes."""
    row = connection.execute(select(moves).where(moves.c.operation_id == operation["id"])).mappings().first()
    if row is not None and row["phase"] != "failed":
        move = Move.of(row)
        connection.execute(update(moves).where(moves.c.id == move.id).values(phase="failed", phase_at=now))
        desired.bump(connection, move.source)
        _keep_report(connection, operation, move, now)


def _keep_report(connection: Connection, operation: RowMapping, move: Move, now: float) -> None:
    report = _report(move.progress, now - operation["arguments"].get("began", now))
    if move.pull is not None:
        # The target knows it also where its source cannot say any more how it went.
        report = msgspec.structs.replace(report, cut=report.cut or move.pull.reason,
                                         post_copy=report.post_copy or move.pull.state != "whole")
    _note(connection, operation["id"], report=msgspec.to_builtins(report))


def _report(progress: Progress | None, seconds: float) -> Report:
    if progress is None:
        return Report(seconds=round(seconds, 3))
    return Report(seconds=round(seconds or progress.seconds, 3), memory_bytes=progress.memory_bytes,
                  disk_bytes=progress.disk_bytes, rounds=progress.rounds, pause_ms=progress.pause_ms, gap_ms=progress.gap_ms,
                  slowed_percent=progress.slowed_percent, post_copy=progress.post_copy, cut=progress.cut)


# --- rows


def _open() -> Any:
    return select(operations).where(operations.c.workflow == WORKFLOW, operations.c.done.is_(False))


def _guest(connection: Connection, instance_id: str) -> RowMapping | None:
    return connection.execute(select(guests).where(guests.c.instance_id == instance_id)).mappings().first()


def _move(connection: Connection, operation: RowMapping) -> Move:
    return Move.of(connection.execute(select(moves).where(moves.c.operation_id == operation["id"])).mappings().one())


def _owner(connection: Connection, move: Move, now: float) -> Owner:
    guest = _guest(connection, move.instance_id)
    attached = connection.execute(select(disks.c.id).where(disks.c.instance_id == move.instance_id)).scalars().all()
    silent, fenced = "", outages.is_fenced(connection, move.source)
    target_fenced = outages.is_fenced(connection, move.target)
    for row in connection.execute(select(hosts).where(or_(hosts.c.id == move.source, hosts.c.id == move.target))).mappings():
        if row["refused"]:
            silent = f"{row['id']} is not spoken with ({row['refused']})"
        elif row["away_since"] is not None and now - row["away_since"] > SILENT_SECONDS:
            silent = f"{row['id']} has not answered for {now - row['away_since']:.0f} s"
    return Owner(role=guest["role"] if guest is not None else "gone", disks=frozenset(attached), silent=silent,
                 fenced=fenced, target_fenced=target_fenced)


def _note(connection: Connection, operation_id: str, **more: Any) -> None:
    """Keep more in the operation's arguments."""
    told = connection.execute(select(operations.c.arguments).where(operations.c.id == operation_id)).scalar_one()
    connection.execute(update(operations).where(operations.c.id == operation_id).values(arguments=told | more))


def _is_copied(connection: Connection, guest: RowMapping) -> bool:
    """Whether a snapshot of its disks is being made, which would be lost."""
    return connection.execute(attachments.being_copied().where(snapshots.c.guest_id == guest["id"])).first() is not None


def _attached_gib(connection: Connection, instance_id: str) -> int:
    return sum(connection.execute(select(disks.c.size_gib).where(disks.c.instance_id == instance_id)).scalars())


def _balance(connection: Connection, move: Move, now: float) -> float | None:
    """The processor credits that it has; None for a plan without."""
    guest = _guest(connection, move.instance_id)
    found = metering.read(connection, move.instance_id, "BurstCapacityTime", 60, now - 900, now)
    return found[-1][1].minimum * guest["vcpus"] if found and guest is not None else None


