"""A model with windows, its keys and values in each dtype: how far logits move, and that blocks may pass from one kind of layer to another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.models import SHAPES, RandomSource
from kernels.ops import select_ops
from service.model.transformer import Precision, Transformer, build_transformer
from tests.parity.steps import Steps

FP8 = torch.float8_e4m3fn
IDS = torch.randint(500, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Two layers with a window of 24 and a sink of 4, two that see everything."""
    cpu = torch.device("cpu")
    config = SHAPES["tiny"]
    return build_transformer(config, RandomSource(config, cpu), select_ops("reference"), precision=Precision(torch.float32), device=cpu)


def steps(model: Transformer, dtype: torch.dtype, local_dtype: torch.dtype | None = torch.bfloat16) -> Steps:
    return Steps(model, dtype=dtype, local_dtype=local_dtype, num_blocks=120)


def logits(desk: Steps, sequence: int = 0) -> Tensor:
    """Of IDS: a prompt in two chunks, then token by token."""
    pieces = [IDS[:37], IDS[37:50], *([token] for token in IDS[50:])]
    return torch.cat([desk.run([(sequence, piece)])[0] for piece in pieces])


def test_logits_move_by_no_more_than_a_number_is_rounded(model: Transformer) -> None:
    exact = logits(steps(model, torch.float32, None))

    def moved(dtype: torch.dtype, local_dtype: torch.dtype | None = torch.bfloat16) -> float:
        return float((logits(steps(model, dtype, local_dtype)) - exact).norm() / exact.norm())

    narrow = moved(FP8)
    assert moved(torch.bfloat16, None) < moved(torch.int8) < narrow < 1 / 16  # which is the most that e4m3 rounds a number by
    assert moved(torch.int8) < 1 / 127  # of a head's largest number: the distance of two of its numbers
    assert narrow < moved(FP8, None), "layers with a window were quantised all the same"


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_block_serves_one_kind_of_layer_after_the_other(model: Transformer, dtype: torch.dtype) -> None:
    """Given back full of what another group wrote and of rubbish, blocks make no bit of the next sequence's logits another."""
    fresh = logits(steps(model, dtype))
    desk = steps(model, dtype)
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
