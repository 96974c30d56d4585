"""What snapshots of instances and of disks have in common: their rows, their workflows, and when their files may go.

A snapshot that was deleted is gone for its owner at once. Its files stay as long as a volume, or another snapshot, stands on
them; :func:`sweep` lets them go after that.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.contract.document import Volume
from skysail.hosts import desired
from skysail.kit.errors import not_found
from skysail.operations import history
from skysail.operations.workflow import Step, StepFailed, Workflow
from skysail.resources import names, paging, tags
from skysail.resources.request import Request
from skysail.store.schema import disks, guests, operations, snapshots

# What an operation tells of how consistent its snapshot is.
CONSISTENCY = {
    "frozen": "consistent: file systems frozen for {:.0f} ms", "off": "consistent: nobody wrote the disks",
    "crash": "crash-consistent: no guest agent froze the file systems",
}
# What a snapshot that is whole is called.
WHOLE = {"InstanceSnapshot": "available", "DiskSnapshot": "completed"}


def put(connection: Connection, request: Request, name: str, kind: str, *, now: float, identifier: str = "",
        **content: Any) -> dict[str, Any]:
    """Write the row of a new snapshot, with its tags, and bump its host; its operation. ``content`` is what :func:`write`
    takes. Raises InvalidInputException."""
    identifier = identifier or new_id()
    names.claim(connection, request, name, kind, identifier)
    write(connection, request, identifier, name, kind, now=now, **content)
    tags.put(connection, identifier, request.params.get("tags") or [])
    return history.record(connection, request, now=now, type=request.action, resource_name=name, resource_type=kind,
                          resource_id=identifier, status="Started", workflow="snapshot", arguments={"snapshot": identifier})


def new_id() -> str:
    return "s-" + secrets.token_hex(5)


def write(connection: Connection, request: Request, identifier: str, name: str, kind: str, *, host: str, guest: str,
          volumes: Sequence[Volume | dict[str, Any]], source: dict[str, Any], source_id: str, size_gib: int, now: float,
          **more: Any) -> None:
    """Write the row of a new snapshot, and bump its host."""
    connection.execute(insert(snapshots).values(
        id=identifier, account_id=request.account_id, region=request.region, name=name, kind=kind, host_id=host,
        guest_id=guest, volumes=msgspec.to_builtins(list(volumes)), source=source, source_id=source_id, size_gib=size_gib,
        state="pending", created_at=now, **more))
    desired.bump(connection, host)


def record_source(connection: Connection, request: Request, instance: RowMapping, made: dict[str, Any],
                  now: float) -> dict[str, Any]:
    """The operation of the instance that a snapshot is made of; ``made`` is the snapshot's."""
    return history.record(connection, request, now=now, type=request.action, resource_name=instance["name"],
                          resource_type="Instance", resource_id=instance["id"], zone=instance["zone"], status="Started",
                          details=made["resourceName"], workflow="snapshot begun",
                          arguments=history.find(connection, made["id"])["arguments"])


def get(connection: Connection, request: Request, name: str, kind: str) -> RowMapping:
    """The caller's snapshot ``name``; raises NotFoundException."""
    row = connection.execute(_own(request, kind).where(snapshots.c.name == name)).mappings().first()
    if row is None:
        raise not_found(f"The {kind} does not exist: {name}", f"Get{kind}s lists the ones that do.")
    return row


def page(connection: Connection, request: Request, kind: str) -> tuple[Sequence[RowMapping], str | None]:
    """A page of the caller's snapshots."""
    return paging.read(connection, _own(request, kind), request.params.get("pageToken"), snapshots.c.name)


def _own(request: Request, kind: str) -> Any:
    return select(snapshots).where(snapshots.c.account_id == request.account_id, snapshots.c.region == request.region,
                                   snapshots.c.kind == kind, snapshots.c.deleted.is_(False), snapshots.c.auto_day == "")


def remove(connection: Connection, request: Request, row: RowMapping, now: float) -> dict[str, Any]:
    """Gone for its owner; the operation that says so."""
    discard(connection, row)
    return history.record(connection, request, now=now, type=request.action, resource_name=row["name"],
                          resource_type=row["kind"], resource_id=row["id"])


def discard(connection: Connection, row: RowMapping) -> None:
    """Gone for its owner; its files go when nothing needs them."""
    connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(deleted=True))
    desired.bump(connection, row["host_id"])  # what stands on it moves off
    if not row["auto_day"]:
        names.release(connection, row["account_id"], row["region"], row["name"])
    tags.forget(connection, row["id"])
    sweep(connection)


