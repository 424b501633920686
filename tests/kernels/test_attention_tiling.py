"""The tables of attention's tiles: what may change a row's bits follows from the layer alone, and every layer finds a line."""

from __future__ import annotations

import itertools

import pytest

from kernels.attention.tiling import MAX_SPLITS, STAGES, TILES, Phase, decode_tiling, mixed_tiling, num_splits_of, prefill_tiling, split_of

WIDTHS = (48, 64, 80, 96, 128, 192, 256, 512, 576)
BATCHES = (1, 2, 16, 31, 32, 64, 256)
CONTEXTS = (1, 128, 129, 4096, 1 << 20)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_company_changes_stages_alone(width: int, itemsize: int) -> None:
    found = {
        (tiling.rows, tiling.keys, tiling.num_warps)
        for batch, context in itertools.product(BATCHES, CONTEXTS)
        for tiling in [decode_tiling(4, width, itemsize, batch, context)]
    }
    assert len(found) == 1
    found = {prefill_tiling(4, width, itemsize, False, batch, context)[:3] for batch, context in itertools.product(BATCHES, CONTEXTS)}
    assert len(found) == 1


def test_stages_do_follow_company() -> None:
    assert decode_tiling(4, 128, 2, 1, 4096).num_stages > decode_tiling(4, 128, 2, 64, 4096).num_stages
    assert decode_tiling(4, 128, 2, 1, 64).num_stages < decode_tiling(4, 128, 2, 1, 4096).num_stages


@pytest.mark.parametrize("table", [*TILES, *STAGES], ids=str)
def test_the_tables_are_in_order(table: tuple[Phase, int]) -> None:
    """Lines go from narrow to wide, and the last of the stages holds for whatever none before does."""
    widths = [line.head_width for line in TILES[table]]
    assert widths == sorted(widths)
    assert STAGES[table][-1][:3] == (0, 0, 0)


def test_a_tile_of_single_bytes_has_more_keys() -> None:
    for width in (128, 256):
        assert decode_tiling(4, width, 2, is_packed=True).keys == 2 * decode_tiling(4, width, 2).keys


def test_a_tile_has_room_for_a_whole_group() -> None:
    assert decode_tiling(32, 128, 2).rows == 32
    assert decode_tiling(1, 128, 2).rows == 16
    assert prefill_tiling(256, 256, 2).rows == 256


def test_a_neighbourhood_takes_fewer_keys() -> None:
    assert prefill_tiling(3, 64, 2, has_near=True).keys < prefill_tiling(3, 64, 2).keys
    assert prefill_tiling(3, 256, 4, has_near=True) == prefill_tiling(3, 256, 4)


@pytest.mark.parametrize(("width", "itemsize", "window"), [(256, 2, 512), (128, 2, 1024), (64, 2, 37), (64, 4, 1000)])
def test_a_window_is_read_by_one_program(width: int, itemsize: int, window: int) -> None:
    """Wherever the window begins in its first tile, and however long the context."""
    tile = decode_tiling(1, width, itemsize).keys
    split = split_of(width, itemsize, window, tile)
    assert split % tile == 0
    assert all((context - (context - window) // tile * tile) <= split for context in range(window, window + 2 * tile))
    assert num_splits_of(1 << 20, window, tile, split) == 1


def test_a_large_window_is_split_as_a_context_is() -> None:
    tile = decode_tiling(1, 256, 2).keys
    split = split_of(256, 2, 4096, tile)
    assert split == split_of(256, 2, None, tile)
    assert num_splits_of(1 << 20, 4096, tile, split) == 17
    assert num_splits_of(1 << 20, None, tile, split) == MAX_SPLITS
    assert num_splits_of(1, None, tile, 256) == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [64, 128])
def test_one_launch_for_both_sums_as_two_do(width: int, itemsize: int) -> None:
    assert mixed_tiling(4, width, itemsize).keys == prefill_tiling(4, width, itemsize).keys
    assert mixed_tiling(4, width, itemsize).num_warps == decode_tiling(4, width, itemsize).num_warps
