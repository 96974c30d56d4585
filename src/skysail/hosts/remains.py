"""What is left of instances at hosts that failed, from where they went on elsewhere.

A host that comes back may have the guest's record, its process if nobody turned it off after all, and its disk. Whatever it
has, that guest must not run again. Where the disk is in a pool it is the guest's that went on, and all else goes. Where it
is a file, it may be the only copy of what was written since the snapshot that the instance began anew from: it stays until
its operator has it thrown away. Part of the desired document, and of what follows from a report.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, RowMapping, bindparam, delete, select, update

from skysail.contract.document import Disk, Guest, Personality, Port, Volume
from skysail.contract.report import HostReport
from skysail.store.schema import hosts, remains

_OF_HOST = select(remains).where(remains.c.host_id == bindparam("of_host")).order_by(remains.c.id)


class Left(NamedTuple):
    """In the words of a document."""

    guests: tuple[Guest, ...]
    disks: tuple[Disk, ...]


def compile(connection: Connection, host_id: str) -> Left:
    """What the host shall do with what is left on it."""
    rows = _of(connection, host_id)
    return Left(tuple(map(_guest, rows)), tuple(disk for row in rows for disk in _disks(row)))


def write(connection: Connection, host_id: str, report: HostReport) -> None:
    """What the host says of what is left on it; of which nothing is left is forgotten."""
    rows = _of(connection, host_id)
    if not rows:
        return
    states = {guest.id: guest.state for guest in report.guests}
    gone = {disk.id for disk in report.disks if disk.state == "gone"}
    for row in rows:
        here = (remains.c.host_id == host_id, remains.c.id == row["id"])
        state = states.get(row["id"], row["observed_state"])
        ends = row["how"] == "pool" or row["unwanted"]
        if ends and state == "gone" and all(identifier in gone for identifier, _ in row["disks"]):
            connection.execute(delete(remains).where(*here))
        elif state != row["observed_state"]:
            connection.execute(update(remains).where(*here).values(observed_state=state))
        else:
            continue
        # Its disks go after the guest that had them, and in the end nothing is said of it any more.
        connection.execute(update(hosts).where(hosts.c.id == host_id).values(generation=hosts.c.generation + 1))


def _of(connection: Connection, host_id: str) -> list[RowMapping]:
    return list(connection.execute(_OF_HOST, {"of_host": host_id}).mappings())


def _guest(row: RowMapping) -> Guest:
    ends = row["how"] == "pool" or row["unwanted"]
    return Guest(
        id=row["id"], instance=row["instance_name"], role="gone" if ends else "stop", starts=0, reboots=0, force=True,
        vcpus=row["vcpus"], memory_mib=row["memory_mib"], stranded=True, leaves_disks=row["how"] == "pool",
        volume=Volume(id=row["id"], image=row["image"], size_gib=row["disk_gib"]),
        port=Port(id=row["id"], mac=row["mac"], network=row["network"], private_ipv4=row["private_ipv4"], awaited=True),
        personality=Personality(hostname=row["instance_name"], user=""))


def _disks(row: RowMapping) -> list[Disk]:
    going = row["unwanted"] and row["observed_state"] == "gone"
    return [Disk(volume=Volume(id=identifier, image="", size_gib=size), role="gone" if going else "keep", made=True)
            for identifier, size in row["disks"]]
