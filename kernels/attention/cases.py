"""Named attention inputs as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here: a case says what goes in and why it is worth a place. Called by `tests/kernels` and `bench/kernels`.
Shape suffixes: T tokens, S sequences, N query heads, K key/value heads, H head width, B blocks, P places, W blocks in the widest table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.attention.reference import visible
from kernels.kv_write.cases import POOL_DTYPES, PoolKind
from kernels.kv_write.reference import quantize_heads
from kernels.ops import AttentionSpec, Neighbourhood, PagedBatch, PagedKV

Size = Literal["tiny", "small", "bench", "huge"]
"""tiny: fit for Triton's interpreter. small: for plain PyTorch and a GPU. bench: worth timing. huge: several GiB, GPU only."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """sequences: (query tokens, context) of each, those with one query token first; (1, 0) is a padded row.

    pictures: of each sequence, (position of the first code, codes so far) of its pictures; empty where no sequence has any.
    block_gap: blocks skipped in the pool between two that are used, which makes offsets large at no cost in data.
    pool: what the pool holds, numbers in q's dtype or quantised ones with a scale for each head of a token.
    """

    name: str
    why: str
    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 3
    num_kv_heads: int = 1
    head_width: int = 64
    block_size: int = 16
    window: int | None = None
    sink: int = 0
    softcap: float = 0.0
    near: Neighbourhood | None = None
    pictures: tuple[tuple[tuple[int, int], ...], ...] = ()
    block_gap: int = 0
    pool: PoolKind = "plain"
    size: Size = "tiny"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_width**-0.5, self.window, self.sink, self.softcap, self.near)

    def grid_starts(self, index: int) -> list[int]:
        """Of every position of a sequence: where the picture that it is a code of begins, -1 for the others."""
        starts = [-1] * self.sequences[index][1]
        for first, count in self.pictures[index] if self.pictures else ():
            starts[first : first + count] = [first] * count
        return starts


QUANTISED = ((1, 17), (1, 0), (1, 300), (40, 100))
CASES = (
    AttentionCase("one_key", "a softmax over a single key must be exactly one", ((1, 1),)),
    AttentionCase("full_block", "a context that ends exactly where a block ends", ((1, 16), (1, 32))),
    AttentionCase(
        "ragged_decodes", "lengths below, at and above one split, and a padded row in the middle", ((1, 5), (1, 0), (1, 256), (1, 300))
    ),
    AttentionCase("equal_heads", "no grouping: one query head per key/value head", ((1, 40), (7, 23)), num_heads=2, num_kv_heads=2),
    AttentionCase("eight_to_one", "a group of eight and a head width of 128", ((1, 70), (9, 50)), num_heads=8, head_width=128),
    AttentionCase("wide_heads", "the widest heads, which take smaller tiles", ((1, 33), (5, 40)), num_heads=2, head_width=256),
    AttentionCase(
        "odd_width", "a head width that is no power of two is padded in registers", ((1, 20), (6, 9)), head_width=48, block_size=8
    ),
    AttentionCase("odd_block", "a block size that is no power of two", ((1, 29), (4, 29)), block_size=12),
    AttentionCase("fresh_prompts", "two whole prompts, one of them a single tile, no decodes", ((33, 33), (2, 2))),
    AttentionCase("chunk", "a chunk in the middle of a prompt: queries start past many full tiles", ((20, 150),), num_heads=2),
    AttentionCase(
        "mixed", "decodes, then prefills of several query blocks: both launches in one step", ((1, 17), (1, 90), (70, 100), (3, 64))
    ),
    AttentionCase("window", "a window smaller than the context, not aligned to a tile", ((1, 200), (30, 170)), window=37),
    AttentionCase("window_unused", "a window larger than every context", ((1, 30), (12, 40)), window=512),
    AttentionCase("window_sink", "first positions stay visible far behind the window", ((1, 230), (1, 12), (25, 200)), window=50, sink=4),
    AttentionCase("sink_meets_window", "the sink reaches into the window's first tile", ((1, 80), (10, 90)), window=70, sink=20),
    AttentionCase("window_full_tiles", "a window wide enough to hold whole tiles between its two edges", ((50, 330),), window=150, sink=4),
    AttentionCase("window_splits", "a window of more than one split: only the first may count the sink", ((1, 600),), window=300, sink=4),
    AttentionCase("window_one", "every query sees itself alone", ((1, 9), (5, 20)), window=1),
    AttentionCase("softcap", "scores beyond the cap, where its tanh bends", ((1, 100), (20, 60)), softcap=2.0),
    AttentionCase(
        "near_decodes",
        "the first, a middle and the last code of a picture, then text behind one, a padded row, and text without pictures",
        ((1, 11), (1, 60), (1, 74), (1, 80), (1, 0), (1, 30)),
        near=Neighbourhood(8, 2, 1),
        pictures=(((10, 1),), ((20, 40),), ((10, 64),), ((5, 64),), (), ()),
    ),
    AttentionCase(
        "near_prompts",
        "text, a picture and text at once; a film of two frames; a chunk that begins inside a picture whose head no query sees any more",
        ((100, 100), (70, 150), (9, 190)),
        near=Neighbourhood(8, 1, 2),
        pictures=(((17, 64),), ((10, 64), (75, 64)), ((130, 60),)),
        num_heads=2,
    ),
    AttentionCase(
        "near_window",
        "both bounds at once: window and sink cut a picture that the neighbourhood cuts too",
        ((1, 160), (1, 140), (40, 150)),
        window=21,
        sink=12,
        near=Neighbourhood(6, 3, 1),
        pictures=(((4, 36), (120, 36)), ((90, 36),), ((8, 36), (100, 36))),
    ),
    AttentionCase(
        "near_all",
        "radii beyond the picture hide nothing",
        ((1, 50), (20, 60)),
        near=Neighbourhood(5, 9, 9),
        pictures=(((30, 20),), ((38, 22),)),
    ),
    AttentionCase(
        "near_itself",
        "one row, no column: of its picture a code sees itself and those straight above the next code",
        ((1, 40), (30, 36)),
        near=Neighbourhood(5, 1, 0),
        pictures=(((20, 20),), ((6, 25),)),
        softcap=3.0,
    ),
    AttentionCase("near_text", "a neighbourhood without a picture", ((1, 40), (30, 36)), near=Neighbourhood(5, 1, 0)),
    AttentionCase(
        "near_splits",
        "a picture of 24 x 24 codes over three splits and many tiles, most of them hidden",
        ((1, 600), (1, 350), (90, 500)),
        size="small",
        num_heads=6,
        num_kv_heads=2,
        near=Neighbourhood(24, 4, 4),
        pictures=(((20, 576),), ((20, 330),), ((3, 490),)),
    ),
    AttentionCase("int8", "keys and values in int8: both launches, a padded row, two splits", QUANTISED, pool="int8"),
    AttentionCase("fp8", "keys and values in e4m3: both launches, a padded row, two splits", QUANTISED, pool="fp8"),
    AttentionCase(
        "fp8_narrow",
        "scales behind a window, a sink and a cap, at a width that is no power of two",
        ((1, 90), (25, 120)),
        num_heads=4,
        num_kv_heads=2,
        head_width=48,
        block_size=12,
        window=37,
        sink=4,
        softcap=2.0,
        pool="fp8",
    ),
    AttentionCase(
        "int8_near",
        "numbers that a neighbourhood hides have scales that nobody may read",
        ((1, 60), (30, 70)),
        near=Neighbourhood(8, 2, 1),
        pictures=(((20, 40),), ((6, 64),)),
        head_width=128,
        pool="int8",
    ),
    AttentionCase(
        "grouped_prefill",
        "group 3 leaves idle rows in each tile of queries",
        ((130, 130), (60, 300)),
        size="small",
        num_heads=9,
        num_kv_heads=3,
    ),
    AttentionCase("long_decode", "more keys than 32 splits of 256 hold, so a split grows", ((1, 9000), (1, 8193), (1, 8192)), size="small"),
    AttentionCase("fp8_long", "many tiles of e4m3, in a split that grows", ((1, 8500), (50, 700)), size="small", pool="fp8"),
    AttentionCase(
        "long_window",
        "a local layer of a long context: few splits, whatever the length",
        ((1, 9000), (64, 5000)),
        size="small",
        window=1024,
        sink=4,
    ),
    AttentionCase(
        "far_blocks",
        "block ids whose offsets pass 2 ** 31 elements",
        ((1, 40), (8, 30)),
        block_gap=100_000,
        num_heads=8,
        head_width=128,
        size="huge",
    ),
    AttentionCase("bench_decode", "a full batch in the middle of its answers", ((1, 1024),) * 64, 9, 3, size="bench"),
    AttentionCase(
        "bench_decode_long", "one sequence, long context: the split must fill the device", ((1, 32768),), 32, 8, 128, size="bench"
    ),
    AttentionCase("bench_decode_window", "a local layer of a hybrid model", ((1, 8192),) * 32, 8, 1, 256, window=512, size="bench"),
    AttentionCase("bench_decode_fp8", "a full batch over e4m3", ((1, 1024),) * 64, 9, 3, pool="fp8", size="bench"),
    AttentionCase("bench_decode_long_fp8", "one sequence, long context, e4m3", ((1, 32768),), 32, 8, 128, pool="fp8", size="bench"),
    AttentionCase("bench_decode_long_int8", "the same in int8", ((1, 32768),), 32, 8, 128, pool="int8", size="bench"),
    AttentionCase("bench_prefill_fp8", "one long fresh prompt over e4m3", ((4096, 4096),), 32, 8, 128, pool="fp8", size="bench"),
    AttentionCase("bench_prefill", "one long fresh prompt", ((4096, 4096),), 32, 8, 128, size="bench"),
    AttentionCase("bench_chunks", "a step of chunked prefill beside decodes", ((1, 2048),) * 32 + ((512, 2048),) * 4, 9, 3, size="bench"),
)


def build(case: AttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, PagedKV]:
    """(q [T, N, H], kv) of a case. Blocks lie in random order in one pool that holds keys beside values, so both are strided.

    Everything that no query sees is NaN (of int8 its scales): blocks nobody owns, places past a context, positions behind every query's
    window, and codes outside every query's neighbourhood. Heads of a quantised pool differ in size, and so do their scales.
    """
    generator = torch.Generator().manual_seed(seed)
    block_size, stride = case.block_size, case.block_gap + 1
    width = max(-(-context // block_size) for _, context in case.sequences)
    num_blocks = len(case.sequences) * width
    table = (torch.randperm(num_blocks, generator=generator) * stride).view(-1, width).int()
    shape = (num_blocks * stride, 2, case.num_kv_heads, block_size, case.head_width)
    pool = torch.empty(shape, dtype=POOL_DTYPES.get(case.pool, dtype), device=device)
    pool[::stride] = 99 if case.pool == "int8" else float("nan")
    kv = PagedKV(pool[:, 0], pool[:, 1], _batch(case, table.to(device), device))
    if case.pool != "plain":
        of_rows = torch.full(shape[:-1], float("nan"), device=device)
        kv.key_scales, kv.value_scales = of_rows[:, 0], of_rows[:, 1]
    for index, (num_queries, context) in enumerate(case.sequences):
        starts = torch.tensor(case.grid_starts(index)[context - num_queries :], dtype=torch.int32) if case.pictures and context else None
        positions, _ = visible(num_queries, context, case.spec, starts, "cpu")
        block, place = table[index, positions // block_size].long(), positions % block_size
        where = (block.to(device), slice(None), place.to(device))
        for side, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
            rows = torch.randn((len(positions), case.num_kv_heads, case.head_width), generator=generator)
            if scales is None:
                side[where] = rows.to(device, dtype)
                continue
            sizes = 0.5 + torch.rand((len(positions), case.num_kv_heads, 1), generator=generator)
            side[where], scales[where] = (x.to(device) for x in quantize_heads(rows * sizes, side.dtype))
    num_tokens = sum(num_queries for num_queries, _ in case.sequences)
    q = torch.randn((num_tokens, case.num_heads, case.head_width), generator=generator)
    return q.to(device, dtype), kv


def _batch(case: AttentionCase, table: Tensor, device: torch.device | str) -> PagedBatch:
    queries = [num_queries for num_queries, _ in case.sequences]
    contexts = [context for _, context in case.sequences]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    grid = [
        start
        for index, (count, context) in enumerate(case.sequences)
        for start in (case.grid_starts(index)[context - count :] if context else [-1] * count)
    ]
    return PagedBatch(
        slots=torch.full((sum(queries),), -1, dtype=torch.int64, device=device),
        block_table=table,
        query_start=starts.to(device),
        context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
        num_decodes=sum(1 for num_queries in queries if num_queries == 1),
        max_query_len=max((n for n in queries if n > 1), default=0),
        max_context_len=max(contexts),
        grid_start=torch.tensor(grid, dtype=torch.int32, device=device) if case.pictures else None,
    )
