"""Pictures that are kept for a while: for an hour by a clock of ours, within a bound of bytes, under names that nobody can guess."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from service.api.auth import KEPT_PICTURES, is_public
from service.api.gallery import LIFETIME_S, Gallery, gallery_router
from service.errors import NotFoundError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept(gallery: Gallery, data: bytes) -> str:
    """Its name."""
    path = gallery.keep(data, "image/png")
    assert path.startswith(KEPT_PICTURES)
    return path.removeprefix(KEPT_PICTURES)


def has(gallery: Gallery, name: str) -> bool:
    try:
        gallery.find(name)
    except NotFoundError:
        return False
    return True


def test_what_is_kept_is_found_by_its_name_alone() -> None:
    gallery = Gallery()
    names = [kept(gallery, bytes([number])) for number in range(50)]
    assert len(set(names)) == 50
    assert all(len(name) == 32 for name in names)  # 24 bytes of chance
    assert [gallery.find(name).data for name in names] == [bytes([number]) for number in range(50)]
    for wrong in ("", names[0][:-1], names[0] + "A", names[0].swapcase()):
        with pytest.raises(NotFoundError):
            gallery.find(wrong)


def test_its_hour_begins_when_it_is_kept_and_not_when_it_is_asked_for() -> None:
    clock = Clock()
    gallery = Gallery(clock=clock)
    first = kept(gallery, b"first")
    clock.now += LIFETIME_S / 2
    second = kept(gallery, b"second")
    clock.now += LIFETIME_S / 2 - 0.5
    assert has(gallery, first)
    clock.now += 0.5
    assert not has(gallery, first)
    assert has(gallery, second)
    clock.now += LIFETIME_S / 2
    assert not has(gallery, second)


def test_the_oldest_make_room() -> None:
    gallery = Gallery(max_bytes=100, clock=Clock())
    names = [kept(gallery, bytes(40)) for _ in range(2)]
    names.append(kept(gallery, bytes(20)))
    assert [has(gallery, name) for name in names] == [True, True, True]  # exactly as many bytes as may be
    names.append(kept(gallery, b"."))
    assert [has(gallery, name) for name in names] == [False, True, True, True]
    names.append(kept(gallery, bytes(99)))
    assert [has(gallery, name) for name in names] == [False, False, False, True, True]


def test_one_that_is_larger_than_all_room_is_kept_until_the_next() -> None:
    gallery = Gallery(max_bytes=100, clock=Clock())
    small, large = kept(gallery, b"small"), kept(gallery, bytes(1000))
    assert [has(gallery, name) for name in (small, large)] == [False, True]
    after = kept(gallery, b"after")
    assert [has(gallery, name) for name in (large, after)] == [False, True]


def test_what_has_expired_takes_no_room() -> None:
    clock = Clock()
    gallery = Gallery(max_bytes=100, clock=clock)
    kept(gallery, bytes(90))
    clock.now += LIFETIME_S
    names = [kept(gallery, bytes(50)) for _ in range(2)]
    assert all(has(gallery, name) for name in names)


def test_the_route_sends_the_file_as_what_it_is_and_needs_no_key() -> None:
    gallery, app = Gallery(), FastAPI()
    app.include_router(gallery_router(gallery))
    path = gallery.keep(b"\x89PNG", "image/webp")

    async def fetched() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    answer = asyncio.run(fetched())
    assert (answer.status_code, answer.content) == (200, b"\x89PNG")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "private" in answer.headers["cache-control"]
    assert is_public(path)
