"""Verify's look at block storage and snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from skysail.contract.document import HostDocument
from skysail.contract.report import Inventory
from skysail.inspect.difference import Difference
from skysail.resources.snapshot_rows import WHOLE
from skysail.store.schema import disks, guests, operations, snapshots


def rows(connection: Connection) -> Iterator[Difference]:
    """States, attachments and origins that agree."""
    busy = set(connection.execute(select(operations.c.resource_id).where(operations.c.done.is_(False))).scalars())
    running = {row["instance_id"]: row for row in connection.execute(
        select(guests).where(guests.c.role == "run", guests.c.observed_state == "running")).mappings()}
    places: set[tuple[str, str]] = set()
    for row in connection.execute(select(disks).where(disks.c.role == "keep")).mappings():
        subject, owner = f"disk {row['name']}", row["instance_id"]
        if owner is not None and (owner, row["path"]) in places:
            yield Difference(subject=subject, saw=f"at {row['path']}, where another disk is", wanted="a path of its own")
        places.add((owner, row["path"]))
        if row["id"] in busy or row["state"] == "error":
            continue
        state, attachment = ("available", "") if owner is None else ("in-use", "attached")
        if (row["state"], row["attachment"]) != (state, attachment):
            yield Difference(subject=subject, saw=f"{row['state']} {row['attachment']}".strip(),
                             wanted=f"{state} {attachment}".strip())
        if owner in running and row["id"] not in running[owner]["observed_disks"]:
            yield Difference(subject=subject, saw="attached, but its host says that the guest does not have it",
                             wanted="the disks that the host observes")
    for row in connection.execute(select(snapshots).where(snapshots.c.deleted.is_(False))).mappings():
        wanted = WHOLE[row["kind"]]
        if row["id"] not in busy and row["state"] != "error" and (
                row["state"] != wanted or row["observed_state"] != "available"):
            yield Difference(subject=f"snapshot {row['name']}", wanted=wanted,
                             saw=f"{row['state']}, its host says {row['observed_state'] or 'nothing'}")
    known = set(connection.execute(select(snapshots.c.id).where(snapshots.c.role == "keep")).scalars())
    for table in (guests, disks):
        for identifier, origin in connection.execute(select(table.c.id, table.c.origin).where(table.c.role != "gone")):
            if origin is not None and origin["snapshot"] not in known:
                yield Difference(subject=f"volume {identifier}", saw=f"made of {origin['snapshot']}, which is not there",
                                 wanted="a snapshot that stays as long as it is needed")


def host(document: HostDocument, there: Inventory, whole: set[str]) -> Iterator[Difference]:
    """What a host shall hold against what it does; ``whole`` are the snapshots that the rows call so. Volumes of guests are
    told of elsewhere, unless no row knows them."""
    volumes = {one.id for one in document.guests} | {one.id for one in document.disks}
    wanted = {disk.id for disk in document.disks if disk.role == "keep" and disk.made}
    for kind, needed, known, found in (
            ("volume", wanted, volumes, there.volumes),
            ("snapshot", whole, {one.id for one in document.snapshots}, there.snapshots)):
        for identifier in sorted(needed - set(found)):
            yield Difference(subject=f"{kind} {identifier}", saw=f"not there on {document.host}", wanted=f"a {kind}")
        for identifier in sorted(set(found) - known):
            yield Difference(subject=f"{kind} {identifier}", saw=f"there on {document.host}, but no row knows it",
                             wanted="none")
