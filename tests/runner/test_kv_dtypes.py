"""A model with windows, its keys and values in each dtype: how far logits move, and that blocks may pass between kinds of layers."""

from __future__ import annotations

import pytest
import torch

from service.model.transformer import Transformer
from tests.runner.hybrid import FP8, desk_of, hybrid, logits, moved


@pytest.fixture(scope="module")
def model() -> Transformer:
    return hybrid()


def test_logits_move_by_no_more_than_a_number_is_rounded(model: Transformer) -> None:
    exact = logits(desk_of(model, torch.float32, None))
    plain, whole, narrow = (
        moved(logits(desk_of(model, dtype, None if dtype is torch.bfloat16 else torch.bfloat16)), exact)
        for dtype in (torch.bfloat16, torch.int8, FP8)
    )
    assert plain < whole < narrow < 1 / 16  # which is the most that e4m3 rounds a number by
    assert whole < 1 / 127  # of a head's largest number: the distance of two of its numbers
    assert narrow < moved(logits(desk_of(model, FP8, None)), exact), "layers with a window were quantised all the same"


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_block_serves_one_kind_of_layer_after_the_other(model: Transformer, dtype: torch.dtype) -> None:
    """Given back full of what another group wrote and of rubbish, blocks make no bit of the next sequence's logits another."""
    fresh = logits(desk_of(model, dtype))
    desk = desk_of(model, dtype)
    logits(desk)
    desk.free, before = [], desk.tables[0]
    desk.forget(0)
    desk.free.reverse()
    assert torch.equal(logits(desk, 1), fresh)
    local = [group.window is not None for group in desk.layout.groups]
    for kind in (True, False):
        given, taken = (
            {block for table, is_local in zip(tables, local, strict=True) if is_local == wanted for block in table}
            for tables, wanted in ((before, kind), (desk.tables[1], not kind))
        )
        assert given & taken, "no block came from the other kind"
