"""Every kernel on Triton's interpreter: the tiny cases, and the small ones in the long run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention import cases as attention_cases
from kernels.attention.triton import attend
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.linear.reference import quantize_int8
from kernels.norm import cases as norm_cases
from kernels.ops import LayerSpec, LayerWeights, PagedBatch, PagedKV, select_ops
from kernels.sample import cases as sample_cases
from kernels.sample.noise import gumbel, noise_words
from kernels.sample.triton import gumbel as noise_of
from kernels.sample.triton import noise_word
from tests.kernels import checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sized(cases: Sequence[Any]) -> list[Any]:
    """tiny cases as they are, small ones marked long; the others need a device."""
    marks = {"tiny": (), "small": (pytest.mark.long,)}
    return [pytest.param(case, id=case.name, marks=marks[case.size]) for case in cases if case.size in marks]


@pytest.mark.parametrize("case", sized(attention_cases.CASES))
def test_attention(case: attention_cases.AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn: the dtype changes how a tile is rounded, the case how it is bounded."""
    dtype = DTYPES[attention_cases.CASES.index(case) % 3]
    checks.check_attention(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in attention_cases.CASES if case.name == "mixed")
    checks.check_attention(case, dtype, "cpu", monkeypatch)


def test_attention_alone_equals_in_a_crowd() -> None:
    """A decode row's bits must not depend on the batch: neither on its neighbours nor on how long the longest of them is."""
    case = next(case for case in attention_cases.CASES if case.name == "ragged_decodes")
    q, kv = attention_cases.build(case, torch.float32)
    together = attend(q, kv, case.spec)
    batch = kv.batch
    for row in (0, 2):
        only = slice(row, row + 1)
        start = torch.tensor([0, 1], dtype=torch.int32)
        alone = PagedBatch(batch.slots[only], batch.block_table[only], start, batch.context_len[only], 1, 0, int(batch.context_len[row]))
        assert torch.equal(attend(q[only], PagedKV(kv.keys, kv.values, alone), case.spec), together[only])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sized(kv_write_cases.CASES))
def test_kv_write(case: kv_write_cases.KVWriteCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_kv_write(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sized(norm_cases.CASES))
def test_norm(case: norm_cases.NormCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_norm(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sized(gated_cases.CASES))
def test_gated(case: gated_cases.GatedCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_gated(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sized(linear_cases.CASES))
def test_linear(case: linear_cases.LinearCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_linear(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("case", sized(sample_cases.CASES))
def test_sample(case: sample_cases.SampleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_sample(case, "cpu", monkeypatch)


def test_the_back_end_computes_a_layer() -> None:
    """Every op through `select_ops`, chained as a model chains them, against the reference back end."""
    case = next(case for case in attention_cases.CASES if case.name == "mixed")
    width, hidden, heads = 48, 40, case.num_heads + 2 * case.num_kv_heads
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    angles = torch.rand(100, case.head_width // 2) * 6.3
    weights = LayerWeights(
        spec=LayerSpec(case.num_heads, case.num_kv_heads, case.head_width, case.spec, 1e-5, "silu"),
        attention_norm=torch.randn(width),
        qkv=matrix(heads * case.head_width, width),
        out=matrix(width, case.num_heads * case.head_width),
        mlp_norm=torch.randn(width),
        gate_up=matrix(2 * hidden, width),
        down=matrix(width, hidden),
        rotary=torch.stack((angles.cos(), angles.sin()), dim=1),
        qkv_bias=torch.randn(heads * case.head_width),
    )
    table, num_tokens = quantize_int8(torch.randn(30, width)), sum(n for n, _ in case.sequences)
    ids, positions = torch.randint(30, (num_tokens,)), torch.randint(100, (num_tokens,))
    head = matrix(30, width)
    results = []
    for ops in (select_ops("triton"), select_ops("reference")):
        _, kv = attention_cases.build(case, torch.float32)
        x = ops.embed(ids, table, torch.float32)
        q, residual = ops.qkv(x, None, weights, positions, kv)
        y = ops.attend(q, kv, case.spec)
        x, residual = ops.out_mlp(y, residual, weights)
        normed, residual = ops.rms_norm(x, residual, weights.mlp_norm, 1e-5)
        logits = ops.linear(normed, ops.pack(head))
        _, rows = sample_cases.build(sample_cases.SampleCase("", "", num_tokens, 30, temperature=0.0))
        results.append((q, y, x, residual, logits, ops.sample(logits, rows).ids))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@triton.jit
def words_kernel(seeds_ptr, positions_ptr, words_ptr, noise_ptr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    token = tl.arange(0, V)
    one = tl.zeros([1], dtype=tl.int32)
    word = noise_word(tl.load(seeds_ptr + row + one), tl.load(positions_ptr + row + one), token)
    tl.store(words_ptr + row * V + token, word.to(tl.int64))
    tl.store(noise_ptr + row * V + token, noise_of(word))


def test_noise_words_are_equal_integers() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    positions = torch.tensor([0, 2**31, 5, 2**40, 1, 7])
    words = torch.zeros((6, 256), dtype=torch.int64)
    values = torch.zeros((6, 256))
    words_kernel[(6,)](seeds, positions, words, values, V=256)
    expected = noise_words(seeds, positions, 256)
    assert torch.equal(words, expected)
    torch.testing.assert_close(values, gumbel(expected), rtol=1e-6, atol=1e-6)
