"""Prefill attention for Hopper in Gluon: one warp fetches blocks of keys and values, two groups of four warps multiply.

The fetching warp follows the block table with the chip's copy engine (a copy a block, completion counted by a barrier in shared memory)
and runs ahead into the next block of queries while the others end the last: a program a multiprocessor, each with a list of work.
Each multiplying group holds 64 rows and has its next product of queries and keys under way while it takes the softmax of the one at hand.
Triton's interpreter can't run this, so it is used only on a GPU for which `verified.json` lists it. Called by `variants`.
Longer than most files because the three roles, what they share and when they may be launched have to be read together.
Shape suffixes: N query heads, K key/value heads, G = N / K, H head width, P places in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.ops import AttentionSpec, PagedKV

LOG2_E = 1.4426950408889634
GROUP_ROWS = gl.constexpr(64)
"""Rows of queries that a group of four warps multiplies at once."""
CHUNK = gl.constexpr(64)
"""Numbers in a row of shared memory: 128 bytes, which is how far the copy engine and the tensor cores swizzle."""
KEYS = {64: 128, 128: 128, 256: 64}
"""Keys per tile by head width: two tiles of keys and two of values beside the queries fill shared memory."""
STAGES = {64: 3, 128: 2, 256: 2}
"""Tiles of each that are fetched ahead."""


def can_run(q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> bool:
    """What the kernel takes, by the GPU, the layer and how its keys and values lie, never by the step: a row's bits must not depend on it.

    Half-width numbers, no sink, softcap or neighbourhood, up to 64 query heads a key/value head, blocks of 8 to 128 places (of 64 at width
    256) whose rows of H numbers lie one behind the other, and fewer than 2 ** 31 such rows.
    """
    keys, group = kv.keys, q_TNH.shape[1] // kv.keys.shape[1]
    places, width = keys.shape[2:]
    is_plain = spec.sink == 0 and spec.softcap == 0 and spec.neighbourhood is None and spec.scale > 0
    if q_TNH.is_cuda and torch.cuda.get_device_capability(q_TNH.device)[0] != 9:
        return False
    is_half = q_TNH.dtype in (torch.bfloat16, torch.float16) and keys.dtype == kv.values.dtype == q_TNH.dtype
    if not (is_plain and is_half and group <= 64 and width in KEYS and places >= 8 and KEYS[width] % places == 0):
        return False
    strides = keys.stride()
    is_in_rows = strides[2:] == (width, 1) and strides[0] % width == 0 and strides[1] % width == 0 and kv.values.stride() == strides
    is_aligned = keys.data_ptr() % 16 == 0 and kv.values.data_ptr() % 16 == 0
    return is_in_rows and is_aligned and _num_rows(keys) < 2**31


def prefill(q: Tensor, kv: PagedKV, spec: AttentionSpec, out: Tensor) -> None:
    """The prefills of a batch, q and out [T, N, H] contiguous. Only on a GPU of compute capability 9.0, where `can_run` says so.

    Mutates: out, the rows of sequences with more than one query. Source: Shah et al. 2024 (FlashAttention-3), section 3.
    """
    batch, keys = kv.batch, kv.keys
    num_tokens, num_heads, width = q.shape
    num_kv_heads, places = keys.shape[1:3]
    group = num_heads // num_kv_heads
    num_prefills = batch.context_len.shape[0] - batch.num_decodes
    num_query_blocks = (num_tokens - batch.num_decodes) // (2 * GROUP_ROWS.value // group) + num_prefills
    hopper_prefill_kernel[(min(num_query_blocks * num_kv_heads, _num_programs(q.device)),)](
        q,
        _descriptor(keys),
        _descriptor(kv.values),
        batch.block_table,
        batch.query_start,
        batch.context_len,
        out,
        batch.num_decodes,
        num_prefills,
        num_query_blocks,
        num_kv_heads,
        batch.block_table.stride(0),
        keys.stride(0) // width,
        keys.stride(1) // width,
        spec.scale * LOG2_E,
        G=group,
        H=width,
        P=places,
        TILE=KEYS[width],
        STAGES=STAGES[width],
        WINDOW=spec.window or 0,
        num_warps=4,
    )


def _num_programs(device: torch.device) -> int:
    """One a multiprocessor; without a GPU, so few that each has several items."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _num_rows(side: Tensor) -> int:
    """Rows of H numbers from a side's first number to its last."""
    blocks, heads, places, width = side.shape
    return ((blocks - 1) * side.stride(0) + (heads - 1) * side.stride(1)) // width + places


