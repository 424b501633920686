"""Every kernel on the device: the same cases and the same rule as on the interpreter, at every size but those meant for timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.ops import PagedBatch, PagedKV
from kernels.sample import cases as sample_cases
from tests.kernels import checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fitting(cases: Sequence[Any]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases if case.size != "bench"]


def attention_case(name: str) -> attention_cases.AttentionCase:
    return next(case for case in attention_cases.CASES if case.name == name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fitting(attention_cases.CASES))
def test_attention(case: attention_cases.AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.size == "huge" and dtype == torch.float32:
        pytest.skip("the half-width dtypes pass 2 ** 31 elements in half the memory")
    checks.check_attention(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("name", ["ragged_decodes", "long_decode"])
def test_decode_alone_equals_in_a_crowd(name: str) -> None:
    from kernels.attention.triton import attend

    case = attention_case(name)
    q, kv = attention_cases.build(case, torch.bfloat16, "cuda")
    together = attend(q, kv, case.spec)
    batch = kv.batch
    start = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    for row, (_, context) in enumerate(case.sequences):
        only = slice(row, row + 1)
        alone = PagedBatch(batch.slots[only], batch.block_table[only], start, batch.context_len[only], 1, 0, max(context, 1))
        assert torch.equal(attend(q[only], PagedKV(kv.keys, kv.values, alone), case.spec), together[only])


def test_a_graph_captured_on_short_contexts_is_right_for_long_ones() -> None:
    from kernels.attention.triton import attend

    case = attention_case("long_decode")
    q, kv = attention_cases.build(case, torch.bfloat16, "cuda")
    expected = attend(q, kv, case.spec)
    lengths = kv.batch.context_len.clone()
    kv.batch.context_len.zero_()
    attend(q, kv, case.spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(q, kv, case.spec)
    kv.batch.context_len.copy_(lengths)
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fitting(kv_write_cases.CASES))
def test_kv_write(case: kv_write_cases.KVWriteCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_kv_write(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fitting(norm_cases.CASES))
def test_norm(case: norm_cases.NormCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_norm(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fitting(gated_cases.CASES))
def test_gated(case: gated_cases.GatedCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_gated(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fitting(linear_cases.CASES))
def test_linear(case: linear_cases.LinearCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_linear(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("case", fitting(sample_cases.CASES))
def test_sample(case: sample_cases.SampleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_sample(case, "cuda", monkeypatch)
