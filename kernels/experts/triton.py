"""A feed-forward block of many experts on the GPU: each expert's weights are read once for all tokens that go to it.

Six launches: the router's logits; each token's experts and shares; the entries (token * K + rank) grouped by expert, in tiles of ROWS
that never mix two experts; gate and up with the gated activation; down with the share; the sum over a token's experts. No sort, no wait
for the device, no atomics: how many tiles there may be follows from T, K and E alone, and those that are not needed end at once, so all
of it can be captured in a graph. With int8 matrices rows are quantised before each of the two products. No model here. Called by
`triton_ops`. More than 350 lines, because the six kernels share one layout of entries.
Shape suffixes: T tokens, D model width, E experts, K experts of a token, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend
from kernels.gated.triton import activated, gated
from kernels.linear.triton import linear, quantize_kernel
from kernels.ops import Activation, ExpertWeights, Int8Weight, Weight

Linear = Callable[[Tensor, Weight], Tensor]

GROUP_BLOCK = 1024
"""Entries that the grouping kernel looks at together."""
SUM_BLOCK = 1024
ROUTER_TILE = (16, 16, 256)
"""Rows, experts and depth of one tile of the router's product: many small tiles, for a step of few tokens has no others to fill a GPU."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Of one tile: tokens of an expert, rows of its weights (half of them gates and half ups, where these are multiplied), and depth of the
    sum. Compiled for sm_80, sm_90 and sm_100 without a spilled register, but not measured on a GPU yet."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


DECODE = Tiling(16, 64, 128, num_warps=4, num_stages=4)
PROMPT = Tiling(64, 128, 64, num_warps=4, num_stages=4)
LONG_PROMPT = Tiling(128, 128, 64, num_warps=8, num_stages=3)
"""By how many tokens an expert gets: reading its weights is all a step of few tokens does, multiplying is what a prompt does."""


def tiling_of(num_tokens: int, top_k: int, num_experts: int) -> Tiling:
    """Follows from numbers that a graph keeps. Up to 256 tokens there is one, so that steps of decoding all round alike."""
    if num_tokens <= 256:
        return DECODE
    return PROMPT if num_tokens * top_k < 128 * num_experts else LONG_PROMPT


