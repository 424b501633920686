"""Paged attention in Triton: a decode kernel (split over keys, then a reduction) and a prefill kernel behind one `attend`.

No mask is a flag here: window, sink and causality are loop bounds, with a mask on the edge tiles only; a neighbourhood is arithmetic on
the tiles from a picture's first code on. Called by `triton_ops`.
Longer than most files because both kernels share one tile body and one way of bounding it, which must not drift apart.
Shape suffixes: T tokens, S sequences, N query heads, K key/value heads, G = N / K, H head width, P places in a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiling import MAX_SPLITS, decode_tiling, num_splits_of, prefill_tiling, split_of, stages_within
from kernels.chip import shared_bytes
from kernels.kv_write.pool import pool_words
from kernels.ops import AttentionSpec, PagedBatch, PagedKV

E4M3_BIAS = tl.constexpr(2.0**120)
"""What e4m3 in the places of bfloat16 is short of."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""Scores are kept in units of log 2, because exp2 is the exponential that the hardware has."""


Near = tuple[int, int, int]
"""A neighbourhood as the kernels take it: columns, row radius, column radius."""


def near_of(batch: PagedBatch, spec: AttentionSpec) -> Near | None:
    """None where no code can be hidden: the kernel is then the one without a neighbourhood."""
    near = spec.neighbourhood
    return None if near is None or batch.grid_start is None else (near.columns, near.row_radius, near.column_radius)