def _descriptor(side: Tensor) -> TensorDescriptor:
    """The copy engine's view of a side [B, K, P, H]: rows of H numbers, of which it fetches boxes of [P, 64]."""
    places, width = side.shape[2:]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(side, [_num_rows(side), width], [width, 1], [places, CHUNK.value], layout)


@gluon.jit
def _find_sequence(query_start_ptr, num_decodes, num_prefills, block_index, BLOCK_Q: gl.constexpr):
    """As in `triton.py`: prefill i owns the blocks of queries from (its first row) // BLOCK_Q + i on."""
    left = num_decodes * 0
    right = num_prefills
    while right - left > 1:
        middle = (left + right) // 2
        first = gl.load(query_start_ptr + num_decodes + middle) - num_decodes
        is_at_or_before = first // BLOCK_Q + middle <= block_index
        left = gl.where(is_at_or_before, middle, left)
        right = gl.where(is_at_or_before, right, middle)
    return left


@gluon.jit
def _item(turn, work, G: gl.constexpr, TILE: gl.constexpr, WINDOW: gl.constexpr):
    """What this program does in its turn: (key/value head, sequence, its first row, how many of its queries there are, the first of them
    here, its context, the first tile of keys, how many tiles). No tiles for a block of queries that belongs to nobody.

    A prompt's last queries see the most keys, so blocks are taken from the last; every other turn goes through the programs backwards,
    which evens out what each of them gets.
    """
    query_start_ptr, context_ptr, num_decodes, num_prefills, num_query_blocks, num_kv_heads = work
    BLOCK_Q: gl.constexpr = 2 * GROUP_ROWS // G
    num_programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, gl.program_id(0), num_programs - 1 - gl.program_id(0))
    unit = (turn * num_programs + place) // num_kv_heads
    block_index = gl.maximum(num_query_blocks - 1 - unit, 0)
    prefill = _find_sequence(query_start_ptr, num_decodes, num_prefills, block_index, BLOCK_Q)
    sequence = num_decodes + prefill
    row_start = gl.load(query_start_ptr + sequence)
    query_len = gl.load(query_start_ptr + sequence + 1) - row_start
    context = gl.load(context_ptr + sequence)
    first_query = (block_index - ((row_start - num_decodes) // BLOCK_Q + prefill)) * BLOCK_Q
    first_position = context - query_len + first_query
    first_tile = gl.maximum(first_position - WINDOW + 1, 0) // TILE if WINDOW > 0 else 0
    num_tiles = gl.cdiv(gl.minimum(first_position + BLOCK_Q, context), TILE) - first_tile
    num_tiles = gl.where((unit < num_query_blocks) & (first_query < query_len), num_tiles, 0)
    kv_head = (turn * num_programs + place) % num_kv_heads
    return kv_head, sequence, row_start, query_len, first_query, context, first_tile, num_tiles


@gluon.jit
def _fetch_tile(
    desc, blocks, full, free, at, row_ptr, first_entry, last_entry, block_rows, head_row,
    H: gl.constexpr, P: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of keys or of values, the at-th tile of the program. Entries behind the context repeat its last block: what lies there is masked."""
    slot = at % STAGES
    mbarrier.wait(free.index(slot), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), TILE * H * 2)
    for b in gl.static_range(TILE // P):
        row = gl.load(row_ptr + gl.minimum(first_entry + b, last_entry)) * block_rows + head_row
        for c in gl.static_range(H // CHUNK):
            into = blocks.index((slot * (H // CHUNK) + c) * (TILE // P) + b)
            tma.async_copy_global_to_shared(desc, [row, c * CHUNK], full.index(slot), into)


@gluon.jit
def _fetch(
    k_desc, v_desc, k_blocks, v_blocks, bars, work, table_ptr, table_stride, block_rows, head_rows, num_turns,
    G: gl.constexpr, H: gl.constexpr, P: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The fetching warp, ahead of the others by STAGES tiles, past the end of an item too."""
    fetched = 0
    for turn in range(num_turns):
        kv_head, sequence, _, _, _, context, first_tile, num_tiles = _item(turn, work, G, TILE, WINDOW)
        row_ptr = table_ptr + sequence.to(gl.int64) * table_stride
        last_entry, head_row = (context - 1) // P, kv_head * head_rows
        for i in range(num_tiles):
            at, first_entry = fetched + i, (first_tile + i) * (TILE // P)
            _fetch_tile(k_desc, k_blocks, bars[0], bars[1], at, row_ptr, first_entry, last_entry, block_rows, head_row, H, P, TILE, STAGES)
            _fetch_tile(v_desc, v_blocks, bars[2], bars[3], at, row_ptr, first_entry, last_entry, block_rows, head_row, H, P, TILE, STAGES)
        fetched += num_tiles


@gluon.jit
def _softmax(scores, peak, total, start, position, scale, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """(weights, decay, peak, total) after a tile; peak is of scores as they are multiplied, exponents are of 2."""
    if MASKED:
        at = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (position[:, None] - at[None, :] < WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    base = new_peak * scale
    if WINDOW > 0:  # a row that has seen nothing yet must not make inf - inf
        base = gl.where(new_peak == float("-inf"), 0.0, base)
    weights = gl.exp2(scores * scale - base[:, None])
    decay = gl.exp2(peak * scale - base)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _before_the_wait(total):
    """total as it is. Keeps the assembler, which knows of no reason not to, from moving a tile's exponentials behind the wait for a product
    that they are meant to run beside: it has to believe in a store that waits for their sum to be below zero, which no sum is."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p st.shared.b32 [$1], $1; mov.b32 $0, $1; }",
        "=r,r",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _mend(v_tile, start, low, context, ROW: gl.constexpr):
    """Values that no query sees become zero, for they may be anything, and not even 0 times NaN is 0. Both groups do it, alike."""
    if (start < low) | (start + v_tile.shape[0] > context):
        at = start + gl.arange(0, v_tile.shape[0], gl.SliceLayout(1, ROW))
        values = v_tile.load(ROW)
        v_tile.store(gl.where(((at >= low) & (at < context))[:, None], values, gl.zeros_like(values)))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _next_tile(
    q_rows, k_tiles, v_tiles, bars, i, weights, acc, peak, total, used, first_tile, position, low, context, scale,
    WINDOW: gl.constexpr, STAGES: gl.constexpr, ROW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tile i's scores and tile i - 1's share of the sums are under way together; then the softmax of i. i > 0; used: tiles of the items
    before this one, which the rings have turned by."""
    k_full, k_free, v_full, v_free = bars
    TILE: gl.constexpr = k_tiles.shape[1]
    at = used + i
    slot, before = at % STAGES, (at - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    zeros = gl.zeros([GROUP_ROWS, TILE], gl.float32, layout)
    scores = warpgroup_mma(q_rows, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(slot))
    start = (first_tile + i) * TILE
    new_weights, decay, peak, total = _softmax(scores, peak, total, start, position, scale, WINDOW, MASKED)
    total = _before_the_wait(total)
    new_weights = gl.convert_layout(new_weights.to(v_tiles.dtype), weights.type.layout)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_free.index(before))
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = new_weights
    if MASKED:
        mbarrier.wait(v_full.index(slot), (at // STAGES) & 1)
        _mend(v_tiles.index(slot), start, low, context, ROW)
    return weights, acc, peak, total


@gluon.jit
def _multiply_item(
    q_ptr, out_ptr, q_rows, k_tiles, v_tiles, bars, used, item, num_heads, scale,
    G: gl.constexpr, H: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: rows GROUP * 64 ... GROUP * 64 + 63 of the item's. Row r is query r // G of head r % G."""
    kv_head, _, row_start, query_len, first_query, context, first_tile, num_tiles = item
    k_full, k_free, v_full, v_free = bars
    TILE: gl.constexpr = k_tiles.shape[1]
    BLOCK_Q: gl.constexpr = 2 * GROUP_ROWS // G
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (CHUNK // 8), CHUNK // 8], [4, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    member = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ROW))
    query = first_query + member // G
    is_row = (member < BLOCK_Q * G) & (query < query_len)
    offsets = (((row_start + query).to(gl.int64) * num_heads + kv_head * G + member % G) * H)[:, None]
    offsets = offsets + gl.arange(0, H, gl.SliceLayout(0, ROW))[None, :]
    q_rows.store(gl.load(q_ptr + offsets, mask=is_row[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    first_position = context - query_len + first_query
    position = first_position + (GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, SCORES))) // G
    low = gl.maximum(first_position - WINDOW + 1, 0) if WINDOW > 0 else 0
    peak = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([GROUP_ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([GROUP_ROWS, H], gl.float32, SUMS)
    slot, parity = used % STAGES, (used // STAGES) & 1
    mbarrier.wait(k_full.index(slot), parity)
    zeros = gl.zeros([GROUP_ROWS, TILE], gl.float32, SCORES)
    scores = warpgroup_mma(q_rows, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_free.index(slot))
    numbers, _, peak, total = _softmax(scores, peak, total, first_tile * TILE, position, scale, WINDOW, True)
    weights = gl.convert_layout(numbers.to(v_tiles.dtype), gl.DotOperandLayout(0, SUMS, 2))
    mbarrier.wait(v_full.index(slot), parity)
    _mend(v_tiles.index(slot), first_tile * TILE, low, context, ROW)

    # Whole tiles: all queries of the program see all their keys.
    whole_end = gl.maximum((first_position + 1) // TILE - first_tile, 1)
    whole_begin = 1
    if WINDOW > 0:
        last_position = gl.minimum(first_position + BLOCK_Q, context) - 1
        whole_begin = gl.maximum(gl.cdiv(gl.maximum(last_position - WINDOW + 1, 0), TILE) - first_tile, 1)
        whole_begin = gl.minimum(whole_begin, num_tiles)
        whole_end = gl.maximum(whole_end, whole_begin)
        for i in range(1, whole_begin):
            weights, acc, peak, total = _next_tile(
                q_rows, k_tiles, v_tiles, bars, i, weights, acc, peak, total, used, first_tile, position, low, context, scale,
                WINDOW, STAGES, ROW, True,
            )  # fmt: skip
    for i in range(whole_begin, whole_end):
        weights, acc, peak, total = _next_tile(
            q_rows, k_tiles, v_tiles, bars, i, weights, acc, peak, total, used, first_tile, position, low, context, scale,
            WINDOW, STAGES, ROW, False,
        )  # fmt: skip
    for i in range(whole_end, num_tiles):
        weights, acc, peak, total = _next_tile(
            q_rows, k_tiles, v_tiles, bars, i, weights, acc, peak, total, used, first_tile, position, low, context, scale,
            WINDOW, STAGES, ROW, True,
        )  # fmt: skip
    last = used + num_tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    acc = warpgroup_mma(weights, v_tiles.index(last % STAGES), acc)
    mbarrier.arrive(v_free.index(last % STAGES))
    y = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
    gl.store(out_ptr + offsets, gl.convert_layout(y.to(out_ptr.dtype.element_ty), ROW), mask=is_row[:, None])


@gluon.jit
def _multiply(
    q_ptr, out_ptr, q_rows, k_tiles, v_tiles, bars, work, num_turns, scale,
    G: gl.constexpr, H: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A group of four warps: item after item."""
    num_heads = work[5] * G
    used = 0
    for turn in range(num_turns):
        item = _item(turn, work, G, k_tiles.shape[1], WINDOW)
        if item[7] > 0:
            _multiply_item(q_ptr, out_ptr, q_rows, k_tiles, v_tiles, bars, used, item, num_heads, scale, G, H, WINDOW, STAGES, GROUP)
        used += item[7]


@gluon.jit(do_not_specialize=["num_decodes", "num_prefills", "num_query_blocks", "table_stride"])
def hopper_prefill_kernel(
    q_ptr, k_desc, v_desc, table_ptr, query_start_ptr, context_ptr, out_ptr, num_decodes, num_prefills, num_query_blocks, num_kv_heads,
    table_stride, block_rows, head_rows, scale,
    G: gl.constexpr, H: gl.constexpr, P: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Items are (128 rows of queries of one sequence, key/value head); a program takes one in each of its turns, so that it fetches for the
    next while it ends the last. scale: of scores in units of log 2. *_rows: strides in rows of H."""
    SHARED: gl.constexpr = k_desc.layout
    DTYPE: gl.constexpr = k_desc.dtype
    q_all = gl.allocate_shared_memory(DTYPE, [2, GROUP_ROWS, H], SHARED)
    k_blocks = gl.allocate_shared_memory(DTYPE, [STAGES * H // CHUNK * TILE // P, P, CHUNK], SHARED)
    v_blocks = gl.allocate_shared_memory(DTYPE, [STAGES * H // CHUNK * TILE // P, P, CHUNK], SHARED)
    k_tiles = k_blocks._reinterpret(DTYPE, [STAGES, TILE, H], SHARED)
    v_tiles = v_blocks._reinterpret(DTYPE, [STAGES, TILE, H], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    bars = (k_full, k_free, v_full, v_free)
    work = (query_start_ptr, context_ptr, num_decodes, num_prefills, num_query_blocks, num_kv_heads)
    num_turns = gl.cdiv(num_query_blocks * num_kv_heads, gl.num_programs(0))
    gl.warp_specialize(
        [
            (_multiply, (q_ptr, out_ptr, q_all.index(0), k_tiles, v_tiles, bars, work, num_turns, scale, G, H, WINDOW, STAGES, 0)),
            (_multiply, (q_ptr, out_ptr, q_all.index(1), k_tiles, v_tiles, bars, work, num_turns, scale, G, H, WINDOW, STAGES, 1)),
            (_fetch, (k_desc, v_desc, k_blocks, v_blocks, bars, work, table_ptr, table_stride, block_rows, head_rows, num_turns,
                      G, H, P, TILE, STAGES, WINDOW)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
