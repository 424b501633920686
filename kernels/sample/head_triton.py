"""The head's product and the sampling in one Triton kernel: logits become scores in the registers that they were summed in.

A row that nothing filters is drawn tile by tile, and its logits are never written; one with top-k, top-p or min-p gets float32 scores
written once, with what `kernels.sample.triton` wants to know of each tile, which then draws. No request here. Called by `triton_ops`.
Shape suffixes: R rows, D model width, V vocabulary, C = ceil(V / TILE) tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.triton import linear, quantize_kernel
from kernels.ops import Int8Weight, Sampled, SampleRows, Weight
from kernels.sample.triton import GREEDY_BELOW, ROW_VECTORS, TILE, Scores, adjusted, chosen, drawn, gumbel, noise_word, penalties_of, sample

DEPTH_BYTES = 128
"""Of inputs that are multiplied at a time: of a tile's 128 rows of the head, 16 KiB in each stage."""
FEW_ROWS, BLOCK_ROWS, MOST_ROWS = 16, 64, 128
"""Up to FEW_ROWS are one block of so many, padded; more are blocks of BLOCK_ROWS, side by side, so that a tile of the head comes from
memory once. Above MOST_ROWS the product is bound by arithmetic, at which PyTorch's library is better, and the logits behind it cost less
than that. Penalties stay in the first: a thread that holds its part of 64 rows' scores has no registers left for them (sm_80 spills)."""


def draw(x_RD: Tensor, head: Weight, rows: SampleRows) -> Sampled:
    """sample(linear(x, head), rows) with float32 logits, whatever x's dtype: they are not rounded to it where the product is fused.

    Fused for a dense head in half precision and for one in int8, up to 128 rows (16 with penalties), no logprobs. A row's id is then a
    function of its own numbers: sums run over D in one fixed order, in tiles of the same size in either kind of block.
    """
    if not can_fuse(x_RD, head, rows):
        return sample(linear(x_RD, head).float(), rows)
    x_RD = x_RD.contiguous()
    if not rows.is_filtered:
        return Sampled(chosen(*_launch(x_RD, head, rows, None)))
    scores = torch.empty((x_RD.shape[0], num_outputs_of(head)), dtype=torch.float32, device=x_RD.device)
    return Sampled(drawn(Scores(scores, *_launch(x_RD, head, rows, scores)), rows))


def can_fuse(x_RD: Tensor, head: Weight, rows: SampleRows) -> bool:
    if isinstance(head, Tensor):
        is_ours = head.is_contiguous() and head.dtype == x_RD.dtype and head.dtype.itemsize == 2
    else:
        is_ours = isinstance(head, Int8Weight) and head.values.numel() > 0  # a back end may have kept its own form alone
    return is_ours and not rows.logprobs and 0 < x_RD.shape[0] <= (MOST_ROWS if rows.counts is None else FEW_ROWS)


def num_outputs_of(head: Weight) -> int:
    return head.shape[0] if isinstance(head, Tensor) else head.out_features


