"""How many questions to hosts begin at a time."""

from __future__ import annotations

import asyncio

import pytest

from skysail.hosts import turns
from skysail.hosts.turns import Turns


def test_so_many_at_a_time_and_each_comes() -> None:
    async def run() -> None:
        doing, most, done = 0, 0, 0

        async def ask(one: Turns) -> None:
            nonlocal doing, most, done
            async with one.turn():
                doing += 1
                most = max(most, doing)
                await asyncio.sleep(0)
                doing, done = doing - 1, done + 1

        shared = Turns(3)
        await asyncio.gather(*(ask(shared) for _ in range(50)))
        assert (most, done) == (3, 50)

    asyncio.run(run())


def test_one_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.01)

    async def run() -> None:
        shared, silent = Turns(1), asyncio.Event()

        async def ask() -> None:
            async with shared.turn():
                await silent.wait()

        waiting = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(20), shared.turn():
            pass
        silent.set()
        await asyncio.gather(*waiting)
        # Given up once each: there is one turn, as before.
        async with shared.turn():
            late = asyncio.create_task(ask())
            await asyncio.sleep(0)
            assert not late.done()
        await late

    asyncio.run(run())


def test_one_that_is_broken_off_gives_its_turn_back() -> None:
    async def run() -> None:
        shared = Turns(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), shared.turn():
                await asyncio.sleep(20)
        async with asyncio.timeout(20), shared.turn():
            pass

    asyncio.run(run())


def test_what_was_begun_goes_on_before_more_begins() -> None:
    async def run() -> None:
        shared, order = Turns(1), list[str]()

        async def meet(name: str) -> None:
            async with shared.turn():
                order.append(f"{name} begins")
                await asyncio.sleep(0)
            async with shared.turn(goes_on=True):
                order.append(f"{name} goes on")

        await asyncio.gather(*(meet(name) for name in "abcd"))
        assert order[:2] == ["a begins", "b begins"]  # which was given the turn before a asked again
        assert [order.index(f"{name} goes on") - order.index(f"{name} begins") for name in "abcd"] == [2] * 4

    asyncio.run(run())


def test_one_that_waits_no_more_does_not_keep_the_turn_that_it_was_given() -> None:
    async def run() -> None:
        shared = Turns(1)

        async def ask() -> None:
            async with shared.turn():
                pass

        async with shared.turn():
            first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
            await asyncio.sleep(0)
        first.cancel()  # it was given the turn, and did not begin yet
        async with asyncio.timeout(20):
            await second
            await ask()

    asyncio.run(run())
