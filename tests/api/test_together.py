"""Works that are waited for together end together."""

from __future__ import annotations

import asyncio

import pytest

from service.api.together import together


async def value(number: int, done: list[int], delay_s: float = 0.0) -> int:
    await asyncio.sleep(delay_s)
    done.append(number)
    return number


async def broken() -> int:
    raise ValueError("broken")


def test_results_in_order() -> None:
    async def run() -> None:
        assert await together(value(number, [], 0.01 * (3 - number)) for number in range(3)) == [0, 1, 2]
        assert await together([]) == []

    asyncio.run(run())


def test_the_first_to_fail_ends_the_others() -> None:
    done: list[int] = []

    async def run() -> None:
        with pytest.raises(ValueError, match="broken"):
            await together([value(1, done, 30), broken(), value(2, done, 30)])
        assert len(asyncio.all_tasks()) == 1, "something goes on"

    asyncio.run(run())
    assert done == []
