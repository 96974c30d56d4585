"""What happens to an instance behind its operations: the workflows, and how it follows its guest.

Lightsail's (EC2's) state codes: pending 0, running 16, shutting-down 32, terminated 48, stopping 64, stopped 80.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, RowMapping, bindparam, delete, exists, select, update

from skysail.hosts import desired
from skysail.operations.workflow import Step, StepFailed, Workflow
from skysail.resources import add_ons, names, snapshot_rows
from skysail.store.schema import alarms, disks, guests, instances, moves, operations, ports, static_ips, tags

STATE_CODES = {"pending": 0, "running": 16, "rebooting": 16, "stopping": 64, "stopped": 80}
# Made once: each operation asks them, again and again.
_GUEST = select(guests).where(guests.c.id == bindparam("of_guest"))
_SET_STATE = update(instances).where(instances.c.id == bindparam("of_id")).values(state=bindparam("new_state"))


def _guest(connection: Connection, operation: RowMapping) -> RowMapping | None:
    return connection.execute(_GUEST, {"of_guest": operation["arguments"]["guest"]}).mappings().first()


def _set_state(connection: Connection, instance_id: str, state: str) -> None:
    connection.execute(_SET_STATE, {"of_id": instance_id, "new_state": state})


def _await_running(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The guest runs, or has run, for at least the start that was asked for. A later stop or delete ends the wait: it won."""
    guest = _guest(connection, operation)
    if guest is None or guest["role"] != "run":
        return True
    if guest["observed_starts"] < operation["arguments"]["starts"]:
        return False
    if guest["observed_state"] == "failed":
        raise StepFailed("InstanceLaunchFailed", guest["reason"] or "the guest could not be made")
    if guest["observed_state"] == "halted":
        return True  # it powered itself off already; the instance follows it
    if guest["observed_state"] != "running":
        return False
    _set_state(connection, operation["resource_id"], "running")
    return True


def _undo_create(connection: Connection, operation: RowMapping, now: float) -> None:
    """A launch that failed leaves nothing: the instance goes with its name, its guest is told to go."""
    forget(connection, operation["resource_id"])
    guest = _guest(connection, operation)
    if guest is not None:
        connection.execute(update(guests).where(guests.c.id == guest["id"]).values(role="gone"))
        desired.bump(connection, guest["host_id"])


def _undo_start(connection: Connection, operation: RowMapping, now: float) -> None:
    """A start that failed leaves the instance stopped, as it was."""
    guest = _guest(connection, operation)
    if guest is not None and guest["role"] == "run":
        connection.execute(update(guests).where(guests.c.id == guest["id"]).values(role="stop"))
        desired.bump(connection, guest["host_id"])
        _set_state(connection, operation["resource_id"], "stopped")


def _await_stopped(connection: Connection, operation: RowMapping, now: float) -> bool:
    guest = _guest(connection, operation)
    if guest is None or guest["role"] != "stop":
        return True
    # The start counts: what was seen before a start that this stop overtook says nothing.
    if guest["observed_state"] not in ("stopped", "halted") or guest["observed_starts"] < operation["arguments"]["starts"]:
        return False
    _set_state(connection, operation["resource_id"], "stopped")
    return True


def _await_reboot(connection: Connection, operation: RowMapping, now: float) -> bool:
    guest = _guest(connection, operation)
    if guest is None or guest["role"] != "run":
        return True
    if guest["observed_state"] == "halted" and guest["observed_starts"] == guest["starts"]:
        return True  # it powered itself off instead; the instance follows it
    if guest["observed_reboots"] < operation["arguments"]["reboots"] or guest["observed_state"] != "running":
        return False
    _set_state(connection, operation["resource_id"], "running")
    return True


