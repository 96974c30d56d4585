"""PostgreSQL as the store: who is let in, what is refused, and what several that write at once do to each other."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.exc import DBAPIError

import stores
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.store import postgres
from skysail.store.database import Database
from skysail.store.postgres import Postgres
from skysail.store.schema import accounts
from skysail.store.visit import visit


@pytest.fixture
def url() -> str:
    return stores.server().create()


@pytest.fixture
def pair(url: str) -> Iterator[tuple[Database, Database]]:
    """Two controllers' stores over one database."""
    both = Database(Postgres(url)), Database(Postgres(url))
    both[0].migrate()
    yield both
    for one in both:
        one.close()


def count(database: Database) -> int:
    with database.transaction(write=False) as connection:
        return int(connection.execute(select(func.count()).select_from(accounts)).scalar_one())


def put(database: Database, name: str) -> None:
    with database.transaction() as connection:
        connection.execute(insert(accounts).values(id=name, name=name, created_at=0.0))


def test_a_password_comes_from_its_file_and_is_told_nobody(tmp_path: Path, url: str) -> None:
    stores.server().run("DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'guarded') THEN "
                        "CREATE ROLE guarded LOGIN PASSWORD 'open sesame'; END IF; END $$")
    password = tmp_path / "password"
    guarded = url.replace("skysail@", "guarded@")
    password.write_text("open sesame\n")
    held = Database(Postgres(guarded, str(password)))
    with held.transaction(write=False) as connection:
        assert connection.exec_driver_sql("SELECT current_user").scalar_one() == "guarded"
    held.close()
    password.write_text("close sesame")
    with pytest.raises(SkysailError) as refused:
        Postgres(guarded, str(password)).check()
    assert "password authentication failed" in refused.value.what and "sesame" not in repr(refused.value.__cause__)
    for wrong in ("postgresql://me:sesame@h/d", "postgresql://me@h/d?password=sesame", "mysql://h/d", "postgresql://h"):
        (tmp_path / "skysail.toml").write_text(f'database = "{wrong}"\n')
        with pytest.raises(SkysailError) as unfit:
            load(str(tmp_path))
        assert "sesame" not in str(unfit.value)


def test_the_kernel_says_who_asks(url: str) -> None:
    """Peer authentication, by the server's own map: no secret anywhere."""
    Postgres(url).check()
    with pytest.raises(SkysailError, match="Peer authentication failed"):
        Postgres(url.replace("skysail@", "somebody@")).check()


def test_what_cannot_be_used_is_refused_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "controller").mkdir()
    nowhere = f"postgresql:///cloud?host={tmp_path}"
    with pytest.raises(SkysailError, match="cannot be reached") as refused:
        visit(Config(data=str(tmp_path), database=nowhere), lambda connection: 1, int)
    assert "docs/database.md" in refused.value.cure
    empty = stores.server().create()
    with pytest.raises(SkysailError, match="there is no cloud"):
        visit(Config(data=str(tmp_path), database=empty), lambda connection: 1, int)
    stores.server().run("CREATE DATABASE french TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C' "
                        "ICU_LOCALE 'fr' LOCALE_PROVIDER icu")
    latin = "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
    stores.server().run(latin)
    for name in ("french", "latin"):
        with pytest.raises(SkysailError, match="does not sort by code points"):
            Database(Postgres(stores.server().url(name))).migrate()


def test_one_transaction_writes_at_a_time_in_all_controllers(pair: tuple[Database, Database]) -> None:
    """Each takes the next number, having looked which are taken: none is taken twice, none fails."""
    def take(number: int) -> None:
        with pair[number % 2].transaction() as connection:
            taken = connection.execute(select(func.count()).select_from(accounts)).scalar_one()
            connection.execute(insert(accounts).values(id=str(taken), name=str(taken), created_at=0.0))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(120)))
    with pair[0].transaction(write=False) as connection:
        assert sorted(map(int, connection.execute(select(accounts.c.id)).scalars())) == list(range(120))


