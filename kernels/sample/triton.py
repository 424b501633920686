"""From logits to drawn ids in four small Triton kernels: score, threshold, draw, choose. Nothing is sorted and the host never waits.

Logprobs, which few requests ask for, are the reference's. No request here. Called by `triton_ops`.
Shape suffixes: R rows, V vocabulary, C = ceil(V / BLOCK) chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Sampled, SampleRows
from kernels.sample import reference
from kernels.sample.reference import with_logprobs

BLOCK = 4096
"""Tokens a program of `score` and `draw` takes, and a step of `threshold`'s loop."""
GREEDY_BELOW = tl.constexpr(reference.GREEDY_BELOW)
LARGEST_LOGIT = tl.constexpr(reference.LARGEST_LOGIT)


def sample(logits_RV: Tensor, rows: SampleRows) -> Sampled:
    """One id per row of float32 logits, by the same steps and the same noise as `kernels.sample.reference.sample`."""
    logits_RV = logits_RV.contiguous()
    num_rows, vocab_size = logits_RV.shape
    if num_rows == 0:
        return with_logprobs(torch.empty(0, dtype=torch.int64, device=logits_RV.device), logits_RV, rows)
    num_chunks = triton.cdiv(vocab_size, BLOCK)
    scores = scored(logits_RV, rows)
    floors = thresholds(scores, rows)
    best = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits_RV.device)
    best_ids = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits_RV.device)
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    draw_kernel[(num_rows, num_chunks)](
        scores, floors, rows.temperature, rows.seeds, rows.positions, best, best_ids, V=vocab_size, BLOCK=BLOCK, num_warps=8
    )
    choose_kernel[(num_rows,)](best, best_ids, ids, C=num_chunks, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1)
    return with_logprobs(ids, logits_RV, rows)


def scored(logits_RV: Tensor, rows: SampleRows) -> Tensor:
    """Masked, penalised and divided by temperature, float32 [R, V]; a greedy row is divided by one. logits are contiguous."""
    has_penalties = rows.counts is not None and rows.seen is not None
    if has_penalties and (rows.repetition is None or rows.presence is None or rows.frequency is None):
        raise ValueError("counts and seen are given, so repetition, presence and frequency must be given too")
    num_rows, vocab_size = logits_RV.shape
    scores = torch.empty_like(logits_RV)
    score_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
        logits_RV,
        rows.mask,
        rows.counts if has_penalties else None,
        rows.seen.view(torch.uint8) if has_penalties and rows.seen is not None else None,
        rows.repetition if has_penalties else None,
        rows.presence if has_penalties else None,
        rows.frequency if has_penalties else None,
        rows.temperature,
        scores,
        V=vocab_size,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return scores


def thresholds(scores_RV: Tensor, rows: SampleRows) -> Tensor:
    """The lowest score that each row's min-p, top-k and top-p keep, float32 [R]; minus infinity when they are off or it is greedy."""
    num_rows, vocab_size = scores_RV.shape
    floors = torch.empty(num_rows, dtype=torch.float32, device=scores_RV.device)
    threshold_kernel[(num_rows,)](
        scores_RV, rows.temperature, rows.top_k, rows.top_p, rows.min_p, floors, V=vocab_size, BLOCK=BLOCK, num_warps=32
    )
    return floors