def _await_gone(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The host let the guest go: its row, and with it its addresses, become free."""
    guest = _guest(connection, operation)
    if guest is None:
        return True
    if guest["observed_state"] != "gone" or _moves(connection, guest["instance_id"]):
        return False
    connection.execute(delete(guests).where(guests.c.id == guest["id"]))
    desired.bump(connection, guest["host_id"])
    return True


def _moves(connection: Connection, instance_id: str) -> bool:
    """Whether something of the guest is on another host, too: it has its addresses there."""
    return connection.execute(select(moves.c.id).where(moves.c.instance_id == instance_id)).first() is not None


WORKFLOWS = {
    workflow.name: workflow for workflow in (
        Workflow("create", (Step("await running", _await_running, _undo_create),)),
        Workflow("start", (Step("await running", _await_running, _undo_start),)),
        Workflow("stop", (Step("await stopped", _await_stopped),)),
        Workflow("reboot", (Step("await reboot", _await_reboot),)),
        Workflow("delete", (Step("await gone", _await_gone),)),
    )
}


def forget(connection: Connection, instance_id: str) -> None:
    """The instance ceases to exist for its owner; its name is free at once, its guest is somebody else's business."""
    connection.execute(delete(ports).where(ports.c.instance_id == instance_id))
    for alarm in connection.execute(select(alarms).where(alarms.c.instance_id == instance_id)).all():
        connection.execute(delete(tags).where(tags.c.resource_id == alarm.id))
        names.release(connection, alarm.account_id, alarm.region, alarm.name)
    connection.execute(delete(alarms).where(alarms.c.instance_id == instance_id))
    connection.execute(update(static_ips).where(static_ips.c.instance_id == instance_id).values(instance_id=None))
    connection.execute(update(disks).where(disks.c.instance_id == instance_id).values(
        instance_id=None, path="", attachment="", state="available"))
    connection.execute(delete(tags).where(tags.c.resource_id == instance_id))
    add_ons.forget(connection, instance_id)
    snapshot_rows.forget_source(connection, instance_id)
    row = connection.execute(select(instances).where(instances.c.id == instance_id)).first()
    if row is not None:
        names.release(connection, row.account_id, row.region, row.name)
        connection.execute(delete(instances).where(instances.c.id == instance_id))


# What a guest that shall run makes of its instance; nothing where it is not among them.
_FOLLOWED = {"halted": "stopped", "crashed": "pending", "starting": "pending", "preparing": "pending", "failed": "pending",
             "running": "running"}


def follow(connection: Connection, now: float) -> int:
    """Instances follow guests that changed by themselves; how many did.

    A guest that powered itself off stops its instance, one that died makes it ``pending`` until it runs again. Only
    instances without open work are looked at: an operation in flight owns its instance's state. Guests without an
    instance and without work (their launch failed) are let go once their host has.
    """
    # An operator's operation, which moves a guest, changes nothing of what its owner sees.
    def busy(instance_id: ColumnElement[str]) -> ColumnElement[bool]:
        return exists().where(operations.c.resource_id == instance_id, operations.c.done.is_(False),
                              operations.c.region != "")

    changed = 0
    # Nearly all run. The few others are found by an index: guests that do not, and instances that are under way.
    both = select(guests.c.id, guests.c.instance_id, guests.c.host_id, guests.c.observed_state, instances.c.state).join(
        instances, instances.c.id == guests.c.instance_id).where(
        guests.c.role == "run", guests.c.observed_starts == guests.c.starts)
    waiting = connection.execute(select(instances.c.id).where(
        instances.c.state.in_([state for state in STATE_CODES if state not in ("running", "stopped")]),
        ~busy(instances.c.id))).scalars().all()
    found = connection.execute(both.where(guests.c.observed_state.in_([seen for seen in _FOLLOWED if seen != "running"]),
                                          ~busy(instances.c.id))).mappings().all()
    if waiting:
        found = [*found, *connection.execute(both.where(
            guests.c.instance_id.in_(waiting), guests.c.observed_state == "running")).mappings()]
    for row in found:
        state = _FOLLOWED[row["observed_state"]]
        if row["observed_state"] == "halted":
            connection.execute(update(guests).where(guests.c.id == row["id"]).values(role="stop"))
            desired.bump(connection, row["host_id"])
        if state != row["state"]:
            _set_state(connection, row["instance_id"], state)
            changed += 1
    orphans = connection.execute(
        select(guests.c.id, guests.c.host_id).where(
            guests.c.role == "gone", guests.c.observed_state == "gone",
            ~busy(guests.c.instance_id), guests.c.instance_id.not_in(select(instances.c.id)),
            guests.c.instance_id.not_in(select(moves.c.instance_id)))).all()
    for orphan in orphans:
        connection.execute(delete(guests).where(guests.c.id == orphan.id))
        desired.bump(connection, orphan.host_id)
        changed += 1
    return changed
