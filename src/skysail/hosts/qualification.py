"""What is known of guests that move between versions of QEMU: which pairs were tried, and how that went. Reads and writes
rows.

Between hosts of one version nothing has to be known: a guest goes from its own kind to its own kind. Between two of them it
goes when somebody tried the pair in that direction, for the guest's machine type and accelerator, and nothing was lost.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, delete, insert, select

from skysail.contract.facts import HostFacts
from skysail.contract.qualification import Qualification
from skysail.kit.errors import SkysailError
from skysail.store.schema import guests, hosts, qualifications


def note(connection: Connection, found: Collection[Qualification]) -> list[Qualification]:
    """Keep what was tried, in the place of what was known of the same pair; what was kept. A quick one that went well does
    not take the place of a whole one, which says more."""
    kept = []
    for one in found:
        former = find(connection, one.sender, one.receiver, one.machine, one.accelerator)
        if former is not None and one.quick and one.good and not former.quick:
            continue
        connection.execute(delete(qualifications).where(*_pair(one.sender, one.receiver, one.machine, one.accelerator)))
        connection.execute(insert(qualifications).values(
            sender=one.sender, receiver=one.receiver, machine=one.machine, accelerator=one.accelerator, kernel=one.kernel,
            at=one.at, quick=one.quick, trials=msgspec.to_builtins(one.trials)))
        kept.append(one)
    return kept


def listed(connection: Connection) -> list[Qualification]:
    """All that is known, the newest first."""
    rows = connection.execute(select(qualifications).order_by(
        qualifications.c.at.desc(), qualifications.c.sender, qualifications.c.receiver)).mappings()
    return [_read(row) for row in rows]


def find(connection: Connection, sender: str, receiver: str, machine: str, accelerator: str) -> Qualification | None:
    """What is known of one pair."""
    row = connection.execute(select(qualifications).where(*_pair(sender, receiver, machine, accelerator))).mappings().first()
    return _read(row) if row is not None else None


def lacking(connection: Connection, sender: str, receiver: str, machine: str, accelerator: str) -> str:
    """Why guests do not go from the one version to the other, in words; '' where they do."""
    if sender == receiver:
        return ""
    known = find(connection, sender, receiver, machine, accelerator)
    if known is None:
        return (f"has QEMU {receiver}, and whether a guest gets there whole from QEMU {sender} was never tried "
                "(see: sudo ./skysail qualify)")
    if not known.good:
        bad = sum(bool(one.differences) for one in known.trials)
        return (f"has QEMU {receiver}, where guests from QEMU {sender} do not arrive whole: {bad} of {len(known.trials)} "
                f"trials failed on {time.strftime('%Y-%m-%d', time.gmtime(known.at))} (see: sudo ./skysail qualifications)")
    return ""


def against_upgrade(connection: Connection, host_id: str, version: str) -> tuple[str, list[str]]:
    """The full name of the QEMU that ``version`` is the beginning of, and what speaks against it on the host, in words: its
    guests shall be able to go to the other hosts, and come back. Raises SkysailError where no such host or version is
    known."""
    rows = {row["id"]: msgspec.convert(row["facts"], HostFacts | None)
            for row in connection.execute(select(hosts.c.id, hosts.c.facts)).mappings()}
    if rows.get(host_id) is None:
        raise SkysailError(f"of a host {host_id} nothing is known", "see: sudo ./skysail host list")
    own = rows[host_id]
    assert own is not None
    known = {one for pair in listed(connection) for one in (pair.sender, pair.receiver)} | {
        facts.qemu for facts in rows.values() if facts is not None}
    fitting = sorted(one for one in known if one == version or f"{one.partition(' ')[0]}.".startswith(f"{version}."))
    if len(fitting) != 1:
        raise SkysailError(f"which QEMU {version} is meant is not known" + (f": {', '.join(fitting)}" if fitting else ""),
                           "try the pair first: sudo ./skysail qualify --qemu VERSION --qemu VERSION")
    running = {row[0] for row in connection.execute(select(guests.c.observed_qemu).where(
        guests.c.host_id == host_id, guests.c.observed_qemu != ""))}
    others = running | {facts.qemu for name, facts in rows.items() if facts is not None and (
        name == host_id or facts.accelerator == own.accelerator)}
    against = []
    for other in sorted(others - {fitting[0]}):
        for sender, receiver in ((other, fitting[0]), (fitting[0], other)):
            if lacking(connection, sender, receiver, own.guest_machine, own.accelerator):
                untried = find(connection, sender, receiver, own.guest_machine, own.accelerator) is None
                against.append(f"from {sender} to {receiver} guests "
                               + ("were never tried" if untried else "do not arrive whole"))
    return fitting[0], against


def _read(row: RowMapping) -> Qualification:
    # The names of columns are strings of the store's own kind.
    return msgspec.convert({str(name): value for name, value in row.items()}, Qualification)


def _pair(sender: str, receiver: str, machine: str, accelerator: str) -> tuple[ColumnElement[bool], ...]:
    table = qualifications.c
    return table.sender == sender, table.receiver == receiver, table.machine == machine, table.accelerator == accelerator