def attend(q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
    """y [T, N * H] in q's dtype: decodes first, then prefills, a launch for each kind that the step has.

    Lengths are read on the device and the grid comes from the host's upper bounds, so a captured launch stays right. Rows that belong
    to no sequence are left as they are. A pool may be quantised. Raises: ValueError of `pool_words`. Source: Dao et al. 2023
    (FlashAttention-2), section 3.1; Dao et al. 2023 (Flash-Decoding) for the split.
    """
    q_TNH = q_TNH.contiguous()
    out = torch.empty_like(q_TNH)
    batch = kv.batch
    if batch.num_decodes > 0:
        _decode(q_TNH, kv, spec, out)
    if batch.num_decodes < batch.context_len.shape[0] and q_TNH.shape[0] > batch.num_decodes:
        _prefill(q_TNH, kv, spec, out)
    return out.flatten(1)


def _decode(q: Tensor, kv: PagedKV, spec: AttentionSpec, out: Tensor) -> None:
    batch = kv.batch
    keys, values, key_scales, value_scales = pool_words(kv)
    _, num_heads, width = q.shape
    num_kv_heads = kv.keys.shape[1]
    is_packed, group = key_scales is not None, num_heads // num_kv_heads
    tiling = decode_tiling(group, width, q.element_size(), batch.num_decodes, batch.max_context_len, is_packed)
    near = near_of(batch, spec)
    split = split_of(width, q.element_size(), spec.window, tiling.keys)
    num_splits = num_splits_of(batch.max_context_len, spec.window, tiling.keys, split)
    sums, stats = out, None
    if num_splits > 1:
        sums = torch.empty((batch.num_decodes, num_heads, num_splits, width), dtype=torch.float32, device=q.device)
        stats = torch.empty((batch.num_decodes, num_heads, num_splits, 2), dtype=torch.float32, device=q.device)
    shared = {"H": width, "TILE": tiling.keys, "SPLIT": split, "MAX_SPLITS": MAX_SPLITS}
    decode_kernel[(batch.num_decodes, num_kv_heads, num_splits)](
        q,
        keys,
        values,
        batch.block_table,
        batch.context_len,
        batch.context_len if near is None else batch.grid_start,
        sums,
        stats,
        key_scales,
        value_scales,
        batch.block_table.stride(0),
        *keys.stride()[:3],
        spec.scale,
        **shared,
        G=num_heads // num_kv_heads,
        ROWS=tiling.rows,
        P=kv.keys.shape[2],
        SPAN=(spec.window or 0, spec.sink),
        SOFTCAP=spec.softcap,
        NEAR=near,
        num_warps=tiling.num_warps,
        num_stages=stages_within(tiling.num_stages, shared_bytes(q.device)),
    )
    if num_splits > 1:
        reduce_kernel[(batch.num_decodes, num_heads)](
            sums, stats, batch.context_len, out, num_splits, **shared, WINDOW=spec.window or 0, num_warps=4
        )


def _prefill(q: Tensor, kv: PagedKV, spec: AttentionSpec, out: Tensor) -> None:
    batch = kv.batch
    keys, values, key_scales, value_scales = pool_words(kv)
    num_tokens, num_heads, width = q.shape
    num_kv_heads = kv.keys.shape[1]
    group = num_heads // num_kv_heads
    num_prefills = batch.context_len.shape[0] - batch.num_decodes
    tiling = prefill_tiling(group, width, q.element_size(), spec.neighbourhood is not None, num_prefills, batch.max_context_len)
    near = near_of(batch, spec)
    num_query_blocks = (num_tokens - batch.num_decodes) // (tiling.rows // group) + num_prefills
    prefill_kernel[(num_query_blocks, num_kv_heads)](
        q,
        keys,
        values,
        batch.block_table,
        batch.query_start,
        batch.context_len,
        batch.context_len if near is None else batch.grid_start,
        out,
        key_scales,
        value_scales,
        batch.num_decodes,
        num_prefills,
        batch.block_table.stride(0),
        *keys.stride()[:3],
        spec.scale,
        G=group,
        ROWS=tiling.rows,
        H=width,
        P=kv.keys.shape[2],
        TILE=tiling.keys,
        SPAN=(spec.window or 0, spec.sink),
        SOFTCAP=spec.softcap,
        NEAR=near,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


@triton.jit
def _tanh(x):
    """From exp2 and, near zero where that form cancels, the Taylor series: the language has no tanh of its own."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    decay = tl.exp2(-2.0 * LOG2_E * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _is_near(position, grid_start, at, NEAR: tl.constexpr):
    """Does the neighbourhood leave the key at `at` to the query at `position`? Broadcasts; grid_start: of the query."""
    following = position - grid_start + 1  # of a text query: any numbers
    code = at - grid_start
    kept = (grid_start < 0) | (code < 0)
    code = tl.where(kept, 0, code)  # division of a negative number rounds in ways of its own
    rows = following // NEAR[0] - code // NEAR[0]
    columns = tl.abs(following % NEAR[0] - code % NEAR[0])
    return kept | (at == position) | ((rows <= NEAR[1]) & (columns <= NEAR[2]))


@triton.jit
def _in_bounds(live, at, position, WINDOW: tl.constexpr, SINK: tl.constexpr):
    """bool [M, TILE]: which live keys the window and the order of positions leave to each row."""
    seen = live[None, :] & (at[None, :] <= position[:, None])
    if WINDOW > 0:
        seen = seen & ((position[:, None] - at[None, :] < WINDOW) | (at < SINK)[None, :])
    return seen


@triton.jit
def _halves(pairs):
    """Two bfloat16 each of 32 bits, the lower first."""
    low, high = (pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16)
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def unpacked(words, like):
    """[TILE, 4 * W] in the dtype of `like`, which holds them without rounding, of words [TILE, W] of four numbers: int8 in int32, e4m3 in
    uint32. In whole numbers, two to an instruction, on every chip alike: conversions of single numbers, and loads of single bytes from
    shared memory, would take longer than the numbers take to arrive.
    """
    even = words.to(tl.uint32, bitcast=True)
    odd = even >> 8
    if words.dtype == tl.uint32:  # sign, exponent and mantissa where bfloat16 has them; the exponent's bias is 7 and not 127
        n0, n2 = _halves(((even << 8) & 0x80008000) | ((even << 4) & 0x07F007F0))
        n1, n3 = _halves((even & 0x80008000) | ((odd << 4) & 0x07F007F0))
        numbers = tl.join(tl.join(n0, n2), tl.join(n1, n3)) * E4M3_BIAS
    else:  # the lower seven bits are the mantissa of 128 + n, the eighth makes 128 to 256, which is taken away
        n0, n2 = _halves((even & 0x007F007F) | 0x43004300)
        n1, n3 = _halves((odd & 0x007F007F) | 0x43004300)
        m0, m2 = _halves((even & 0x00800080) | 0x43004300)
        m1, m3 = _halves((odd & 0x00800080) | 0x43004300)
        numbers = tl.join(tl.join(n0 - m0, n2 - m2), tl.join(n1 - m1, n3 - m3))
    return tl.reshape(numbers, [words.shape[0], 4 * words.shape[1]]).to(like.dtype)


@triton.jit
def _attend_tile(
    q, peak, total, acc, start, limit, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
    H: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, MASKED: tl.constexpr,
    k_scale_ptr=None, v_scale_ptr=None,
):  # fmt: skip
    """One tile of keys into the running softmax (peak [M], total [M], acc [M, WIDTH]); scores are in units of log 2.

    k_scale_ptr, v_scale_ptr: of the head, None for a plain pool. A quantised pool comes in words of four numbers, strides in words too.
    Its numbers become q's dtype in registers, unrounded; a key's scale goes into its scores, a value's into its weights. So both products
    are a plain pool's, summed in float32, tile by tile: products of e4m3 itself would be faster, and keep but 14 bits of a sum on sm_90.

    With MASKED, keys at or past limit, those below low that no sink keeps, and those that a neighbourhood leaves to no row are neither
    read nor counted: their block may be another sequence's, or never written.
    """
    PACK: tl.constexpr = 1 if k_scale_ptr is None else 4
    if PACK > 1 and H % 16 == 0:
        stride_place = stride_place // 4 * 4  # it is that, which the compiler must know to read 16 bytes at once of 96 or 80
    columns = tl.arange(0, WIDTH // PACK)
    at = start + tl.arange(0, TILE)
    if MASKED:
        live = (at < limit) & ((at >= low) | (at < SINK))
        if NEAR is not None:
            seen = _in_bounds(live, at, position, WINDOW, SINK)
            seen = seen & _is_near(position[:, None], grid_start[:, None], at[None, :], NEAR)
            live = tl.max(seen.to(tl.int32), 0) > 0
        block = tl.load(table_ptr + at // P, mask=live, other=0).to(tl.int64)
        readable = live[:, None] & (columns < H // PACK)[None, :]
    else:
        block = tl.load(table_ptr + at // P).to(tl.int64)
        live = at >= 0
        readable = live[:, None] & (columns < H // PACK)[None, :]
    offsets = (block * stride_block + (at % P) * stride_place)[:, None] + columns[None, :]
    k = tl.load(k_ptr + offsets, mask=readable, other=0)
    v = tl.load(v_ptr + offsets, mask=readable, other=0)
    if PACK > 1:
        k = unpacked(k, q)
        # Scales lie as rows do. A sum over one column brings them to where scores are through shared memory; loaded there at once, every
        # thread would ask for 32 of them by itself, and a prefill's inner loop have 904 instructions and not 653 (sm_90, width 128).
        rows = (block * (stride_block // (H // PACK)) + (at % P) * (stride_place // (H // PACK)))[:, None]
        scale = (tl.sum(tl.load(k_scale_ptr + rows, mask=live[:, None], other=0.0), 1) * scale)[None, :]
    else:
        k = k.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP > 0:
        scores = _tanh(scores * (scale / SOFTCAP)) * (SOFTCAP * LOG2_E)
    else:
        scores = scores * (scale * LOG2_E)
    if MASKED:
        if NEAR is None:
            seen = _in_bounds(live, at, position, WINDOW, SINK)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet must not make inf - inf
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    if PACK > 1:
        v = unpacked(v, q)
        weights = weights * tl.sum(tl.load(v_scale_ptr + rows, mask=live[:, None], other=0.0), 1)[None, :]
    else:
        v = v.to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def _split_bounds(context, WINDOW: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first visible position, where split 0 begins, keys per split) of a row with this many keys."""
    low = context * 0
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0)
    base = low // TILE * TILE
    return low, base, SPLIT * tl.maximum(tl.cdiv(context - base, SPLIT * MAX_SPLITS), 1)


@triton.jit
def _block_bounds(first_position, end, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """(first position that the queries at first_position ... end - 1 see, where its tile begins, first and last end of the tiles of which
    each of them sees every key)."""
    low = end * 0
    full_begin = end * 0
    if WINDOW > 0:
        low = tl.maximum(first_position - WINDOW + 1, 0)
        full_begin = tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE
    return low, low // TILE * TILE, full_begin, tl.maximum((first_position + 1) // TILE * TILE, full_begin)


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, grid_ptr, sums_ptr, stats_ptr, k_scale_ptr, v_scale_ptr, table_stride,
    stride_block, stride_head, stride_place, scale,
    G: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head, split): all G query heads of the group share each key that is read.

    Writes unnormalised sums [S, N, splits, H] and (peak, total) [S, N, splits, 2], both float32. Splits past the row's end write nothing.
    Where the grid has one split, stats_ptr is None and sums_ptr is the output, which gets what the reduction would make of one split.
    SPAN: window (0 without one) and sink.
    """
    WINDOW: tl.constexpr = SPAN[0]
    SINK: tl.constexpr = SPAN[1]
    WIDTH: tl.constexpr = triton.next_power_of_2(H)
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_ptr + sequence)
    low, base, size = _split_bounds(context, WINDOW, TILE, SPLIT, MAX_SPLITS)
    begin = base + split * size
    end = tl.minimum(begin + size, context)
    if stats_ptr is not None:  # noqa: SIM102 (one is decided by the compiler, the other on the device)
        if begin >= end:
            return
    num_heads = tl.num_programs(1) * G
    member = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    in_group = member < G
    head_row = sequence.to(tl.int64) * num_heads + kv_head * G + member
    stored = in_group[:, None] & (columns < H)[None, :]
    q = tl.load(q_ptr + head_row[:, None] * H + columns[None, :], mask=stored, other=0.0)
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head.to(tl.int64) * (stride_head // (H // 4))
        v_scale_ptr += kv_head.to(tl.int64) * (stride_head // (H // 4))
    table_ptr += sequence.to(tl.int64) * table_stride
    position = tl.zeros([ROWS], dtype=tl.int32) + (context - 1)
    grid_start = position
    if NEAR is not None:
        grid_start = tl.zeros([ROWS], dtype=tl.int32) + tl.load(grid_ptr + sequence)  # a decode's token is its sequence's row
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    if SINK > 0 and WINDOW > 0:
        sink_end = tl.where(split == 0, tl.minimum(base, SINK), 0)
        for start in range(0, sink_end, TILE):
            peak, total, acc = _attend_tile(
                q, peak, total, acc, start, sink_end, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
                H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, True, k_scale_ptr, v_scale_ptr,
            )  # fmt: skip
    for start in range(begin, end, TILE):  # masked throughout: a decode waits for memory, not for comparisons
        peak, total, acc = _attend_tile(
            q, peak, total, acc, start, end, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, True, k_scale_ptr, v_scale_ptr,
        )  # fmt: skip
    if stats_ptr is None:
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(sums_ptr + head_row[:, None] * H + columns[None, :], y.to(sums_ptr.dtype.element_ty), mask=stored)
    else:
        partial = head_row * tl.num_programs(2) + split
        tl.store(sums_ptr + partial[:, None] * H + columns[None, :], acc, mask=stored)
        tl.store(stats_ptr + partial * 2, peak, mask=in_group)
        tl.store(stats_ptr + partial * 2 + 1, total, mask=in_group)


@triton.jit(do_not_specialize=["num_splits"])
def reduce_kernel(
    sums_ptr, stats_ptr, context_ptr, out_ptr, num_splits,
    H: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one (sequence, query head). The tile is always MAX_SPLITS wide, so its order of summing is fixed too."""
    WIDTH: tl.constexpr = triton.next_power_of_2(H)
    sequence, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_ptr + sequence)
    _, base, size = _split_bounds(context, WINDOW, TILE, SPLIT, MAX_SPLITS)
    split = tl.arange(0, MAX_SPLITS)
    columns = tl.arange(0, WIDTH)
    is_written = split < tl.cdiv(context - base, size)
    row = sequence.to(tl.int64) * tl.num_programs(1) + head
    partial = row * num_splits + split
    peak = tl.load(stats_ptr + partial * 2, mask=is_written, other=float("-inf"))
    total = tl.load(stats_ptr + partial * 2 + 1, mask=is_written, other=0.0)
    readable = is_written[:, None] & (columns < H)[None, :]
    sums = tl.load(sums_ptr + partial[:, None] * H + columns[None, :], mask=readable, other=0.0)
    highest = tl.max(peak, 0)
    decay = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(total * decay, 0)
    merged = tl.sum(sums * decay[:, None], 0) / tl.where(total > 0, total, 1.0)  # a padded row has no keys and becomes zeros
    tl.store(out_ptr + row * H + columns, merged.to(out_ptr.dtype.element_ty), mask=columns < H)


