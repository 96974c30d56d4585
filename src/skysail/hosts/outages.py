"""Hosts that failed: who has not answered for too long, and which of them is off for certain.

Not to be heard is not to be off: the machine may run all of its guests behind a cable that was pulled. So an outage is shown,
and nothing follows from it until the host is *fenced*: the operator's program has turned it off and said so, or the operator
vouches for it. That is on the disk before anything else is done, and holds for as long as the host stays away. One that is
heard again has no outage any more: whatever was begun elsewhere until then stays there, and the host is told so before it
starts anything (see docs/decisions/0070).
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from skysail.hosts import desired
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.store.schema import guests, hosts, moves, outages

log = logging.getLogger(__name__)
# The pauses between the tries to fence a host: the first, then each twice the one before, up to the longest.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0
CUT_OFF = "more than half of the hosts do not answer: it may be this controller that is cut off"
REASON = "its host has failed"


class Outage(msgspec.Struct, frozen=True, kw_only=True):
    """A host that has not answered ``since`` then. ``due_at``: when it is tried next to fence it; None while nobody wants
    that. ``error``: why that has not come to pass, in ``tries``. From ``fenced_at`` on it is off for certain: the operator
    ``vouched`` for it, or the program said so."""

    host_id: str
    since: float
    due_at: float | None = None
    tries: int = 0
    error: str = ""
    fenced_at: float | None = None
    vouched: bool = False


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """A host that is to be fenced now; ``since`` says which of its outages is meant."""

    host_id: str
    address: str
    since: float


def seen(connection: Connection) -> dict[str, Outage]:
    """Every outage, by its host."""
    return {row["host_id"]: msgspec.convert({name: row[name] for name in Outage.__struct_fields__}, Outage)
            for row in connection.execute(select(outages)).mappings()}


def follow(connection: Connection, config: Config, now: float, began: float) -> int:
    """Note the hosts that have failed, forget those that are heard again, and have those fenced that the configuration wants
    fenced; how many changed. A controller that ``began`` a moment ago has not tried to reach anybody: silence counts from
    then on."""
    changed = _forget(connection)
    away = connection.execute(
        select(hosts.c.id, hosts.c.address, hosts.c.away_since, hosts.c.facts, outages.c.since, outages.c.due_at,
               outages.c.asked, outages.c.fenced_at, outages.c.error)
        .outerjoin(outages, outages.c.host_id == hosts.c.id).where(hosts.c.away_since.is_not(None))).mappings().all()
    failed = [row for row in away if now - max(row["away_since"], began) >= config.fence_after_seconds]
    for row in failed:
        if row["since"] is None:
            _note(connection, row["id"])
            changed += 1
    if not failed or not config.fence or config.on_host_failure == "wait":
        return changed
    cut_off = not _most_answer(connection)
    for row in failed:
        if row["fenced_at"] is not None or _beside(row["address"]):
            continue
        if cut_off and row["error"] != CUT_OFF and not row["asked"]:
            log.warning("host %s is not fenced: %s", row["id"], CUT_OFF)
            _change(connection, row["id"], error=CUT_OFF)
            changed += 1
        elif not cut_off and row["due_at"] is None:
            _change(connection, row["id"], due_at=now, error="")
            changed += 1
    return changed


def ask(connection: Connection, host_id: str, now: float) -> int:
    """The operator wants the host fenced, now and without waiting for anything; how often that was tried before. Raises
    SkysailError for one that answers."""
    _away(connection, host_id)
    if (row := _find(connection, host_id)) is None:
        _note(connection, host_id)
    _change(connection, host_id, due_at=now, asked=True)
    return row["tries"] if row is not None else 0


def vouch(connection: Connection, host_id: str, now: float) -> None:
    """The operator vouches that the host is off. Raises SkysailError for one that answers."""
    row = _away(connection, host_id)
    if _find(connection, host_id) is None:
        _note(connection, host_id)
    fenced(connection, host_id, row["away_since"], now, vouched=True)


def due(connection: Connection, now: float) -> list[Due]:
    """The hosts that are to be fenced now: while most do not answer, those alone that the operator wants fenced."""
    found = connection.execute(
        select(hosts.c.id, hosts.c.address, outages.c.since, outages.c.asked).join(
            hosts, hosts.c.id == outages.c.host_id).where(
            outages.c.due_at <= now, outages.c.fenced_at.is_(None), outages.c.since == hosts.c.away_since)
        .order_by(outages.c.due_at)).all()
    most = not all(row.asked for row in found) and _most_answer(connection)
    return [Due(host_id=row.id, address=row.address, since=row.since) for row in found if row.asked or most]


def tries(connection: Connection, wanted: Due, now: float, seconds: float) -> bool:
    """A try begins that takes up to ``seconds``: whoever comes after one that died in it begins another behind that; whether
    the host is still to be fenced."""
    row = _find(connection, wanted.host_id)
    if row is None or row["since"] != wanted.since or row["fenced_at"] is not None or not _stays_away(connection, row):
        return False
    _change(connection, wanted.host_id, tries=row["tries"] + 1, error="",
            due_at=now + seconds + _pause(row["tries"]))
    return True


def fails(connection: Connection, wanted: Due, reason: str, now: float) -> None:
    """The host is not known to be off; it is tried again."""
    row = _find(connection, wanted.host_id)
    if row is not None and row["since"] == wanted.since and row["fenced_at"] is None:
        _change(connection, wanted.host_id, error=reason[:1000], due_at=now + _pause(row["tries"] - 1))


def fenced(connection: Connection, host_id: str, since: float, now: float, vouched: bool = False) -> bool:
    """The host is off for certain, and whatever it ran is not running; whether it is still the outage that began ``since``.
    Its guests are down; who waits for a word of it need not any more."""
    row = _find(connection, host_id)
    if row is None or row["since"] != since or not _stays_away(connection, row):
        return False
    if row["fenced_at"] is not None:
        return True
    _change(connection, host_id, fenced_at=now, vouched=vouched, due_at=None, error="")
    here = guests.c.host_id == host_id
    connection.execute(update(guests).where(here, guests.c.role == "run", guests.c.observed_state.in_(
        ("running", "rebooting", "starting", "preparing"))).values(observed_state="crashed", reason=REASON))
    connection.execute(update(guests).where(here, guests.c.role == "stop").values(
        observed_state="stopped", observed_starts=guests.c.starts))
    # What was handed over to it does not run there, and never will: the source may have it back.
    connection.execute(update(moves).where(moves.c.target == host_id, moves.c.phase.in_(
        ("going", "ending", "owed", "returning"))).values(lost=True))
    desired.bump(connection, host_id)
    log.warning("host %s is off for certain: %s", host_id, "its operator vouches" if vouched else "it was fenced")
    return True


def is_fenced(connection: Connection, host_id: str) -> bool:
    """Whether the host is off for certain at this moment, and nothing was heard of it since."""
    row = _find(connection, host_id)
    return row is not None and row["fenced_at"] is not None and _stays_away(connection, row)


def _forget(connection: Connection) -> int:
    """Outages that are over, or another one by now; how many."""
    over = connection.execute(select(outages, hosts.c.facts).join(hosts, hosts.c.id == outages.c.host_id).where(
        hosts.c.away_since.is_(None) | (hosts.c.away_since != outages.c.since))).mappings().all()
    for row in over:
        connection.execute(delete(outages).where(outages.c.host_id == row["host_id"]))
        log.warning("host %s answers again", row["host_id"])
        if row["fenced_at"] is not None and row["boot"] and row["boot"] == (row["facts"] or {}).get("boot"):
            log.error("host %s was not off when that was said: it runs since before that, and may have run guests that were "
                      "started elsewhere; look at what fences it", row["host_id"])
    return len(over)


def _note(connection: Connection, host_id: str) -> None:
    row = connection.execute(select(hosts.c.away_since, hosts.c.facts).where(hosts.c.id == host_id)).mappings().one()
    connection.execute(insert(outages).values(host_id=host_id, since=row["away_since"],
                                              boot=(row["facts"] or {}).get("boot", "")))
    log.warning("host %s has failed: it has not answered for too long", host_id)


def _away(connection: Connection, host_id: str) -> RowMapping:
    """The row of a host that does not answer; raises SkysailError for another one."""
    row = connection.execute(select(hosts).where(hosts.c.id == host_id)).mappings().first()
    if row is None:
        raise SkysailError(f"there is no host {host_id}", "see: sudo ./skysail host list")
    if row["away_since"] is None:
        raise SkysailError(f"the host {host_id} {'is not spoken with' if row['refused'] else 'answers'}",
                           f"empty it: sudo ./skysail host drain {host_id}")
    if _beside(row["address"]):
        raise SkysailError(f"the host {host_id} is the controller's own machine", "it cannot be off")
    return row


def _most_answer(connection: Connection) -> bool:
    """Whether half of the hosts, or more, answer."""
    known, silent = (connection.execute(select(func.count()).select_from(hosts).where(seen)).scalar_one() for seen in (
        hosts.c.seen_at.is_not(None), hosts.c.away_since.is_not(None)))
    return silent * 2 <= known


def _beside(address: str) -> bool:
    """Whether a host is on its controller's machine, and goes with it."""
    return address.startswith("unix:")


def _pause(tries: int) -> float:
    return float(min(FIRST_PAUSE_SECONDS * 2.0 ** min(max(tries, 0), 20), LONGEST_PAUSE_SECONDS))


def _find(connection: Connection, host_id: str) -> RowMapping | None:
    return connection.execute(select(outages).where(outages.c.host_id == host_id)).mappings().first()


def _stays_away(connection: Connection, outage: RowMapping) -> bool:
    """Whether the host was not heard since the outage began. Whoever hears it writes so before it is sent anything."""
    since = connection.execute(select(hosts.c.away_since).where(hosts.c.id == outage["host_id"])).scalar()
    return bool(since == outage["since"])


def _change(connection: Connection, host_id: str, **values: Any) -> None:
    connection.execute(update(outages).where(outages.c.host_id == host_id).values(**values))