def automatic(connection: Connection, source_id: str) -> Sequence[RowMapping]:
    """The automatic snapshots of an instance or a disk, newest first."""
    return connection.execute(select(snapshots).where(
        snapshots.c.source_id == source_id, snapshots.c.auto_day != "", snapshots.c.deleted.is_(False))
        .order_by(snapshots.c.auto_day.desc())).mappings().all()


def forget_source(connection: Connection, source_id: str) -> None:
    """An instance or a disk goes, and with it its automatic snapshots, also one that is being made."""
    for row in automatic(connection, source_id):
        discard(connection, row)


def common(row: RowMapping, tagged: tags.Tagged) -> dict[str, Any]:
    """What both kinds show."""
    return {
        "name": row["name"], "arn": f"arn:aws:lightsail:{row['region']}:{row['account_id']}:{row['kind']}/{row['id']}",
        "supportCode": f"{row['account_id']}/{row['id']}", "createdAt": row["created_at"],
        "location": {"availabilityZone": "all", "regionName": row["region"]}, "resourceType": row["kind"],
        "tags": tagged.get(row["id"], []), "state": row["state"], "isFromAutoSnapshot": row["from_auto"],
        "progress": "100%" if row["state"] == WHOLE[row["kind"]] else f"{row['progress']}%", "sizeInGb": row["size_gib"],
    }


def sweep(connection: Connection) -> int:
    """Let the files of deleted snapshots go that nothing stands on, and the rows of those that are gone; how many changed."""
    if connection.execute(select(snapshots.c.id).where(snapshots.c.deleted.is_(True)).limit(1)).first() is None:
        return 0
    rows = connection.execute(select(snapshots)).mappings().all()
    needed = {origin["snapshot"] for table in (guests, disks)
              for origin in connection.execute(select(table.c.origin).where(table.c.origin.is_not(None))).scalars() if origin}
    for row in rows:
        if row["role"] == "keep":
            needed |= set(row["parents"])
        if row["role"] == "keep" and row["observed_state"] != "available":
            # A copy that is not whole yet will stand on what its disks stand on, or be made of another's files.
            needed |= {volume["origin"]["snapshot"] for volume in row["volumes"] if volume.get("origin")}
            needed.add(row["duplicates"])
    changed = 0
    for row in rows:
        if row["deleted"] and row["role"] == "keep" and row["id"] not in needed:
            connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(role="gone"))
        elif row["role"] == "gone" and row["observed_state"] == "gone":
            connection.execute(delete(snapshots).where(snapshots.c.id == row["id"]))
        else:
            continue
        desired.bump(connection, row["host_id"])
        changed += 1
    return changed


# --- behind the operations

def _row(connection: Connection, operation: RowMapping) -> RowMapping | None:
    return connection.execute(select(snapshots).where(
        snapshots.c.id == operation["arguments"]["snapshot"], snapshots.c.deleted.is_(False))).mappings().first()


def _await_whole(connection: Connection, operation: RowMapping, now: float) -> bool:
    row = _row(connection, operation)
    if row is None:
        return True  # its owner deleted it while it was being made
    if row["observed_state"] == "failed":
        raise StepFailed("SnapshotFailed", row["reason"] or "the snapshot could not be made")
    if row["observed_state"] != "available":
        return False
    connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(state=WHOLE[row["kind"]]))
    # The API's shapes have no other place for it.
    connection.execute(update(operations).where(operations.c.id == operation["id"]).values(
        details=CONSISTENCY.get(row["consistency"], "").format(row["frozen_ms"])))
    return True


def _undo_snapshot(connection: Connection, operation: RowMapping, now: float) -> None:
    """It stays, in the state ``error``, until its owner deletes it."""
    row = _row(connection, operation)
    if row is not None:
        connection.execute(update(snapshots).where(snapshots.c.id == row["id"]).values(state="error"))


def _await_begun(connection: Connection, operation: RowMapping, now: float) -> bool:
    """The moment that the snapshot holds is past: the instance may go on to whatever its owner wants."""
    row = _row(connection, operation)
    return row is None or row["observed_state"] in ("copying", "available", "failed")


AWAIT_WHOLE = Step("await whole", _await_whole, _undo_snapshot)
WORKFLOWS = {
    workflow.name: workflow for workflow in (
        Workflow("snapshot", (AWAIT_WHOLE,)),
        Workflow("snapshot begun", (Step("await begun", _await_begun),)),
    )
}
