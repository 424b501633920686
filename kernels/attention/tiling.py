"""How attention kernels cut their work: tiles, warps and stages by phase, head width, dtype, batch and length, as tables.

No kernel here. Called by the wrappers beside this file and by `bench.tune_attention`, which prints lines to paste.

Two kinds of table, because a row's bits must not depend on who else is in the batch:
- TILES and the split size say in which order a row is summed. They follow from the layer and the dtype alone. The warps belong to them,
  since a tile's sums are spread over warps, and so do rows: which tiles have to be masked follows from them, and a masked score is
  rounded once more than one that goes into a fused multiply-add.
- STAGES say how many tiles are in flight, which changes no bit, so they may follow the batch and the longest context.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import triton

Phase = Literal["decode", "packed", "prefill", "mixed"]
MAX_SPLITS = 32
"""A row with more keys than this many splits hold reads a multiple of the split per program (a function of its own length alone): this
bounds the grid and the scratch of a graph captured for long contexts."""
ONE_SPLIT_BYTES = 512 * 1024
"""Keys and values that one decode program may read so that a window needs no second one, nor a reduction. An estimate, to be measured: a
program reads some 80 GB/s, so these take 6.5 microseconds, where three splits of a window of 512 took 21 with their reduction (32
sequences on an H200, head width 256); for a single sequence, splits would take about as long."""


class Tiling(NamedTuple):
    """rows of queries and keys per tile, and how the compiler should lay the program out."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Tile(NamedTuple):
    """A line of TILES. head_width: the widest it is for."""

    head_width: int
    rows: int
    keys: int
    num_warps: int


class Stages(NamedTuple):
    """A line of STAGES. head_width, batch, context: the largest it is for; 0 is any."""

    head_width: int
    batch: int
    context: int
    num_stages: int


# The first line that is wide enough holds; beyond the widest, the last. float32 ("4") takes small tiles: exact products have no tensor
# core. Decode has 16 rows, the smallest product a tensor core takes; 128 keys of 64 numbers, because a program waits for its chain of
# products and sums at each tile, and 64 keys are 16 KB a wait (64 sequences of 1,024 on an H200: 0.40 of the limit). Beyond what was
# measured there, the lines are starting values, from the resources that kernels compile to: `bench.tune_attention` finds better ones.
TILES: dict[tuple[Phase, int], tuple[Tile, ...]] = {
    ("decode", 2): (Tile(64, 16, 128, 4), Tile(128, 16, 64, 4), Tile(256, 16, 32, 4), Tile(512, 16, 16, 4)),
    ("decode", 4): (Tile(256, 16, 16, 4),),
    # A decode over a pool of one-byte numbers: the bytes of a plain tile are twice the keys.
    ("packed", 2): (Tile(128, 16, 128, 4), Tile(256, 16, 64, 4), Tile(512, 16, 32, 4)),
    ("packed", 4): (Tile(256, 16, 16, 4),),
    ("prefill", 2): (Tile(128, 128, 64, 8), Tile(256, 64, 32, 8), Tile(512, 32, 16, 8)),
    ("prefill", 4): (Tile(64, 32, 32, 8), Tile(256, 32, 16, 8)),
    # The prefills of the kernel for both: the keys of a prefill, the warps of a decode, whose sums are spread over them.
    ("mixed", 2): (Tile(128, 64, 64, 4),),
    ("mixed", 4): (Tile(64, 32, 32, 4), Tile(128, 32, 16, 4)),
}
# A neighbourhood's mask is known before keys are read and held until they are multiplied: with 64 keys a tile it would spill.
NEAR_KEYS = 32
# Keys of one decode program, by head width: 64 to 256 KB of them and their values.
SPLITS = ((64, 512), (256, 256), (512, 128))

# The first line that fits holds. Half of a decode's stages go to reading the block table ahead, so 5 keep two tiles in shared memory
# (72 KB at width 128: three programs a multiprocessor, of which one's end hides another's beginning) and 7 three (two programs), for few
# sequences, whose programs are alone. A context of a tile or two has nothing to read ahead.
STAGES: dict[tuple[Phase, int], tuple[Stages, ...]] = {
    ("decode", 2): (Stages(0, 0, 128, 3), Stages(0, 31, 0, 7), Stages(0, 0, 0, 5)),
    ("decode", 4): (Stages(0, 0, 0, 3),),
    ("packed", 2): (Stages(0, 0, 0, 4),),
    ("packed", 4): (Stages(0, 0, 0, 3),),
    ("prefill", 2): (Stages(128, 0, 0, 3), Stages(0, 0, 0, 2)),
    ("prefill", 4): (Stages(0, 0, 0, 2),),
    ("mixed", 2): (Stages(64, 0, 0, 5), Stages(0, 0, 0, 4)),
    ("mixed", 4): (Stages(0, 0, 0, 2),),
}


def decode_tiling(group: int, head_width: int, itemsize: int, batch: int = 1, context: int = 1 << 30, is_packed: bool = False) -> Tiling:
    """group: query heads of a key/value head; itemsize: bytes of a number of q; batch: decodes; context: the longest, as the host
    knows it (of a captured graph: what it was captured for); is_packed: keys and values are one byte a number."""
    return _tiling("packed" if is_packed else "decode", group, head_width, itemsize, batch, context)


def prefill_tiling(group: int, head_width: int, itemsize: int, has_near: bool = False, batch: int = 1, context: int = 1 << 30) -> Tiling:
    """batch: prefills. has_near: of the layer, not of the step, so that a row's order of summing never depends on its neighbours."""
    tiling = _tiling("prefill", group, head_width, itemsize, batch, context)
    return tiling._replace(keys=min(tiling.keys, NEAR_KEYS)) if has_near else tiling


def mixed_tiling(group: int, head_width: int, itemsize: int) -> Tiling:
    """Of the prefills in `mixed_triton.py`."""
    return _tiling("mixed", group, head_width, itemsize, 1, 1 << 30)


def split_of(head_width: int, itemsize: int, window: int | None, tile: int) -> int:
    """Keys that one decode program reads; a window that is not too large is read by one program, whatever the context. tile: keys of
    the layer's tile."""
    if window is not None and 2 * window * triton.next_power_of_2(head_width) * itemsize <= ONE_SPLIT_BYTES:
        return -(-window // tile) * tile + tile  # the first tile may begin before the window does
    return next((keys for width, keys in SPLITS if head_width <= width), SPLITS[-1][1])


def num_splits_of(max_context_len: int, window: int | None, tile: int, split: int) -> int:
    """An upper bound of the splits of any row. A window's own splits are few whatever the context."""
    span = max_context_len if window is None else min(max_context_len, window + tile)
    return min(MAX_SPLITS, max(1, -(-span // split)))


def _tiling(phase: Phase, group: int, head_width: int, itemsize: int, batch: int, context: int) -> Tiling:
    table = (phase, 4 if itemsize > 2 else 2)
    tile = next((line for line in TILES[table] if head_width <= line.head_width), TILES[table][-1])
    stages = next(line for line in STAGES[table] if _fits(line, head_width, batch, context))
    return Tiling(max(tile.rows, triton.next_power_of_2(group)), tile.keys, tile.num_warps, stages.num_stages)


def _fits(line: Stages, head_width: int, batch: int, context: int) -> bool:
    bounds = ((line.head_width, head_width), (line.batch, batch), (line.context, context))
    return all(bound == 0 or value <= bound for bound, value in bounds)