def _launch(x_RD: Tensor, head: Weight, rows: SampleRows, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each tile and row, [R, C]: the best noisy score and its id; or, where scores are written, the largest score and the mass."""
    (num_rows, depth), vocab_size, device = x_RD.shape, num_outputs_of(head), x_RD.device
    x_scales = weight_scales = None
    if isinstance(head, Int8Weight):
        x_RD, x_scales = _quantized(x_RD)
        weight_scales = head.scales
        head = head.values
    num_tiles = triton.cdiv(vocab_size, TILE)
    first = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    second = torch.empty((num_rows, num_tiles), dtype=torch.int32 if scores is None else torch.float32, device=device)
    block = FEW_ROWS if num_rows <= FEW_ROWS else BLOCK_ROWS
    head_kernel[(triton.cdiv(num_rows, block), num_tiles)](
        x_RD,
        head,
        x_scales,
        weight_scales,
        rows.mask,
        *penalties_of(rows),
        rows.temperature,
        rows.seeds,
        rows.positions,
        scores,
        first,
        second,
        num_rows,
        V=vocab_size,
        D=depth,
        ROWS=block,
        TILE=TILE,
        DEPTH=DEPTH_BYTES // x_RD.element_size(),
        num_warps=4 if block == FEW_ROWS else 8,
        num_stages=4,
    )
    return first, second


def _quantized(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 by its own scale, float32 [R], as int8 products take it."""
    num_rows, depth = x_RD.shape
    values = torch.empty((num_rows, depth), dtype=torch.int8, device=x_RD.device)
    scales = torch.empty((num_rows,), dtype=torch.float32, device=x_RD.device)
    block = triton.next_power_of_2(depth)
    quantize_kernel[(num_rows,)](x_RD, values, scales, IN=depth, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return values, scales


@triton.jit
def _product(x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, row, token, is_row, is_token, D: tl.constexpr, DEPTH: tl.constexpr):
    """Logits float32 [TILE, ROWS]; of int8 numbers an exact sum, times the row's scale, times the output's. The head's rows come first: a
    warp group's product has at least 64 rows, and may have few columns."""
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + row[:, None] * D + depth[None, :]
    weight_at = weight_ptr + token.to(tl.int64)[:, None] * D + depth[None, :]
    total = tl.zeros([token.shape[0], row.shape[0]], dtype=tl.float32 if x_scales_ptr is None else tl.int32)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        x = tl.load(x_at + start, mask=is_row[:, None] & inside, other=0)
        weight = tl.load(weight_at + start, mask=is_token[:, None] & inside, other=0)
        total = tl.dot(weight, tl.trans(x), total, out_dtype=total.dtype)
    logits = total.to(tl.float32)
    if x_scales_ptr is not None:
        x_scale = tl.load(x_scales_ptr + row, mask=is_row, other=0.0)
        weight_scale = tl.load(weight_scales_ptr + token, mask=is_token, other=0.0)
        logits = logits * x_scale[None, :] * weight_scale[:, None]
    return logits


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=ROW_VECTORS)
def head_kernel(
    x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    temperature_ptr, seeds_ptr, positions_ptr, scores_ptr, first_ptr, second_ptr, num_rows,
    V: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the vocabulary, a block of rows. Without scores_ptr: the best of score + noise (of the score where the row is greedy), of
    equal ones the lowest id. With it: scores, and of the tile what `Scores` has. mask_ptr and the penalty pointers may be None, as in
    `adjusted`; so may both scales, of dense weights.
    """
    C: tl.constexpr = (V + TILE - 1) // TILE
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row, is_token = row < num_rows, token < V
    x = _product(x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, row, token, is_row, is_token, D, DEPTH)
    x = adjusted(
        x, row[None, :], token[:, None], is_row[None, :], is_token[:, None],
        mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, temperature_ptr, V,
    )  # fmt: skip
    x = tl.where(is_token[:, None], x, float("-inf"))
    at_tile = row * C + tile
    if scores_ptr is None:
        seed = tl.load(seeds_ptr + row, mask=is_row, other=0)
        position = tl.load(positions_ptr + row, mask=is_row, other=0)
        is_greedy = tl.load(temperature_ptr + row, mask=is_row, other=0.0) < GREEDY_BELOW
        word = noise_word(seed[None, :], position[None, :], token[:, None])
        x = tl.where(is_greedy[None, :], x, x + gumbel(word))
        highest = tl.max(x, 0)
        lowest_id = tl.min(tl.where((x == highest[None, :]) & is_token[:, None], token[:, None], V), 0)
        tl.store(first_ptr + at_tile, highest, mask=is_row)
        tl.store(second_ptr + at_tile, lowest_id, mask=is_row)
    else:
        tl.store(scores_ptr + row[None, :] * V + token[:, None], x, mask=is_row[None, :] & is_token[:, None])
        peak = tl.max(x, 0)
        mass = tl.sum(tl.exp(x - tl.where(peak > float("-inf"), peak, 0.0)[None, :]), 0)
        tl.store(first_ptr + at_tile, peak, mask=is_row)
        tl.store(second_ptr + at_tile, mass, mask=is_row)