def test_one_that_reads_waits_for_nobody_and_sees_one_moment(pair: tuple[Database, Database]) -> None:
    first, second = pair
    put(first, "a")
    with second.transaction(write=False) as connection:
        query = select(func.count()).select_from(accounts)
        assert connection.execute(query).scalar_one() == 1
        put(first, "b")
        assert connection.execute(query).scalar_one() == 1
        with pytest.raises(DBAPIError, match="read-only"):
            connection.execute(insert(accounts).values(id="c", name="c", created_at=0.0))
    assert count(second) == 2


def test_one_that_stands_still_is_ended_and_the_others_go_on(
        pair: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "PATIENCE_SECONDS", 1)
    began, go = threading.Event(), threading.Event()

    def stand_still() -> None:
        with pair[0].transaction() as connection:
            connection.execute(insert(accounts).values(id="never", name="never", created_at=0.0))
            began.set()
            assert go.wait(60)

    with ThreadPoolExecutor(1) as pool:
        still = pool.submit(stand_still)
        assert began.wait(30)
        put(pair[1], "goes on")
        go.set()
        with pytest.raises(DBAPIError):
            still.result()
    with pair[1].transaction(write=False) as connection:
        assert connection.execute(select(accounts.c.name)).scalars().all() == ["goes on"]
    put(pair[0], "again")


def test_connections_that_were_lost_are_made_anew(pair: tuple[Database, Database]) -> None:
    first, second = pair
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: put(first, str(number)), range(8)))
    with second.transaction() as connection:
        connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                                   "WHERE datname = current_database() AND pid != pg_backend_pid()")
    put(first, "after")
    assert count(first) == 9

    stores.server().stop()
    with pytest.raises(DBAPIError):
        count(first)
    stores.server().start()
    assert count(first) == 9
    put(second, "later")


def test_a_refusal_of_what_was_written_leaves_the_connection_of_use(pair: tuple[Database, Database]) -> None:
    put(pair[0], "a")
    for _ in range(3):
        with pytest.raises(DBAPIError, match="duplicate key"):
            put(pair[1], "a")
    put(pair[1], "b")
    assert count(pair[0]) == 2


def test_who_writes_is_heard_by_all(pair: tuple[Database, Database]) -> None:
    async def hear() -> None:
        heard = pair[1].heard()
        pending: list[asyncio.Task[None]] = []

        async def next_within(seconds: float) -> bool:
            """Whether something is heard; what is waited for in vain is waited for the next time."""
            if not pending:
                pending.append(asyncio.ensure_future(anext(heard)))
            done, _ = await asyncio.wait(pending, timeout=seconds)
            if done:
                pending.pop().result()
            return bool(done)

        assert await next_within(60), "what was said before one listened may have been missed"
        await asyncio.to_thread(put, pair[0], "a")
        assert await next_within(60), "another one wrote"
        await asyncio.to_thread(count, pair[0])
        with pytest.raises(DBAPIError):
            await asyncio.to_thread(put, pair[0], "a")
        while await next_within(1):  # the one that was refused may be heard, but not for ever
            continue
        await asyncio.to_thread(put, pair[1], "b")
        assert await next_within(60), "also by itself"

        # Who is cut off comes again, and takes it that something was said meanwhile.
        await asyncio.to_thread(cut_off)
        assert await next_within(60)
        await heard.aclose()

    def cut_off() -> None:
        with pair[0].transaction() as connection:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%' "
                                       "AND datname = current_database()")

    asyncio.run(hear())


def test_what_a_transaction_tells_is_heard_with_its_commit(pair: tuple[Database, Database]) -> None:
    """More resources than one notification can name."""
    ids = {str(uuid.uuid4()) for _ in range(1000)}

    def tell(*told: str, name: str) -> None:
        with pair[0].transaction() as connection:
            pair[0].tell(connection, told)
            connection.execute(insert(accounts).values(id=name, name=name, created_at=0.0))

    async def hear() -> None:
        listening = pair[1].heard()
        assert await anext(listening) == (), "what was said before one listened may have been missed"
        await asyncio.to_thread(tell, "first", name="a")
        with pytest.raises(DBAPIError):
            await asyncio.to_thread(tell, "undone", name="a")
        await asyncio.to_thread(tell, *ids, "last", name="b")
        heard: set[str] = set()
        async with asyncio.timeout(60):
            while "last" not in heard:
                heard.update(await anext(listening))
        assert heard == {*ids, "first", "last"}
    asyncio.run(hear())