def experts(x_TD: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    """[T, D] in x's dtype; see kernels/experts/reference.py. Of the other tokens a token's result knows only how many they are: between the
    tilings of `tiling_of` last bits may differ, since on Hopper larger tiles are multiplied by other instructions, and a shared expert's
    products are `linear`'s.

    Raises: TypeError for matrices that are neither dense nor int8 rows.
    """
    return _experts(x_TD, weights, activation, tiling_of(len(x_TD), weights.top_k, weights.num_experts), linear)


def deterministic_experts(linear: Linear) -> Callable[[Tensor, ExpertWeights, Activation], Tensor]:
    """`experts` by one tiling for steps of every size, and a shared expert by this product: no bit of a token depends on the others."""

    def experts(x_TD: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
        return _experts(x_TD, weights, activation, PROMPT, linear)

    return experts


def _experts(x_TD: Tensor, weights: ExpertWeights, activation: Activation, tiling: Tiling, linear: Linear) -> Tensor:
    x_TD = x_TD.contiguous()
    num_tokens, width = x_TD.shape
    if not num_tokens:
        return torch.empty_like(x_TD)
    logits = _router_logits(x_TD, weights.router)
    groups = _grouped(logits, weights, tiling)
    by_entry = _products(x_TD, weights, activation, groups)
    beside = None
    if weights.shared is not None:
        beside = linear(gated(linear(x_TD, weights.shared.gate_up), activation), weights.shared.down)
    out = torch.empty_like(x_TD)
    sum_kernel[(num_tokens, triton.cdiv(width, SUM_BLOCK))](
        by_entry, beside, logits, out, D=width, K=weights.top_k, E=weights.num_experts, BLOCK=SUM_BLOCK, num_warps=4, **_dependence(out)
    )
    return out


@dataclass(frozen=True, slots=True)
class _Groups:
    """entries int32 [tiles * rows]: token * K + rank, -1 in rows that a tile has too many; experts int32 [tiles]: a tile's, -1 for a tile
    that is not needed; shares float32 [T, K]."""

    entries: Tensor
    experts: Tensor
    shares: Tensor
    tiling: Tiling


def _router_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """float32 [T, E]. One order of adding, whatever T is."""
    rows, columns, depth = ROUTER_TILE
    (num_tokens, width), num_logits = x_TD.shape, router_ED.shape[0]
    logits = torch.empty((num_tokens, num_logits), dtype=torch.float32, device=x_TD.device)
    router_kernel[(triton.cdiv(num_tokens, rows), triton.cdiv(num_logits, columns))](
        x_TD, router_ED, logits, num_tokens, E=num_logits, D=width, ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=3,
        **_dependence(x_TD),
    )  # fmt: skip
    return logits


def _grouped(logits: Tensor, weights: ExpertWeights, tiling: Tiling) -> _Groups:
    num_tokens, num_logits = logits.shape
    count, top_k, device = weights.num_experts, weights.top_k, logits.device
    chosen = torch.empty((num_tokens, top_k), dtype=torch.int32, device=device)
    shares = torch.empty((num_tokens, top_k), dtype=torch.float32, device=device)
    route_kernel[(num_tokens,)](
        logits, chosen, shares, STRIDE=num_logits, E=count, K=top_k, IS_NORMALISED=weights.is_normalised,
        BLOCK_E=triton.next_power_of_2(count), BLOCK_K=triton.next_power_of_2(top_k), num_warps=1, **_dependence(logits),
    )  # fmt: skip
    num_entries = num_tokens * top_k
    busy = min(count, num_entries)  # the most tiles are needed where so many experts have one entry each, and the rest fill whole tiles
    num_tiles = busy + (num_entries - busy) // tiling.rows
    entries = torch.empty(num_tiles * tiling.rows, dtype=torch.int32, device=device)
    experts_of_tiles = torch.empty(num_tiles, dtype=torch.int32, device=device)
    group_kernel[(count,)](
        chosen, entries, experts_of_tiles, num_entries, num_tiles, E=count, ROWS=tiling.rows,
        BLOCK_E=max(32, triton.next_power_of_2(count + 1)), BLOCK=GROUP_BLOCK, num_warps=4, **_dependence(logits),
    )  # fmt: skip
    return _Groups(entries, experts_of_tiles, shares, tiling)


def _products(x_TD: Tensor, weights: ExpertWeights, activation: Activation, groups: _Groups) -> Tensor:
    """[T * K, D] in x's dtype: what each expert of a token gives, times its share."""
    num_tokens, width = x_TD.shape
    gate_up, gate_up_scales = _values_of(weights.gate_up)
    down, down_scales = _values_of(weights.down)
    hidden_width = down.shape[1]
    tiling, num_tiles = groups.tiling, len(groups.experts)
    sizes = {"ROWS": tiling.rows, "DEPTH": tiling.depth, "D": width, "F": hidden_width}
    launch = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, **_dependence(x_TD)}
    hidden = torch.empty((len(groups.entries), hidden_width), dtype=x_TD.dtype, device=x_TD.device)
    x, x_scales = (x_TD, None) if gate_up_scales is None else _quantised(x_TD)
    half = tiling.columns // 2
    gate_up_kernel[(triton.cdiv(hidden_width, half), num_tiles)](
        x, gate_up, x_scales, gate_up_scales, groups.entries, groups.experts, hidden, K=weights.top_k,
        IS_GELU=activation == "gelu_tanh", IS_INT8=gate_up_scales is not None, COLUMNS=half, **sizes, **launch,
    )  # fmt: skip
    by_entry = torch.empty((num_tokens * weights.top_k, width), dtype=x_TD.dtype, device=x_TD.device)
    hidden, hidden_scales = (hidden, None) if down_scales is None else _quantised(hidden)
    down_kernel[(triton.cdiv(width, tiling.columns), num_tiles)](
        hidden, down, hidden_scales, down_scales, groups.entries, groups.experts, groups.shares, by_entry,
        IS_INT8=down_scales is not None, COLUMNS=tiling.columns, **sizes, **launch,
    )  # fmt: skip
    return by_entry


def _dependence(x: Tensor) -> dict[str, bool]:
    is_dependent = can_depend(x.device)
    return {"DEPENDENT": is_dependent, "launch_pdl": is_dependent}


def _values_of(weight: Weight) -> tuple[Tensor, Tensor | None]:
    if isinstance(weight, Tensor):
        return weight, None
    if isinstance(weight, Int8Weight):
        return weight.values, weight.scales
    raise TypeError("matrices of experts are dense or int8 with a scale a row on a GPU; numbers in groups are not built there")


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8, each by its own scale. In rows that no entry has any number may stand; nobody reads it."""
    num_rows, depth = x.shape
    values = torch.empty((num_rows, depth), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(depth)
    quantize_kernel[(num_rows,)](x, values, scales, IN=depth, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return values, scales


@triton.jit(do_not_specialize=["num_rows"])
def router_kernel(
    x_ptr, router_ptr, logits_ptr, num_rows,
    E: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of the logits, in float32."""
    begin(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < E
    x_at = x_ptr + row.to(tl.int64)[:, None] * D + depth[None, :]
    router_at = router_ptr + column[:, None] * D + depth[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        x = tl.load(x_at + start, mask=is_row[:, None] & inside, other=0.0)
        router = tl.load(router_at + start, mask=is_column[:, None] & inside, other=0.0)
        total = tl.dot(x, tl.trans(router), total, input_precision="ieee")
    at = logits_ptr + row.to(tl.int64)[:, None] * E + column[None, :]
    tl.store(at, total, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def route_kernel(
    logits_ptr, chosen_ptr, shares_ptr, STRIDE: tl.constexpr, E: tl.constexpr, K: tl.constexpr, IS_NORMALISED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One token's experts, largest logit first, of equal ones the lower expert first, and their shares."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    place = tl.arange(0, BLOCK_K)
    logit = tl.load(logits_ptr + row * STRIDE + expert, mask=expert < E, other=float("-inf"))
    high = tl.max(logit, 0)
    mass = tl.sum(tl.exp(logit - high), 0)
    chosen = tl.zeros([BLOCK_K], dtype=tl.int32)
    shares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for rank in tl.static_range(K):
        best = tl.max(logit, 0)
        # A row of garbage has logits that equal nothing, not even themselves: it gets the last expert.
        index = tl.minimum(tl.min(tl.where(logit == best, expert, BLOCK_E), 0), E - 1)
        chosen = tl.where(place == rank, index, chosen)
        shares = tl.where(place == rank, tl.exp(best - high) / mass, shares)
        logit = tl.where(expert == index, float("-inf"), logit)
    if IS_NORMALISED:
        shares = shares / tl.sum(shares, 0)
    tl.store(chosen_ptr + row * K + place, chosen, mask=place < K)
    tl.store(shares_ptr + row * K + place, shares, mask=place < K)


@triton.jit(do_not_specialize=["num_entries", "num_tiles"])
def group_kernel(
    chosen_ptr, entries_ptr, experts_ptr, num_entries, num_tiles,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One expert's tiles: where they begin follows from what all experts before it have; its entries go into them in their order."""
    begin(DEPENDENT)
    mine = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    offset = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, num_entries, BLOCK):  # behind the last entry all go to an expert that there is not
        counts += tl.histogram(tl.load(chosen_ptr + start + offset, mask=start + offset < num_entries, other=BLOCK_E - 1), BLOCK_E)
    tiles = tl.where(expert < E, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(expert < mine, tiles, 0), 0)
    count = tl.sum(tl.where(expert == mine, counts, 0), 0)
    end = first + (count + ROWS - 1) // ROWS
    for start in range(first, end, BLOCK):
        tl.store(experts_ptr + start + offset, tl.zeros([BLOCK], dtype=tl.int32) + mine, mask=start + offset < end)
    if mine == E - 1:
        for start in range(end, num_tiles, BLOCK):
            tl.store(experts_ptr + start + offset, tl.zeros([BLOCK], dtype=tl.int32) - 1, mask=start + offset < num_tiles)
    at = first * ROWS
    for start in range(0, num_entries, BLOCK):
        entry = start + offset
        is_mine = (tl.load(chosen_ptr + entry, mask=entry < num_entries, other=BLOCK_E - 1) == mine).to(tl.int32)
        tl.store(entries_ptr + at + tl.cumsum(is_mine, 0) - 1, entry, mask=is_mine == 1)
        at += tl.sum(is_mine, 0)
    rest = at + tl.arange(0, ROWS)
    tl.store(entries_ptr + rest, tl.zeros([ROWS], dtype=tl.int32) - 1, mask=rest < end * ROWS)


@triton.jit
def gate_up_kernel(
    x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, entries_ptr, experts_ptr, hidden_ptr,
    K: tl.constexpr, IS_GELU: tl.constexpr, IS_INT8: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of activation(gate) * up of one expert, over the tokens that its entries name."""
    begin(DEPENDENT)
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile)
    if expert < 0:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    entry = tl.load(entries_ptr + row)
    is_row = entry >= 0
    token = tl.where(is_row, entry, 0) // K
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < F
    depth = tl.arange(0, DEPTH)
    gate_row = expert.to(tl.int64) * (2 * F) + column
    x_at = x_ptr + token.to(tl.int64)[:, None] * D + depth[None, :]
    gate_at = weight_ptr + gate_row[:, None] * D + depth[None, :]
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if IS_INT8 else tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if IS_INT8 else tl.float32)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        x = tl.load(x_at + start, mask=is_row[:, None] & inside, other=0)
        gate_weight = tl.load(gate_at + start, mask=is_column[:, None] & inside, other=0)
        up_weight = tl.load(gate_at + F * D + start, mask=is_column[:, None] & inside, other=0)
        gate = tl.dot(x, tl.trans(gate_weight), gate, input_precision="ieee", out_dtype=gate.dtype)
        up = tl.dot(x, tl.trans(up_weight), up, input_precision="ieee", out_dtype=up.dtype)
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    if IS_INT8:
        x_scale = tl.load(x_scales_ptr + token)
        gate = gate * x_scale[:, None] * tl.load(weight_scales_ptr + gate_row, mask=is_column, other=0.0)[None, :]
        up = up * x_scale[:, None] * tl.load(weight_scales_ptr + gate_row + F, mask=is_column, other=0.0)[None, :]
    y = activated(gate, IS_GELU) * up
    at = hidden_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(at, y.to(hidden_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    hidden_ptr, weight_ptr, hidden_scales_ptr, weight_scales_ptr, entries_ptr, experts_ptr, shares_ptr, out_ptr,
    IS_INT8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's outputs, each row times its share and in the place of its entry."""
    begin(DEPENDENT)
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile)
    if expert < 0:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    entry = tl.load(entries_ptr + row)
    is_row = entry >= 0
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D
    depth = tl.arange(0, DEPTH)
    weight_row = expert.to(tl.int64) * D + column
    hidden_at = hidden_ptr + row.to(tl.int64)[:, None] * F + depth[None, :]
    weight_at = weight_ptr + weight_row[:, None] * F + depth[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if IS_INT8 else tl.float32)
    for start in range(0, F, DEPTH):
        inside = (start + depth < F)[None, :]
        hidden = tl.load(hidden_at + start, mask=is_row[:, None] & inside, other=0)
        weight = tl.load(weight_at + start, mask=is_column[:, None] & inside, other=0)
        total = tl.dot(hidden, tl.trans(weight), total, input_precision="ieee", out_dtype=total.dtype)
    y = total.to(tl.float32)
    if IS_INT8:
        scale = tl.load(weight_scales_ptr + weight_row, mask=is_column, other=0.0)
        y = y * tl.load(hidden_scales_ptr + row, mask=is_row, other=0.0)[:, None] * scale[None, :]
    y = y * tl.load(shares_ptr + entry, mask=is_row, other=0.0)[:, None]
    at = out_ptr + entry.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def sum_kernel(
    by_entry_ptr, beside_ptr, logits_ptr, out_ptr, D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A stretch of one token's result: its experts in the order of their shares, then the shared one by its own factor."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < D
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(K):
        total += tl.load(by_entry_ptr + (row * K + rank) * D + column, mask=is_column, other=0.0).to(tl.float32)
    if beside_ptr is not None:
        factor = tl.load(logits_ptr + row * (E + 1) + E)
        beside = tl.load(beside_ptr + row * D + column, mask=is_column, other=0.0).to(tl.float32)
        total += beside / (1.0 + tl.exp(-factor))
    tl.store(out_ptr + row * D + column, total.to(out_ptr.dtype.element_ty), mask=is_column)
