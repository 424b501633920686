"""What every Triton kernel must do, case by case and on any device: earned tolerance, whole guards, untouched neighbours.

Shared by the run on the interpreter and the run on a GPU, so that both ask for the same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import reference as attention_reference
from kernels.gated import cases as gated_cases
from kernels.gated import reference as gated_reference
from kernels.kv_write import cases as kv_write_cases
from kernels.kv_write import reference as kv_write_reference
from kernels.linear import cases as linear_cases
from kernels.linear import reference as linear_reference
from kernels.norm import cases as norm_cases
from kernels.norm import reference as norm_reference
from kernels.ops import PagedKV
from kernels.sample import cases as sample_cases
from kernels.sample import reference as sample_reference
from tests.kernels.checks_kv import check_quantised_write, dequantised, widened
from tests.kernels.rule import assert_earned, assert_guards_whole, guard_module, guarded


def check_attention(case: attention_cases.AttentionCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention import triton

    q, kv = attention_cases.build(case, dtype, device)
    guards = guard_module(monkeypatch, triton)
    got = triton.attend(q, kv, case.spec)
    guards.check()
    exact = attention_reference.attend(q.double(), widened(kv), case.spec)
    assert_earned(got, attention_reference.attend(q, dequantised(kv, dtype), case.spec), exact)


def check_kv_write(case: kv_write_cases.KVWriteCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.kv_write import triton

    if case.pool != "plain":
        check_quantised_write(case, dtype, device, monkeypatch)
        return
    qkv, weights, positions, kv = kv_write_cases.build(case, dtype, device)
    shape = (kv.keys.shape[0], 2, *kv.keys.shape[1:])
    pool, memory = guarded(shape, dtype, device)
    plain_pool, exact_pool = pool.clone(), pool.double()
    guards = guard_module(monkeypatch, triton)
    got = triton.kv_write(qkv, weights, positions, PagedKV(pool[:, 0], pool[:, 1], kv.batch))
    guards.check()
    assert_guards_whole(memory)
    plain = kv_write_reference.kv_write(qkv, weights, positions, PagedKV(plain_pool[:, 0], plain_pool[:, 1], kv.batch))
    exact = kv_write_reference.kv_write(qkv.double(), weights, positions, PagedKV(exact_pool[:, 0], exact_pool[:, 1], kv.batch))
    assert_earned(got, plain, exact)
    is_written = torch.zeros(shape[0] * case.block_size, dtype=torch.bool, device=device)
    is_written[kv.batch.slots[kv.batch.slots >= 0]] = True
    by_place = pool.permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert bool((by_place[~is_written] == 77).all()), "a slot that no token has was written"
    assert_earned(pool, plain_pool, exact_pool)


def check_norm(case: norm_cases.NormCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.norm import triton

    x, residual, weight, eps = norm_cases.build(case, dtype, device)
    plain, plain_residual = norm_reference.rms_norm(x, residual, weight, eps)
    exact, _ = norm_reference.rms_norm(plain_residual.double(), None, weight.double(), eps)
    mine, memory = guarded(tuple(x.shape), dtype, device)
    mine.copy_(x if residual is None else residual)
    guards = guard_module(monkeypatch, triton)
    got, got_residual = triton.rms_norm(mine if residual is None else x, None if residual is None else mine, weight, eps)
    guards.check()
    assert_guards_whole(memory)
    assert torch.equal(got_residual, plain_residual)
    assert_earned(got, plain, exact)


def check_gated(case: gated_cases.GatedCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.gated import triton

    gate_up, activation = gated_cases.build(case, dtype, device)
    guards = guard_module(monkeypatch, triton)
    got = triton.gated(gate_up, activation)
    guards.check()
    assert_earned(got, gated_reference.gated(gate_up, activation), gated_reference.gated(gate_up.double(), activation))


def check_linear(case: linear_cases.LinearCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are whole numbers, so the result must be equal to the last bit, and a row must not know its neighbours."""
    from kernels.linear import triton

    x, weight = linear_cases.build(case, dtype, device)
    guards = guard_module(monkeypatch, triton)
    got = triton.linear(x, weight)
    guards.check()
    assert torch.equal(got, linear_reference.linear(x, weight))
    assert torch.equal(triton.linear(x[-1:], weight), got[-1:])


def check_sample(case: sample_cases.SampleCase, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, kept tokens and ids are the reference's; the logits stay as they were."""
    from kernels.sample import triton

    logits, rows = sample_cases.build(case, device)
    rows = replace(rows, logprobs=True, num_top=3)
    before = logits.clone()
    guards = guard_module(monkeypatch, triton)
    got = triton.sample(logits, rows)
    guards.check()
    expected = sample_reference.sample(logits, rows)
    assert torch.equal(logits, before)
    scores = sample_reference.penalised(logits, rows) / (case.temperature or 1.0)
    own = triton.scored(logits, rows)
    torch.testing.assert_close(own.scores, scores, rtol=1e-6, atol=1e-6)
    if case.temperature > 0:
        disputed = (own.scores >= triton.thresholds(own, rows)[:, None]) != (scores >= sample_reference.thresholds(scores, rows)[:, None])
        if case.size == "tiny":
            assert not bool(disputed.any())
        else:  # the kernel sums a nucleus in float32: of many thousand small scores, the last few may fall on either side
            assert float((scores.softmax(-1) * disputed).sum(-1).max()) < 1e-5
    assert got.ids.tolist() == expected.ids.tolist()
    assert got.logprobs is not None
    assert got.top_ids is not None
    assert expected.logprobs is not None
    torch.testing.assert_close(got.logprobs, expected.logprobs)
    assert got.top_ids.shape == (case.num_rows, 3)
