"""Verify's look at block storage and snapshots."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import Connection, select

from skysail.contract.document import HostDocument
from skysail.contract.report import Inventory
from skysail.inspect.difference import Difference
from skysail.kit.errors import SkysailError
from skysail.resources.auto_snapshots import KEPT
from skysail.resources.snapshot_rows import WHOLE
from skysail.storage.checksums import Checksums
from skysail.storage.shelf import FileShelf
from skysail.store.schema import add_ons, disks, guests, instances, operations, snapshots


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
    for row in connection.execute(select(snapshots).where(
            snapshots.c.role == "keep", snapshots.c.duplicates != "", snapshots.c.observed_state != "available")).mappings():
        if row["duplicates"] not in known:
            yield Difference(subject=f"snapshot {row['name']}", saw=f"to be made of {row['duplicates']}, which is not there",
                             wanted="a snapshot that stays until it is copied")
    for table in (guests, disks):
        for identifier, origin in connection.execute(select(table.c.id, table.c.origin).where(table.c.role != "gone")):
            if origin is not None and origin["snapshot"] not in known:
                yield Difference(subject=f"volume {identifier}", saw=f"made of {origin['snapshot']}, which is not there",
                                 wanted="a snapshot that stays as long as it is needed")


def automatic(connection: Connection) -> Iterator[Difference]:
    """Add-ons, and the automatic snapshots that they took, go with what they are of; no day has two, and seven are kept."""
    known = {row.id: row.name for table in (instances, disks) for row in connection.execute(select(table.c.id, table.c.name))}
    for owner in connection.execute(select(add_ons.c.resource_id)).scalars():
        if owner not in known:
            yield Difference(subject=f"add-on of {owner}", saw="its resource is gone", wanted="none")
    days: Counter[tuple[str, str]] = Counter()
    whole: Counter[str] = Counter()
    for row in connection.execute(select(snapshots).where(
            snapshots.c.deleted.is_(False), snapshots.c.auto_day != "")).mappings():
        days[row["source_id"], row["auto_day"]] += 1
        whole[row["source_id"]] += row["state"] == WHOLE[row["kind"]]
        if row["source_id"] not in known:
            yield Difference(subject=f"automatic snapshot {row['id']}", saw="its source is gone", wanted="none")
    counted = [(owner, count, f"of {day}", 1) for (owner, day), count in days.items()]
    counted += [(owner, count, "kept", KEPT) for owner, count in whole.items()]
    for owner, count, what, most in counted:
        if count > most:
            yield Difference(subject=f"automatic snapshots of {known.get(owner, owner)}", saw=f"{count} {what}",
                             wanted=f"{most} at the most")


def files(folder: Path) -> Iterator[Difference]:
    """Each file of each snapshot is still what it was when it was made."""
    shelf, checksums = FileShelf(folder), Checksums()
    for identifier in asyncio.run(shelf.observe()):
        try:
            held = asyncio.run(shelf.find(identifier))
            for copy in held.copies if held is not None else ():
                checksums.check(folder / identifier / copy.file, copy.sha256)
        except SkysailError as damaged:
            yield Difference(subject=f"snapshot {identifier}", saw=damaged.what, wanted="the content that its manifest names")


def volumes(document: HostDocument) -> set[str]:
    """The volumes that a document names."""
    return {disk.id for disk in document.disks} | {one.id for guest in document.guests for one in (
        guest.volume, *(disk.volume for disk in guest.disks))}


def host(document: HostDocument, there: Inventory, whole: set[str], others: Sequence[HostDocument]) -> Iterator[Difference]:
    """What a host shall hold against what it does; ``whole`` are the snapshots that the rows call so. Volumes of guests are
    told of elsewhere, unless no row knows them. It also holds what the documents of ``others`` name, which are in its
    pool."""
    known = [document, *others]
    wanted = {disk.id for disk in document.disks if disk.role == "keep" and disk.made}
    for kind, needed, named, found in (
            ("volume", wanted, set().union(*map(volumes, known)), there.volumes),
            ("snapshot", whole, {one.id for each in known for one in each.snapshots}, there.snapshots)):
        for identifier in sorted(needed - set(found)):
            yield Difference(subject=f"{kind} {identifier}", saw=f"not there on {document.host}", wanted=f"a {kind}")
        for identifier in sorted(set(found) - named):
            yield Difference(subject=f"{kind} {identifier}", saw=f"there on {document.host}, but no row knows it",
                             wanted="none")