@triton.jit
def score_kernel(
    logits_ptr, mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, temperature_ptr, scores_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: mask, penalties, temperature. mask_ptr may be None, and so may the five penalty pointers together."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < V
    x = tl.load(logits_ptr + row * V + token, mask=is_token, other=float("-inf"))
    x = tl.where(x == x, tl.minimum(x, LARGEST_LOGIT), float("-inf"))  # NaN is the one number that differs from itself
    if mask_ptr is not None:
        word = tl.load(mask_ptr + row * ((V + 31) // 32) + token // 32, mask=is_token, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, float("-inf"))
    if counts_ptr is not None:
        repetition = tl.load(repetition_ptr + row)
        is_seen = tl.load(seen_ptr + row * V + token, mask=is_token, other=0) != 0
        x = tl.where(is_seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        count = tl.load(counts_ptr + row * V + token, mask=is_token, other=0)
        x = x - tl.load(frequency_ptr + row) * count.to(tl.float32)
        x = x - tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    temperature = tl.load(temperature_ptr + row)
    x = tl.div_rn(x, tl.where(temperature < GREEDY_BELOW, 1.0, temperature))
    tl.store(scores_ptr + row * V + token, x, mask=is_token)


@triton.jit
def _mass_from(row_ptr, floor, top, V: tl.constexpr, BLOCK: tl.constexpr, IS_WEIGHTED: tl.constexpr):
    """(how much of the row lies at or above floor, the lowest score there, the highest score below): counted, or weighed by
    exp(score - top)."""
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    above = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    below = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < V, other=float("-inf"))
        is_in = (x >= floor) & (token < V)
        if IS_WEIGHTED:
            mass += tl.where(is_in, tl.exp(x - top), 0.0)
        else:
            mass += is_in.to(tl.float32)
        above = tl.minimum(above, tl.where(is_in, x, float("inf")))
        below = tl.maximum(below, tl.where(is_in, float("-inf"), x))
    return tl.sum(mass, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _highest_floor(row_ptr, low, high, target, top, V: tl.constexpr, BLOCK: tl.constexpr, IS_WEIGHTED: tl.constexpr):
    """The highest score t in [low, high] such that the row from t up weighs at least target. low must already weigh that much.

    Bisection between the ends, each of which then moves to a score that is really there: it ends on an exact answer, as a sort would,
    after about as many passes as the logarithm of the number of scores between them.
    """
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)  # neighbouring floats have nothing between them
        mass, above, below = _mass_from(row_ptr, middle, top, V, BLOCK, IS_WEIGHTED)
        is_enough = mass >= target
        low = tl.where(is_enough, above, low)
        high = tl.where(is_enough, high, tl.maximum(below, low))
    return low


@triton.jit
def _extent(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """(how many scores are above minus infinity, the lowest of them, the highest)."""
    count = tl.zeros([BLOCK], dtype=tl.float32)
    lowest = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < V, other=float("-inf"))
        is_allowed = x > float("-inf")
        count += is_allowed.to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(is_allowed, x, float("inf")))
        highest = tl.maximum(highest, x)
    return tl.sum(count, 0), tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def threshold_kernel(scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floors_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """One row: the lowest score that min-p, top-k and top-p keep, in this order; minus infinity when they are off or it is greedy."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * V
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    floor = tl.full([], float("-inf"), dtype=tl.float32)
    is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if is_filtered & (tl.load(temperature_ptr + row) >= GREEDY_BELOW):
        count, lowest, top = _extent(row_ptr, V, BLOCK)
        if count > 0:
            if min_p > 0.0:
                floor = top + tl.log(min_p)
            if (top_k > 0) & (top_k < count):
                floor = tl.maximum(floor, _highest_floor(row_ptr, lowest, top, top_k.to(tl.float32), top, V, BLOCK, False))
            if top_p < 1.0:
                mass, start, _ = _mass_from(row_ptr, tl.maximum(floor, lowest), top, V, BLOCK, True)
                floor = _highest_floor(row_ptr, start, top, top_p * mass, top, V, BLOCK, True)
    tl.store(floors_ptr + row, floor)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noise_word(seed, position, token):
    """The 32-bit hash of (seed, position, token) that `kernels.sample.noise` defines, as uint32. All three are blocks of integers."""
    key = _mix64(_mix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) + position.to(tl.uint64))
    return _mix32(_mix32(token.to(tl.uint32) ^ key.to(tl.uint32)) + (key >> 32).to(tl.uint32))


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of a uint32 hash; see `kernels.sample.noise.gumbel`."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (1.0 / 2.0 + u * (1.0 / 3.0 + u * (1.0 / 4.0 + u * (1.0 / 5.0)))))
    return -tl.log(tl.where(u < 0.03125, series, -tl.log(rest)))


@triton.jit
def draw_kernel(
    scores_ptr, floors_ptr, temperature_ptr, seeds_ptr, positions_ptr, best_ptr, best_ids_ptr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The winner of one chunk of one row: score + noise over what the floor keeps; without noise when the row is greedy."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    is_token = token < V
    x = tl.load(scores_ptr + row * V + token, mask=is_token, other=float("-inf"))
    if tl.load(temperature_ptr + row) >= GREEDY_BELOW:
        one = tl.zeros([1], dtype=tl.int32)
        word = noise_word(tl.load(seeds_ptr + row + one), tl.load(positions_ptr + row + one), token)
        x = tl.where(x >= tl.load(floors_ptr + row), x + gumbel(word), float("-inf"))
    highest = tl.max(x, 0)
    lowest_id = tl.min(tl.where((x == highest) & is_token, token, V), 0)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, highest)
    tl.store(best_ids_ptr + row * tl.num_programs(1) + chunk, lowest_id)


@triton.jit
def choose_kernel(best_ptr, best_ids_ptr, ids_ptr, C: tl.constexpr, CHUNKS: tl.constexpr):
    """The winner of one row: of equal chunks the first, so that of equal scores the lowest id wins."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + row * C + chunk, mask=chunk < C, other=float("-inf"))
    winner = tl.min(tl.where((best == tl.max(best, 0)) & (chunk < C), chunk, C), 0)
    tl.store(ids_ptr + row, tl.load(best_ids_ptr + row * C + winner).to(tl.int64))
