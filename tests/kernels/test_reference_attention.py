"""The attention reference against torch's own scaled dot product with a mask written out, and what it must not read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.cases import CASES, AttentionCase, build
from kernels.attention.reference import attend
from kernels.ops import PagedKV
from tests.kernels.checks_kv import dequantised

CPU_CASES = [case for case in CASES if case.size in ("tiny", "small")]


def contiguous(pool: Tensor, kv: PagedKV, index: int, context: int) -> Tensor:
    """[K, context, H] by walking the block table position by position; hidden NaN become zeros, which the mask then hides."""
    block_size = pool.shape[2]
    rows = [pool[int(kv.batch.block_table[index, at // block_size]), :, at % block_size] for at in range(context)]
    return torch.stack(rows, dim=1).nan_to_num(nan=0.0)


def sees(position: int, key: int, case: AttentionCase, start: int) -> bool:
    """The contract's own words. start: where the picture begins that the query is a code of, -1 without one."""
    if key > position or not (case.window is None or position - key < case.window or key < case.sink):
        return False
    if case.near is None or start < 0 or key < start or key == position:
        return True
    next_row, next_column = divmod(position - start + 1, case.near.columns)
    row, column = divmod(key - start, case.near.columns)
    return next_row - row <= case.near.row_radius and abs(next_column - column) <= case.near.column_radius


def naive(case: AttentionCase, q: Tensor, kv: PagedKV) -> Tensor:
    kv, outputs, row = dequantised(kv, torch.float32), [], 0
    for index, (num_queries, context) in enumerate(case.sequences):
        rows = q[row : row + num_queries].double().transpose(0, 1)
        row += num_queries
        if context == 0:
            outputs.append(torch.zeros_like(rows))
            continue
        keys, values = (contiguous(pool, kv, index, context).double() for pool in (kv.keys, kv.values))
        keys, values = (x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=0) for x in (keys, values))
        starts = case.grid_starts(index)
        queries = range(context - num_queries, context)
        mask = torch.tensor([[sees(query, key, case, starts[query]) for key in range(context)] for query in queries])
        if case.softcap:
            scores = case.softcap * torch.tanh(rows @ keys.transpose(1, 2) * case.spec.scale / case.softcap)
            outputs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values)
        else:
            outputs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=case.spec.scale))
    return torch.cat([y.transpose(0, 1) for y in outputs]).flatten(1)


@pytest.mark.parametrize("case", [case for case in CPU_CASES if max(c for _, c in case.sequences) <= 1000], ids=lambda case: case.name)
def test_equals_masked_attention(case: AttentionCase) -> None:
    q, kv = build(case, torch.float32)
    torch.testing.assert_close(attend(q, kv, case.spec).double(), naive(case, q, kv), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_keeps_its_own(dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "mixed")
    q, kv = build(case, dtype)
    got = attend(q, kv, case.spec)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 100 * torch.finfo(dtype).eps  # both sides round in float64
    torch.testing.assert_close(got.double(), naive(case, q, kv), rtol=eps, atol=eps)


def test_sequences_are_independent_to_the_bit() -> None:
    case = next(case for case in CASES if case.name == "ragged_decodes")
    q, kv = build(case, torch.float32)
    together = attend(q, kv, case.spec)
    kv.batch.context_len[0] = 1  # another neighbour
    assert torch.equal(attend(q, kv, case.spec)[1:], together[1:])


def test_padded_rows_are_zero() -> None:
    case = next(case for case in CASES if case.name == "ragged_decodes")
    q, kv = build(case, torch.float32)
    assert bool((attend(q, kv, case.spec)[1] == 0).all())


def test_gradients_reach_queries_keys_and_values() -> None:
    case = next(case for case in CASES if case.name == "chunk")
    q, kv = build(case, torch.float64)
    keys, values = (pool.nan_to_num(nan=0.0).requires_grad_() for pool in (kv.keys, kv.values))
    attend(q.requires_grad_(), PagedKV(keys, values, kv.batch), case.spec).square().sum().backward()
    for tensor in (q, keys, values):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().sum()) > 0
