"""Leases: all that there is to do is done by exactly one of those that live, and by nobody who was taken for dead."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import stores
from skysail.store import leases
from skysail.store.database import Database
from skysail.store.leases import LeaseLost, Shares
from skysail.store.postgres import Postgres

WORK = [f"work {number}" for number in range(60)]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    made = Database(Postgres(stores.server().create()) if request.param == "postgresql" else tmp_path / "skysail.sqlite")
    made.migrate()
    yield made
    made.close()


def controller(database: Database, place: str, work: list[str] | None = None) -> Shares:
    return Shares(database, place, lambda connection: WORK if work is None else work)


def held(*controllers: Shares) -> list[set[str]]:
    return [{name for name in WORK if one.find(name)} for one in controllers]


def confirmed(database: Database, one: Shares, name: str) -> bool:
    lease = one.find(name)
    assert lease is not None
    try:
        with database.transaction() as connection:
            lease.confirm(connection)
        return True
    except LeaseLost:
        return False


def test_all_of_it_is_done_by_one_of_those_that_live(database: Database) -> None:
    first, second, third = (controller(database, place) for place in "abc")
    first.renew()
    assert held(first) == [set(WORK)], "who is alone does all, at once"
    before = {name: first.find(name) for name in WORK}
    for _ in range(2):
        for one in (first, second, third):
            one.renew()
    shares = held(first, second, third)
    assert Counter(name for share in shares for name in share) == Counter(WORK), "each by exactly one"
    assert min(map(len, shares)) >= 10, "and everybody does a part"
    assert all(first.find(name) == before[name] for name in shares[0]), "what stays keeps its number"
    assert not first.renew(), "nothing changes while nobody comes or goes"


def test_the_work_of_one_that_leaves_is_taken_over_at_once(database: Database) -> None:
    first, second = controller(database, "a"), controller(database, "b")
    for _ in range(2):
        first.renew(), second.renew()
    first.leave()
    second.renew()
    assert held(first, second) == [set(), set(WORK)]


def test_one_that_stands_still_loses_its_work_and_writes_nothing(
        database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 0.4)
    still, other = controller(database, "a"), controller(database, "b")
    still.renew(), other.renew()
    still.renew(), other.renew()
    (name, *_) = held(still)[0]
    assert confirmed(database, still, name)
    while len(held(other)[0]) < len(WORK):
        time.sleep(0.05)
        other.renew()
    assert held(still)[0], "it believes that it has them"
    assert not confirmed(database, still, name) and confirmed(database, other, name)

    # Back again: it is given its part anew, with other numbers; those that it knew are of no use.
    before = still.find(name)
    monkeypatch.setattr(leases, "LIFE_SECONDS", 60.0)
    for _ in range(2):
        still.renew(), other.renew()
    assert still.find(name) != before
    assert Counter(name for share in held(still, other) for name in share) == Counter(WORK)


def test_one_that_could_not_say_so_for_a_while_judges_nobody(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody could write for some seconds, none is dead to the first one that can again."""
    monkeypatch.setattr(leases, "LIFE_SECONDS", 0.4)
    first, second = controller(database, "a"), controller(database, "b")
    for _ in range(2):
        first.renew(), second.renew()
    before = held(first, second)
    assert all(before)
    time.sleep(0.6)
    assert not first.renew() and not second.renew()
    assert held(first, second) == before
    # One that is dead is so to who is not: once that one could say so often enough, which a busy machine may keep it from.
    end = time.monotonic() + 60
    while held(first) != [set(WORK)]:
        assert time.monotonic() < end
        time.sleep(0.1)
        first.renew()


def test_who_comes_in_anothers_place_need_not_wait_for_its_end(database: Database) -> None:
    killed, successor = controller(database, "a"), controller(database, "a")
    killed.renew()
    successor.renew()
    assert held(successor) == [set(WORK)]
    assert not confirmed(database, killed, WORK[0]) and confirmed(database, successor, WORK[0])


def test_what_there_is_to_do_comes_and_goes(database: Database) -> None:
    work = [*WORK]
    one = controller(database, "a", work)
    one.renew()
    lease = one.find(WORK[0])
    assert lease is not None
    work.remove(WORK[0])
    assert one.renew() and one.find(WORK[0]) is None
    with pytest.raises(LeaseLost), database.transaction() as connection:
        lease.confirm(connection)
    work.append(WORK[0])
    assert one.renew() and one.find(WORK[0])
