"""Attention of a step with decodes and prefills in one launch: as many programs as the device holds, each walking a list of work.

The tiles of the two kernels of `triton.py`, but blocks of queries of its own: decodes have the bits of the decode kernel, prompts may
differ from the prefill kernel's in their last ones. The list needs no host: an item's number says whose block of queries or split it is, by
the starts and lengths on the device. Not the default: one kernel with two bodies may be pipelined worse than each alone, so it is used only
where `verified.json` lists it. Called by `variants` and tests.
Shape suffixes: T tokens, S sequences, N query heads, K key/value heads, G = N / K, H head width, P places in a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiling import MAX_SPLITS, decode_tiling, mixed_tiling, num_splits_of, split_of
from kernels.attention.triton import _attend_tile, _block_bounds, _find_sequence, _split_bounds, reduce_kernel
from kernels.ops import AttentionSpec, PagedKV

PROGRAMS_EACH = 2
"""Programs a multiprocessor holds of this kernel: each takes about 100 KB of shared memory."""


def can_run(q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> bool:
    """Of layers without a neighbourhood, over keys and values in q's dtype, up to a head width at which four warps need not spill."""
    return spec.neighbourhood is None and kv.keys.dtype == q_TNH.dtype and q_TNH.shape[2] <= 128


def attend_mixed(q: Tensor, kv: PagedKV, spec: AttentionSpec, out: Tensor) -> None:
    """The prefills of a batch, and the decodes that it may have. Mutates: out [T, N, H], the rows that belong to a sequence."""
    batch = kv.batch
    num_tokens, num_heads, width = q.shape
    num_kv_heads = kv.keys.shape[1]
    group = num_heads // num_kv_heads
    num_prefills = batch.context_len.shape[0] - batch.num_decodes
    decode = decode_tiling(group, width, q.element_size())
    tiling = mixed_tiling(group, width, q.element_size())
    num_query_blocks = (num_tokens - batch.num_decodes) // (tiling.rows // group) + num_prefills
    split = split_of(width, q.element_size(), spec.window, decode.keys)
    num_splits = num_splits_of(batch.max_context_len, spec.window, decode.keys, split)
    sums, stats = out, None
    if num_splits > 1:
        sums = torch.empty((batch.num_decodes, num_heads, num_splits, width), dtype=torch.float32, device=q.device)
        stats = torch.empty((batch.num_decodes, num_heads, num_splits, 2), dtype=torch.float32, device=q.device)
    num_items = (num_query_blocks + batch.num_decodes * num_splits) * num_kv_heads
    mixed_kernel[(min(num_items, num_programs_of(q.device)),)](
        q,
        kv.keys,
        kv.values,
        batch.block_table,
        batch.query_start,
        batch.context_len,
        out,
        sums,
        stats,
        batch.num_decodes,
        num_prefills,
        num_query_blocks,
        num_splits,
        num_kv_heads,
        batch.block_table.stride(0),
        *kv.keys.stride()[:3],
        spec.scale,
        SHAPE=(group, width, triton.next_power_of_2(width), kv.keys.shape[2]),
        PREFILL=(tiling.rows, tiling.keys),
        DECODE=(decode.rows, decode.keys, split, MAX_SPLITS),
        MASK=(spec.window or 0, spec.sink, spec.softcap),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if num_splits > 1 and batch.num_decodes:
        shared = {"H": width, "TILE": decode.keys, "WINDOW": spec.window or 0, "SPLIT": split}
        reduce_kernel[(batch.num_decodes, num_heads)](
            sums, stats, batch.context_len, out, num_splits, **shared, MAX_SPLITS=MAX_SPLITS, num_warps=4
        )


def num_programs_of(device: torch.device) -> int:
    """Without a GPU, so few that each has several items."""
    return PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def _tiles(
    state, q, start, stop, limit, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
    SHAPE: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from start on into the running softmax: state is (peak, total, acc), as `_attend_tile` has it."""
    peak, total, acc = state
    for first in range(start, stop, TILE):
        peak, total, acc = _attend_tile(
            q, peak, total, acc, first, limit, low, position, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            SHAPE[1], SHAPE[2], SHAPE[3], TILE, MASK[0], MASK[1], MASK[2], None, MASKED,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def _prefill_item(
    block_index, kv_head, q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, context_ptr, out_ptr, num_decodes, num_prefills, num_heads,
    table_stride, stride_block, stride_place, scale, SHAPE: tl.constexpr, PREFILL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What a program of `prefill_kernel` does; a block that belongs to no sequence has no tiles and stores nothing."""
    G: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[1]
    WIDTH: tl.constexpr = SHAPE[2]
    WINDOW: tl.constexpr = MASK[0]
    SINK: tl.constexpr = MASK[1]
    ROWS: tl.constexpr = PREFILL[0]
    TILE: tl.constexpr = PREFILL[1]
    BLOCK_Q: tl.constexpr = ROWS // G
    prefill = _find_sequence(query_start_ptr, num_decodes, num_prefills, block_index, BLOCK_Q)
    sequence = num_decodes + prefill
    row_start = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - row_start
    first_query = (block_index - ((row_start - num_decodes) // BLOCK_Q + prefill)) * BLOCK_Q
    if first_query < query_len:
        context = tl.load(context_ptr + sequence)
        member = tl.arange(0, ROWS)
        columns = tl.arange(0, WIDTH)
        query = first_query + member // G
        position = context - query_len + query
        head_row = (row_start + query).to(tl.int64) * num_heads + kv_head * G + member % G
        stored = ((member < BLOCK_Q * G) & (query < query_len))[:, None] & (columns < H)[None, :]
        q = tl.load(q_ptr + head_row[:, None] * H + columns[None, :], mask=stored, other=0.0)
        table_ptr += sequence.to(tl.int64) * table_stride
        first_position = context - query_len + first_query
        end = tl.minimum(first_position + BLOCK_Q, context)
        low, base, full_begin, full_end = _block_bounds(first_position, end, WINDOW, TILE)
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        state = (peak, tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS, WIDTH], dtype=tl.float32))
        if WINDOW > 0:
            if SINK > 0:
                sink_end = tl.minimum(base, SINK)
                state = _tiles(
                    state, q, 0, sink_end, sink_end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
                    SHAPE, TILE, MASK, True,
                )  # fmt: skip
            state = _tiles(
                state, q, base, tl.minimum(full_begin, end), end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
                SHAPE, TILE, MASK, True,
            )  # fmt: skip
        state = _tiles(
            state, q, full_begin, full_end, end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            SHAPE, TILE, MASK, False,
        )  # fmt: skip
        peak, total, acc = _tiles(
            state, q, full_end, end, end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            SHAPE, TILE, MASK, True,
        )  # fmt: skip
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + head_row[:, None] * H + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _decode_item(
    sequence, kv_head, split, num_splits, q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, sums_ptr, stats_ptr, num_heads,
    table_stride, stride_block, stride_place, scale, SHAPE: tl.constexpr, DECODE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What a program of `decode_kernel` does; a split past the row's end has no tiles and writes nothing."""
    G: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[1]
    WIDTH: tl.constexpr = SHAPE[2]
    ROWS: tl.constexpr = DECODE[0]
    TILE: tl.constexpr = DECODE[1]
    context = tl.load(context_ptr + sequence)
    low, base, size = _split_bounds(context, MASK[0], TILE, DECODE[2], DECODE[3])
    begin = base + split * size
    end = tl.minimum(begin + size, context)
    member = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    is_written = (member < G) & ((begin < end) | (stats_ptr is None))
    head_row = sequence.to(tl.int64) * num_heads + kv_head * G + member
    stored = is_written[:, None] & (columns < H)[None, :]
    q = tl.load(q_ptr + head_row[:, None] * H + columns[None, :], mask=stored, other=0.0)
    table_ptr += sequence.to(tl.int64) * table_stride
    position = tl.zeros([ROWS], dtype=tl.int32) + (context - 1)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    state = (peak, tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS, WIDTH], dtype=tl.float32))
    if MASK[0] > 0 and MASK[1] > 0:
        sink_end = tl.where(split == 0, tl.minimum(base, MASK[1]), 0)
        state = _tiles(
            state, q, 0, sink_end, sink_end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            SHAPE, TILE, MASK, True,
        )  # fmt: skip
    peak, total, acc = _tiles(
        state, q, begin, end, end, low, position, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale, SHAPE, TILE, MASK, True
    )
    if stats_ptr is None:
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(sums_ptr + head_row[:, None] * H + columns[None, :], y.to(sums_ptr.dtype.element_ty), mask=stored)
    else:
        partial = head_row * num_splits + split
        tl.store(sums_ptr + partial[:, None] * H + columns[None, :], acc, mask=stored)
        tl.store(stats_ptr + partial * 2, peak, mask=is_written)
        tl.store(stats_ptr + partial * 2 + 1, total, mask=is_written)


@triton.jit(do_not_specialize=["num_decodes", "num_prefills", "num_query_blocks", "num_splits", "table_stride"])
def mixed_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, context_ptr, out_ptr, sums_ptr, stats_ptr,
    num_decodes, num_prefills, num_query_blocks, num_splits, num_kv_heads, table_stride, stride_block, stride_head, stride_place, scale,
    SHAPE: tl.constexpr, PREFILL: tl.constexpr, DECODE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Items are numbered: a prompt's last queries first, since they see the most keys, then the splits of decodes, head by head.

    SHAPE: (G, H, H padded, P). PREFILL: (rows, keys) of a tile. DECODE: (rows, keys, SPLIT, MAX_SPLITS). MASK: (window, sink, softcap).
    """
    num_heads = num_kv_heads * SHAPE[0]
    num_items = (num_query_blocks + num_decodes * num_splits) * num_kv_heads
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        unit = item // num_kv_heads
        kv_head = item % num_kv_heads
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_head
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_head
        if unit < num_query_blocks:
            _prefill_item(
                num_query_blocks - 1 - unit, kv_head, q_ptr, k_head_ptr, v_head_ptr, table_ptr, query_start_ptr, context_ptr, out_ptr,
                num_decodes, num_prefills, num_heads, table_stride, stride_block, stride_place, scale, SHAPE, PREFILL, MASK,
            )  # fmt: skip
        else:
            _decode_item(
                (unit - num_query_blocks) // num_splits, kv_head, (unit - num_query_blocks) % num_splits, num_splits,
                q_ptr, k_head_ptr, v_head_ptr, table_ptr, context_ptr, sums_ptr, stats_ptr, num_heads,
                table_stride, stride_block, stride_place, scale, SHAPE, DECODE, MASK,
            )  # fmt: skip
