"""The variants of attention on the device: Hopper's prefill by the 2 x rule, the others by the bits of the two launches."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import cases, prefill_hopper, variants
from kernels.attention.cases import AttentionCase
from kernels.ops import PagedBatch, PagedKV
from tests.kernels.checks_attention import MIXED_CASES, VARIANT_CHECKS, Check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EACH = [
    pytest.param(check, case, dtype, id=f"{name.split('/')[1]}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for name, (cases, check, dtypes) in VARIANT_CHECKS.items()
    for case in cases
    for dtype in dtypes
]


@pytest.mark.parametrize(("check", "case", "dtype"), EACH)
def test_variant(check: Check, case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, dtype, "cuda", monkeypatch)


def test_a_prompt_alone_equals_in_a_crowd() -> None:
    """Hopper's prefill: neither neighbours nor the turns that its programs take change a bit."""
    case = AttentionCase("", "", ((1, 300), (130, 513), (300, 300), (2, 900)), 4, 1, 128)
    q, kv = cases.build(case, torch.bfloat16, "cuda")
    if not prefill_hopper.can_run(q, kv, case.spec):
        pytest.skip("written for compute capability 9.0")
    chosen = frozenset({variants.HOPPER_PREFILL})
    together = variants.attend_by(chosen, q, kv, case.spec)
    starts = kv.batch.query_start.tolist()
    for row in range(1, 4):
        only, tokens = slice(row, row + 1), slice(starts[row], starts[row + 1])
        start = torch.tensor([0, starts[row + 1] - starts[row]], dtype=torch.int32, device="cuda")
        context = kv.batch.context_len[only]
        batch = PagedBatch(kv.batch.slots[tokens], kv.batch.block_table[only], start, context, 0, 300, 900)
        alone = variants.attend_by(chosen, q[tokens], PagedKV(kv.keys, kv.values, batch), case.spec)
        assert torch.equal(alone, together[tokens])


@pytest.mark.parametrize("name", [variants.TWO_STREAMS, variants.MIXED, variants.HOPPER_PREFILL])
def test_a_variant_can_be_captured(name: str) -> None:
    """A graph forks and joins as the variant does, holds its descriptors, and is right when it is replayed."""
    case = MIXED_CASES[0]
    q, kv = cases.build(case, torch.bfloat16, "cuda")
    expected = variants.attend_by(frozenset({name}), q, kv, case.spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = variants.attend_by(frozenset({name}), q, kv, case.spec)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)
