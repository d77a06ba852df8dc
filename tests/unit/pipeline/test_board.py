"""The board between driver and workers, without Ray: its methods are coroutines."""

from __future__ import annotations

import asyncio
import time

from pipeline.workers.board import SAVES, Beat, EventBoard

BEAT = Beat(1, 7, "computing", 3, 9, 0.5, 0.1, 32.0)


def test_events_arrive_once_and_in_order_and_a_look_waits_for_the_first():
    async def course():
        board = EventBoard()
        look = asyncio.create_task(board.take(5.0))
        await asyncio.sleep(0.01)
        for number in range(3):
            await board.post({"kind": "note", "text": str(number)})
        first, second = await look, await board.take(0.01)
        return [event["text"] for event in first.events + second.events]

    assert asyncio.run(course()) == ["0", "1", "2"]


def test_only_the_last_beat_of_a_rank_is_kept_with_its_age():
    async def course():
        board = EventBoard()
        await board.beat(BEAT)
        await board.beat(Beat(1, 7, "saving", 4, 10, 0.5, None, 300.0))
        await asyncio.sleep(0.05)
        return (await board.take(0.0)).beats

    ((beat, age),) = asyncio.run(course())
    assert beat.doing == "saving" and 0.05 <= age < 1


def test_a_wish_wakes_who_waits_and_is_told_once():
    async def course():
        board = EventBoard()
        waiting = asyncio.create_task(board.wished(0))
        await asyncio.sleep(0)
        await board.wish(1, SAVES)
        number, wish = await waiting
        again = asyncio.create_task(board.wished(number))
        await asyncio.sleep(0.01)
        assert not again.done()
        await board.wish(2, ("stopped",))
        return wish, (await again)[1]

    assert asyncio.run(course()) == (1, 2)


async def is_still_wished(board: EventBoard) -> bool:
    """As a worker finds it that starts only now."""
    waiting = asyncio.create_task(board.wished(0))
    await asyncio.sleep(0.01)
    return waiting.done() or not waiting.cancel()


def test_a_checkpoint_grants_the_wish_for_one_and_not_the_wish_to_stop():
    async def after(event: str, wish: int, granted_by: tuple[str, ...]) -> bool:
        board = EventBoard()
        await board.wish(wish, granted_by)
        await board.post({"kind": event})
        return await is_still_wished(board)

    assert not asyncio.run(after("epoch", 1, SAVES))
    assert asyncio.run(after("step", 1, SAVES))
    assert asyncio.run(after("epoch", 2, ("stopped",)))
    assert not asyncio.run(after("stopped", 2, ("stopped",)))


def test_a_wish_can_be_taken_back_unless_another_one_has_come():
    async def course(another: bool) -> bool:
        board = EventBoard()
        number = await board.wish(2, ("stopped",))
        if another:
            await board.wish(2, ("stopped",))
        await board.forget(number)
        return await is_still_wished(board)

    assert not asyncio.run(course(another=False))
    assert asyncio.run(course(another=True))


def test_a_weaker_wish_leaves_the_stronger_one_as_it_is():
    async def course():
        board = EventBoard()
        await board.wish(2, ("stopped",))
        await board.wish(1, SAVES)
        await board.post({"kind": "checkpoint"})
        return await board.wished(0)

    assert asyncio.run(course()) == (2, 2)


def test_the_wait_for_an_event_ends_with_it_or_with_the_patience():
    async def course():
        board = EventBoard()
        await board.post({"kind": "stopped"})  # which was before
        started = time.monotonic()
        assert not await board.wait_for("stopped", 0.05)
        assert time.monotonic() - started >= 0.05
        waiting = asyncio.create_task(board.wait_for("stopped", 5.0))
        await asyncio.sleep(0)
        await board.post({"kind": "epoch"})
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await board.post({"kind": "stopped"})
        return await waiting

    assert asyncio.run(course())