@triton.jit
def _find_sequence(query_start_ptr, num_decodes, num_prefills, block_index, BLOCK_Q: tl.constexpr):
    """The prefill that owns a query block. Prefill i owns the blocks from (its first row) // BLOCK_Q + i on: at least as many as it
    needs, and known without a prefix sum."""
    left = num_decodes * 0
    right = num_prefills
    while right - left > 1:
        middle = (left + right) // 2
        first = tl.load(query_start_ptr + num_decodes + middle) - num_decodes
        is_at_or_before = first // BLOCK_Q + middle <= block_index
        left = tl.where(is_at_or_before, middle, left)
        right = tl.where(is_at_or_before, right, middle)
    return left


@triton.jit(do_not_specialize=["num_decodes", "num_prefills", "table_stride"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, context_ptr, grid_ptr, out_ptr, k_scale_ptr, v_scale_ptr,
    num_decodes, num_prefills, table_stride, stride_block, stride_head, stride_place, scale,
    G: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """One (block of queries of one sequence, key/value head). Row r is query r // G of head r % G of the group. SPAN: window (0 without
    one) and sink."""
    WINDOW: tl.constexpr = SPAN[0]
    SINK: tl.constexpr = SPAN[1]
    WIDTH: tl.constexpr = triton.next_power_of_2(H)
    BLOCK_Q: tl.constexpr = ROWS // G
    block_index = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last queries see the most keys: start them first
    kv_head = tl.program_id(1)
    prefill = _find_sequence(query_start_ptr, num_decodes, num_prefills, block_index, BLOCK_Q)
    sequence = num_decodes + prefill
    row_start = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - row_start
    first_query = (block_index - ((row_start - num_decodes) // BLOCK_Q + prefill)) * BLOCK_Q
    if first_query >= query_len:
        return
    context = tl.load(context_ptr + sequence)
    member = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    query = first_query + member // G
    is_row = (member < BLOCK_Q * G) & (query < query_len)
    position = context - query_len + query
    head_row = (row_start + query).to(tl.int64) * (tl.num_programs(1) * G) + kv_head * G + member % G
    stored = is_row[:, None] & (columns < H)[None, :]
    q = tl.load(q_ptr + head_row[:, None] * H + columns[None, :], mask=stored, other=0.0)
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head.to(tl.int64) * (stride_head // (H // 4))
        v_scale_ptr += kv_head.to(tl.int64) * (stride_head // (H // 4))
    table_ptr += sequence.to(tl.int64) * table_stride

    first_position = context - query_len + first_query
    end = tl.minimum(first_position + BLOCK_Q, context)
    low, base, full_begin, full_end = _block_bounds(first_position, end, WINDOW, TILE)
    grid_start = position
    if NEAR is not None:  # before the first picture that a query is in, nothing is hidden; idle rows must keep no key alive
        position = tl.where(is_row, position, -1)
        grid_start = tl.load(grid_ptr + row_start + query, mask=is_row, other=-1)
        first_code = tl.min(tl.where(grid_start < 0, end, grid_start), 0)
        full_end = tl.maximum(tl.minimum(full_end, first_code // TILE * TILE), full_begin)

    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    if WINDOW > 0:
        if SINK > 0:
            sink_end = tl.minimum(base, SINK)
            for start in range(0, sink_end, TILE):
                peak, total, acc = _attend_tile(
                    q, peak, total, acc, start, sink_end, low, position, grid_start, k_ptr, v_ptr, table_ptr,
                    stride_block, stride_place, scale, H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, True, k_scale_ptr, v_scale_ptr,
                )  # fmt: skip
        for start in range(base, tl.minimum(full_begin, end), TILE):
            peak, total, acc = _attend_tile(
                q, peak, total, acc, start, end, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
                H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, True, k_scale_ptr, v_scale_ptr,
            )  # fmt: skip
    for start in range(full_begin, full_end, TILE):
        peak, total, acc = _attend_tile(
            q, peak, total, acc, start, end, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, False, k_scale_ptr, v_scale_ptr,
        )  # fmt: skip
    for start in range(full_end, end, TILE):
        peak, total, acc = _attend_tile(
            q, peak, total, acc, start, end, low, position, grid_start, k_ptr, v_ptr, table_ptr, stride_block, stride_place, scale,
            H, WIDTH, P, TILE, WINDOW, SINK, SOFTCAP, NEAR, True, k_scale_ptr, v_scale_ptr,
        )  # fmt: skip
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + head_row[:, None] * H + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=stored)
