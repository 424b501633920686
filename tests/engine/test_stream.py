"""A request's stream: batches, ends, aborts, and what leaving early does."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.messages import Event, Usage
from service.engine.stream import Stream, error_of
from service.errors import DeadlineError, EngineError, OverloadedError, RequestError
from tests.fakes import generate

USAGE = Usage(3, 0, 1, 0.0, 0.0, 0.0)


def end(choice: int = 0, finish: str = "length") -> Event:
    return Event("a", choice, [9], finish=finish, usage=USAGE)


def make(n: int = 1) -> tuple[Stream, list[tuple[int | None, bool]]]:
    aborts: list[tuple[int | None, bool]] = []
    return Stream(generate("a", n=n), lambda _, choice, finished: aborts.append((choice, finished))), aborts


def test_one_batch_holds_what_one_delivery_brought() -> None:
    async def scenario() -> list[list[Event]]:
        stream, aborts = make(n=2)
        batches = []

        async def read() -> None:
            async for events in stream.batches():
                batches.append(events)

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        stream.push(Event("a", 0, [1]))
        stream.push(Event("a", 1, [2]))
        await asyncio.sleep(0.01)
        stream.push(end(0))
        stream.push(end(1))
        await asyncio.wait_for(reader, 5)
        assert aborts == []
        return batches

    assert asyncio.run(scenario()) == [[Event("a", 0, [1]), Event("a", 1, [2])], [end(0), end(1)]]


def test_what_came_before_the_reader_is_not_lost() -> None:
    async def scenario() -> list[Event]:
        stream, _ = make()
        stream.push(Event("a", 0, [1]))
        stream.push(end())
        return [event async for event in stream]

    assert [event.tokens for event in asyncio.run(scenario())] == [[1], [9]]


def test_nothing_follows_the_end_of_a_choice() -> None:
    stream, _ = make(n=2)
    assert stream.push(end(0))
    assert not stream.push(end(0))
    assert not stream.push(Event("a", 0, [1]))
    assert not stream.push(Event("a", 7, [1]))
    assert stream.open_choices == {1}
    assert stream.num_generated == 1


@pytest.mark.parametrize("way", ["break", "exception", "cancel", "leave"])
def test_leaving_early_aborts_once(way: str) -> None:
    async def read(stream: Stream) -> None:
        async for _ in stream:
            if way == "break":
                break
            if way == "exception":
                raise KeyError
            if way == "leave":
                stream.leave()
                break

    async def scenario() -> None:
        stream, aborts = make(n=2)
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        if way != "cancel":
            stream.push(Event("a", 0, [1]))
        else:
            reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(0)
        assert aborts == [(None, False)]
        # The ends still count, and nothing is kept for a reader that is gone.
        assert stream.push(end(0, "abort"))
        assert stream.push(end(1, "abort"))
        assert stream.is_finished
        assert stream._pending == []

    asyncio.run(scenario())


def test_aborts_are_sent_once_per_choice() -> None:
    stream, aborts = make(n=3)
    stream.push(end(0))
    stream.abort(0)
    stream.abort(1, finished=True)
    stream.abort(1)
    stream.abort()
    stream.abort()
    assert aborts == [(1, True), (None, False)]


def test_ends_have_the_error_that_fits() -> None:
    def failed(status: int) -> Event:
        return Event("a", 0, [], finish="error", usage=USAGE, error="why", error_status=status)

    assert error_of(end()) is None
    assert isinstance(error_of(end(finish="deadline")), DeadlineError)
    assert isinstance(error_of(failed(400)), RequestError)
    assert isinstance(error_of(failed(429)), OverloadedError)
    assert isinstance(error_of(failed(500)), EngineError)
    assert error_of(failed(500)).message == "why"
