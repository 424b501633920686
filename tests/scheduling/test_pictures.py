"""Slices say where the picture of each code begins, the same however a stream is cut, found or computed again."""

from __future__ import annotations

from service.scheduling.plan import StepPlan
from service.vocabulary import PictureIds
from tests.scheduling.model import Bench, grid_starts_of, make_bench, make_request

PICTURES = PictureIds(first_code=4, num_codes=4, rows=2, columns=3, begin_id=8, frame_id=9, end_id=10)
FILM = (1, 2, 8, *(4, 5, 6, 7, 4, 5), 9, *(7, 6, 5, 4, 7, 6), 10, 3)


def slices(bench: Bench) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, tokens, grid_starts) of every slice until nothing is left."""
    found = []
    while bench.scheduler.has_work:
        plan: StepPlan | None = bench.step()
        assert plan is not None
        found += [(piece.start, len(piece.tokens), piece.grid_starts) for piece in plan.slices]
    return found


def test_a_film_at_once() -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request(prompt=FILM, max_tokens=1))
    assert slices(bench) == [(0, 18, (-1, -1, -1, *[3] * 6, -1, *[10] * 6, -1, -1))]


def test_chunks_continue_a_picture_and_text_says_nothing() -> None:
    bench = make_bench(pictures=PICTURES, max_batch_tokens=5)
    bench.add(make_request(prompt=(*FILM, 1, 2, 3, 1), max_tokens=1))
    assert [piece[2] for piece in slices(bench)] == [
        (-1, -1, -1, 3, 3),
        (3, 3, 3, 3, -1),
        (10, 10, 10, 10, 10),
        (10, -1, -1, -1, -1),
        (),
    ]


def test_codes_behind_a_full_picture_begin_the_next() -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request(prompt=(1, *[4] * 14), max_tokens=1))
    assert slices(bench) == [(0, 15, (-1, *[1] * 6, *[7] * 6, 13, 13))]


def test_a_prefix_hit_inside_a_picture() -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request("a", FILM, max_tokens=1))
    slices(bench)
    bench.add(make_request("b", (*FILM[:8], 7, 9, 5), max_tokens=1))
    assert slices(bench) == [(8, 3, (3, -1, 10))]


def test_drawn_codes_and_preemption() -> None:
    """Two long answers in a pool that can't hold both; the fake runner checks every slice against its whole history."""
    bench = make_bench(pictures=PICTURES, num_blocks=12)
    for name in "abc":
        bench.add(make_request(name, FILM[: 6 + ord(name) % 3], max_tokens=30, seed=ord(name)))
    pieces = slices(bench)
    assert bench.scheduler.stats.preemptions > 0
    drawn = [piece for piece in pieces if piece[1] == 1 and piece[2]]
    assert len({start for start, _, _ in drawn}) > 3, "hardly a code was drawn"


def test_nothing_is_computed_for_a_model_without_pictures() -> None:
    bench = make_bench()
    bench.add(make_request(prompt=FILM, max_tokens=3))
    assert [piece[2] for piece in slices(bench)] == [(), (), ()]
    assert grid_starts_of(FILM, PICTURES)[3] == 3
