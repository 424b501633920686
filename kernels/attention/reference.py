"""Paged attention in plain PyTorch: sequence by sequence, any query length, grouped heads, window, sink, neighbourhood and softcap.

No Triton here and no model. Called by `reference_ops`, by back ends without a kernel of their own, by `cases`, and by tests.
Shape suffixes: T tokens, S sequences, N query heads, K key/value heads, G = N / K, H head width, Q queries and C keys of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import AttentionSpec, Neighbourhood, PagedKV


def attend(q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
    """y [T, N * H] in q's dtype; scores, softmax and sums are float32 or wider. A sequence with context_len 0 gets zeros.

    Only positions that some query of the sequence sees are read, so hidden blocks may hold anything, NaN included.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the grouped heads.
    """
    batch = kv.batch
    starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
    outputs = []
    for index, context in enumerate(contexts):
        q_QNH = q_TNH[starts[index] : starts[index + 1]]
        if context == 0 or len(q_QNH) == 0:
            outputs.append(torch.zeros_like(q_QNH))
            continue
        grid_start_Q = None if batch.grid_start is None else batch.grid_start[starts[index] : starts[index + 1]]
        seen_C, mask_QC = visible(len(q_QNH), context, spec, grid_start_Q, q_TNH.device)
        keys, values = _gather(kv.keys, kv.key_scales, kv, index, seen_C), _gather(kv.values, kv.value_scales, kv, index, seen_C)
        outputs.append(_attend_one(q_QNH, keys, values, mask_QC, spec))
    rest = q_TNH[starts[-1] :]  # padding behind the last sequence
    return torch.cat([*outputs, torch.zeros_like(rest)]).flatten(1)


def visible(
    num_queries: int, context: int, spec: AttentionSpec, grid_start_Q: Tensor | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Of a sequence whose last `num_queries` positions are queries: (the positions that at least one query sees, int64 [C], ascending;
    which of them each query sees, bool [Q, C])."""
    low = 0 if spec.window is None else max(0, context - num_queries - spec.window + 1)
    keys = torch.arange(context, device=device)
    keys = keys if low <= spec.sink else torch.cat((keys[: spec.sink], keys[low:]))
    at = torch.arange(context - num_queries, context, device=device)[:, None]
    seen = keys <= at
    if spec.window is not None:
        seen &= (at - keys < spec.window) | (keys < spec.sink)
    if spec.neighbourhood is None or grid_start_Q is None:
        return keys, seen
    seen &= _is_near(at, keys, grid_start_Q[:, None].long(), spec.neighbourhood)
    is_used = seen.any(0)
    return keys[is_used], seen[:, is_used]


def _is_near(at_Q1: Tensor, keys_C: Tensor, start_Q1: Tensor, near: Neighbourhood) -> Tensor:
    """bool [Q, C]: what the neighbourhood leaves of a causal mask. Source: the rule in `kernels.ops.Neighbourhood`."""
    code, following = keys_C - start_Q1, at_Q1 - start_Q1 + 1
    rows = following // near.columns - code // near.columns
    columns = (following % near.columns - code % near.columns).abs()
    is_other = (start_Q1 < 0) | (code < 0)
    return is_other | (keys_C == at_Q1) | ((rows <= near.row_radius) & (columns <= near.column_radius))


def _gather(pool: Tensor, scales: Tensor | None, kv: PagedKV, index: int, seen_C: Tensor) -> Tensor:
    """[K, C, H] of one sequence out of the pool [B, K, P, H]; a quantised pool's numbers times their scales."""
    block_size = pool.shape[2]
    blocks, places = kv.batch.block_table[index, seen_C // block_size].long(), seen_C % block_size
    numbers = pool[blocks, :, places].transpose(0, 1)
    return numbers if scales is None else numbers.to(scales.dtype) * scales[blocks, :, places].T[..., None]


def _attend_one(q_QNH: Tensor, k_KCH: Tensor, v_KCH: Tensor, mask_QC: Tensor, spec: AttentionSpec) -> Tensor:
    num_queries, num_heads, width = q_QNH.shape
    num_kv_heads = k_KCH.shape[0]
    wide = torch.promote_types(q_QNH.dtype, torch.float32)
    q = q_QNH.to(wide).view(num_queries, num_kv_heads, -1, width).permute(1, 2, 0, 3)  # [K, G, Q, H]
    scores = (q.flatten(1, 2) @ k_KCH.to(wide).transpose(1, 2)) * spec.scale  # [K, G * Q, C]
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.view(num_kv_heads, -1, num_queries, mask_QC.shape[1]).masked_fill(~mask_QC, float("-inf"))
    y = torch.softmax(scores, dim=-1).flatten(1, 2) @ v_KCH.to(wide)  # [K, G * Q, H]
    return y.view(num_kv_heads, -1, num_queries, width).permute(2, 0, 1, 3).reshape(num_queries, num_heads, width).to(q_QNH.dtype)
