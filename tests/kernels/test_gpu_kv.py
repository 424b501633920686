"""Quantised keys and values on the device, beside the cases, which run with all the others: every number, neighbours, a whole model."""

from __future__ import annotations

import pytest
import torch

from bench.models import SHAPES, build_runner, step_of
from kernels.attention import cases as attention_cases
from kernels.ops import PagedBatch, PagedKV, select_ops
from tests.runner.hybrid import FP8, desk_of, hybrid, logits, moved

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NO_IDS = torch.zeros(0, dtype=torch.int32)
NOTHING = PagedBatch(NO_IDS, NO_IDS, NO_IDS, NO_IDS, num_decodes=0, max_query_len=0, max_context_len=0)


def test_e4m3_is_written_as_torch_writes_it() -> None:
    from tests.kernels import checks_e4m3

    checks_e4m3.check_encoding("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_number_is_unpacked_without_rounding(dtype: torch.dtype) -> None:
    from tests.kernels import checks_e4m3

    checks_e4m3.check_unpacking(dtype, "cuda")


@pytest.mark.parametrize("name", ["int8", "fp8_long"])
def test_decode_alone_equals_in_a_crowd(name: str) -> None:
    from kernels.attention.triton import attend

    case = next(case for case in attention_cases.CASES if case.name == name)
    q, kv = attention_cases.build(case, torch.bfloat16, "cuda")
    together = attend(q, kv, case.spec)
    batch = kv.batch
    start = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    for row in range(batch.num_decodes):
        only, context = slice(row, row + 1), case.sequences[row][1]
        alone = PagedBatch(batch.slots[only], batch.block_table[only], start, batch.context_len[only], 1, 0, max(context, 1))
        got = attend(q[only], PagedKV(kv.keys, kv.values, alone, kv.key_scales, kv.value_scales), case.spec)
        assert torch.equal(got, together[only])


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_model_with_windows_is_as_close_as_plain_pytorch(dtype: torch.dtype) -> None:
    """In bfloat16, against float32 throughout: at most twice as far off as the reference back end with the same pool."""
    exact = logits(desk_of(hybrid(), torch.float32, None))
    ours, plain = (
        moved(logits(desk_of(hybrid(ops, torch.bfloat16, "cuda"), dtype, device="cuda")), exact) for ops in ("triton", "reference")
    )
    assert ours <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_captured_step_is_the_eager_one(dtype: torch.dtype) -> None:
    """Two sequences of 200 tokens, and one more each, whose keys and values are written twice."""
    runner = build_runner(
        SHAPES["tiny"],
        select_ops("triton"),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        num_blocks=2 * 3 * 32,
        kv_dtype=dtype,
    )
    assert {kv.keys.dtype for kv in runner.cache.of_layers([NOTHING] * runner.num_groups)} == {torch.bfloat16, dtype}
    runner.forward(step_of(runner, [(0, list(range(3, 203))), (0, list(range(103, 303)))], 512))
    step = step_of(runner, [(200, [7]), (200, [8])], 512)
    eager = runner.logits(runner.forward(step)).clone()
    runner.capture_graphs(2)
    assert torch.equal(runner.logits(runner.forward(step)), eager)
