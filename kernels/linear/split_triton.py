"""How a product's inputs are divided among programs, and how their sums become one: shared by the kernels of quantised weights.

No product here. Called by `grouped_triton`, `fp8_triton` and `triton` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056
"""That a product is split for: eight small ones on each of the 132 processors of an H100 or H200."""
LEAST_CHUNKS = 4
"""Of a split: fewer, and a program is over before its loads overlap."""
MOST_SPLITS = 8
"""Each writes a sum of 4 bytes for every element of the output, and one program reads them all."""


@dataclass(frozen=True, slots=True)
class Split:
    """Of `num_chunks` equal pieces of a weight's inputs each of `count` programs takes `chunks`, the last one what is left."""

    count: int
    chunks: int


def split_inputs(num_tiles: int, num_chunks: int) -> Split:
    """For a weight whose outputs are num_tiles tiles. A function of the weight's shape alone, never of how many rows x has: so a row's
    sums are always made in the same pieces."""
    count = min(max(1, PROGRAMS // num_tiles), max(1, num_chunks // LEAST_CHUNKS), MOST_SPLITS)
    chunks = -(-num_chunks // count)
    return Split(-(-num_chunks // chunks), chunks)


def arrivals(num: int, device: torch.device) -> Tensor:
    """int32 [num] zeros: how many programs of each output tile are done. Every launch leaves zeros behind, so that one tensor serves all
    launches over a weight that follow each other on one stream."""
    return torch.zeros(num, dtype=torch.int32, device=device)


@triton.jit
def add_up(total, partials_ptr, arrivals_ptr, at, is_inside, split_size, split, SPLITS: tl.constexpr):
    """(sum of all splits' totals in the order of the splits, is it here): only the program that comes last has it.

    at: where in a split's partial sums this tile lies. split_size: elements of a split's partial sums.
    """
    is_last = True
    if SPLITS > 1:
        tl.store(partials_ptr + split * split_size + at, total, mask=is_inside)
        tl.debug_barrier()  # one thread tells the others' stores too
        is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            tl.store(arrivals_ptr, 0)
            total = tl.load(partials_ptr + at, mask=is_inside, other=0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(partials_ptr + other * split_size + at, mask=is_inside, other=0, cache_modifier=".cg")
    return total, is_last
