"""From logits to drawn ids in four small Triton kernels: score, threshold, draw, choose. Nothing is sorted and the host never waits.

`score` also keeps, of every TILE tokens, the largest score and the mass, so that what follows reads only tiles that can matter; the head's
kernel (`head_triton`) gives the same. Logprobs, which few requests ask for, are the reference's. No request here. Called by `triton_ops`.
Longer than most files because `threshold` walks scores by what `score` keeps of tiles: how that lies in memory is one thing.
Shape suffixes: R rows, V vocabulary, C = ceil(V / TILE) tiles of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Sampled, SampleRows
from kernels.sample import reference
from kernels.sample.reference import with_logprobs

TILE = 128
"""Tokens whose largest score and mass are kept. Few enough that of a quarter million tokens the best fifty lie in fifty tiles, of 2,048."""
TILES = 32
"""Tiles that a program of `score` and `draw` takes, and a step of `threshold`'s loop."""
FEW_TILES = 64
"""Tiles that `threshold` keeps in registers: the best 64 scores lie in no more."""
MOST_PEAKS = 2048
"""Tiles whose largest scores `threshold` looks at in one step."""
GREEDY_BELOW = tl.constexpr(reference.GREEDY_BELOW)
LARGEST_LOGIT = tl.constexpr(reference.LARGEST_LOGIT)
ROW_VECTORS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr"]
"""Of one number a row, often one row of a larger tensor: whether that begins at 16 bytes depends on the number of rows, and must not be
something that kernels are compiled for."""


class Scores(NamedTuple):
    """scores float32 [R, V]: masked, penalised, divided by temperature (by one in a greedy row). Of each tile, float32 [R, C]: peaks, the
    largest score, and sums, of exp(score - peak)."""

    scores: Tensor
    peaks: Tensor
    sums: Tensor


def sample(logits_RV: Tensor, rows: SampleRows) -> Sampled:
    """One id per row of float32 logits, by the same steps and the same noise as `kernels.sample.reference.sample`."""
    logits_RV = logits_RV.contiguous()
    if logits_RV.shape[0] == 0:
        return with_logprobs(torch.empty(0, dtype=torch.int64, device=logits_RV.device), logits_RV, rows)
    return with_logprobs(drawn(scored(logits_RV, rows), rows), logits_RV, rows)


def drawn(scored: Scores, rows: SampleRows) -> Tensor:
    """ids int64 [R] of at least one row's scores."""
    num_rows, vocab_size = scored.scores.shape
    device, num_tiles = scored.scores.device, scored.peaks.shape[1]
    num_chunks = triton.cdiv(num_tiles, TILES)
    floors = thresholds(scored, rows)
    best = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    best_ids = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    draw_kernel[(num_rows, num_chunks)](
        scored.scores,
        scored.peaks,
        floors,
        rows.temperature,
        rows.seeds,
        rows.positions,
        best,
        best_ids,
        V=vocab_size,
        TILE=TILE,
        TILES=TILES,
        num_warps=8,
    )
    return chosen(best, best_ids)


def chosen(best: Tensor, best_ids: Tensor) -> Tensor:
    """ids int64 [R] out of the best of every stretch of a row, [R, stretches]."""
    num_rows, count = best.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=best.device)
    width = triton.next_power_of_2(count)
    choose_kernel[(num_rows,)](best, best_ids, ids, C=count, CHUNKS=width, num_warps=4 if width > 128 else 1)
    return ids


def penalties_of(rows: SampleRows) -> tuple[Tensor | None, ...]:
    """counts, seen, repetition, presence and frequency as kernels take them: all or none. Raises: ValueError for the first two alone."""
    if rows.counts is None or rows.seen is None:
        return (None,) * 5
    if rows.repetition is None or rows.presence is None or rows.frequency is None:
        raise ValueError("counts and seen are given, so repetition, presence and frequency must be given too")
    return rows.counts, rows.seen.view(torch.uint8), rows.repetition, rows.presence, rows.frequency


def scored(logits_RV: Tensor, rows: SampleRows) -> Scores:
    """logits float32 [R, V] are contiguous."""
    num_rows, vocab_size = logits_RV.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    scores = torch.empty_like(logits_RV)
    peaks = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits_RV.device)
    sums = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits_RV.device)
    score_kernel[(num_rows, triton.cdiv(num_tiles, TILES))](
        logits_RV,
        rows.mask,
        *penalties_of(rows),
        rows.temperature,
        scores,
        peaks,
        sums,
        V=vocab_size,
        TILE=TILE,
        TILES=TILES,
        num_warps=8,
    )
    return Scores(scores, peaks, sums)


def thresholds(scored: Scores, rows: SampleRows) -> Tensor:
    """The lowest score that each row's min-p, top-k and top-p keep, float32 [R]; minus infinity when they are off. The highest score when
    the row is greedy."""
    num_rows, vocab_size = scored.scores.shape
    num_tiles = scored.peaks.shape[1]
    floors = torch.empty(num_rows, dtype=torch.float32, device=scored.scores.device)
    active = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=scored.scores.device)
    threshold_kernel[(num_rows,)](
        *scored,
        active,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        floors,
        V=vocab_size,
        TILE=TILE,
        TILES=TILES,
        FEW=FEW_TILES,
        PEAKS=min(MOST_PEAKS, triton.next_power_of_2(num_tiles)),
        num_warps=16,
    )
    return floors


@triton.jit
def adjusted(
    x, row, token, is_row, is_token, mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, temperature_ptr,
    V: tl.constexpr,
):  # fmt: skip
    """Scores of logits x, a block that row (64 bits) and token broadcast to: mask, penalties, temperature. mask_ptr may be None, and so
    may the five penalty pointers together."""
    readable = is_row & is_token
    x = tl.where(x == x, tl.minimum(x, LARGEST_LOGIT), float("-inf"))  # NaN is the one number that differs from itself
    if mask_ptr is not None:
        word = tl.load(mask_ptr + row * ((V + 31) // 32) + token // 32, mask=readable, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, float("-inf"))
    if counts_ptr is not None:
        repetition = tl.load(repetition_ptr + row, mask=is_row, other=1.0)
        is_seen = tl.load(seen_ptr + row * V + token, mask=readable, other=0) != 0
        x = tl.where(is_seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        count = tl.load(counts_ptr + row * V + token, mask=readable, other=0)
        x = x - tl.load(frequency_ptr + row, mask=is_row, other=0.0) * count.to(tl.float32)
        x = x - tl.where(count > 0, tl.load(presence_ptr + row, mask=is_row, other=0.0), 0.0)
    temperature = tl.load(temperature_ptr + row, mask=is_row, other=1.0)
    return tl.div_rn(x, tl.where(temperature < GREEDY_BELOW, 1.0, temperature))


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def score_kernel(
    logits_ptr, mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, temperature_ptr, scores_ptr, peaks_ptr,
    sums_ptr, V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Some tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_token = token < V
    at = row * V + token
    x = tl.load(logits_ptr + at, mask=is_token, other=float("-inf"))
    rows = row + tl.zeros([1, 1], dtype=tl.int64)
    x = adjusted(
        x, rows, token, rows >= 0, is_token,
        mask_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, temperature_ptr, V,
    )  # fmt: skip
    tl.store(scores_ptr + at, x, mask=is_token)
    peak = tl.max(x, 1)
    mass = tl.sum(tl.exp(x - tl.where(peak > float("-inf"), peak, 0.0)[:, None]), 1)
    at_tile = row * ((V + TILE - 1) // TILE) + tile
    is_tile = tile * TILE < V
    tl.store(peaks_ptr + at_tile, peak, mask=is_tile)
    tl.store(sums_ptr + at_tile, mass, mask=is_tile)


@triton.jit
def _listed(peaks_ptr, active_ptr, floor, C: tl.constexpr, PEAKS: tl.constexpr):
    """Writes down which tiles hold a score at or above floor. (How many they are, the highest score in the others.)"""
    count = 0
    below = tl.full([PEAKS], float("-inf"), dtype=tl.float32)
    for start in range(0, C, PEAKS):
        tile = start + tl.arange(0, PEAKS)
        peak = tl.load(peaks_ptr + tile, mask=tile < C, other=float("-inf"))
        is_active = (peak >= floor) & (tile < C)
        place = count + tl.cumsum(is_active.to(tl.int32), 0) - 1
        tl.store(active_ptr + place, tile, mask=is_active)
        count += tl.sum(is_active.to(tl.int32), 0)
        below = tl.maximum(below, tl.where(is_active, float("-inf"), peak))
    tl.debug_barrier()  # other threads of the program read the list
    return count, tl.max(below, 0)


@triton.jit
def _listed_scores(row_ptr, active_ptr, num_active, start, V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """[TILES, TILE]: of the listed tiles from the start-th on; minus infinity where there are none."""
    index = start + tl.arange(0, TILES)
    tile = tl.load(active_ptr + index, mask=index < num_active, other=(V + TILE - 1) // TILE)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    return tl.load(row_ptr + token, mask=token < V, other=float("-inf"))


@triton.jit
def _mass_from(
    row_ptr, active_ptr, num_active, floor, top, V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WEIGHTED: tl.constexpr
):
    """(how much of the listed tiles lies at or above floor, the lowest score there, the highest score below): counted, or weighed by
    exp(score - top)."""
    mass = tl.zeros([TILES, TILE], dtype=tl.float32)
    above = tl.full([TILES, TILE], float("inf"), dtype=tl.float32)
    below = tl.full([TILES, TILE], float("-inf"), dtype=tl.float32)
    for start in range(0, num_active, TILES):
        x = _listed_scores(row_ptr, active_ptr, num_active, start, V, TILE, TILES)
        is_in = (x >= floor) & (x > float("-inf"))
        if WEIGHTED:
            mass += tl.where(is_in, tl.exp(x - top), 0.0)
        else:
            mass += is_in.to(tl.float32)
        above = tl.minimum(above, tl.where(is_in, x, float("inf")))
        below = tl.maximum(below, tl.where(is_in, float("-inf"), x))
    return tl.sum(tl.sum(mass, 1), 0), tl.min(tl.min(above, 1), 0), tl.max(tl.max(below, 1), 0)


@triton.jit
def _middle_of(low, high):
    middle = low + (high - low) * 0.5
    return tl.where(middle > low, middle, high)  # neighbouring floats have nothing between them


@triton.jit
def _highest_among_few(
    row_ptr, active_ptr, num_active, low, high, target, top,
    V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What `_highest_floor` gives, where at most TILES tiles are listed and no other has a score at or above low: they are read once."""
    x = _listed_scores(row_ptr, active_ptr, num_active, 0, V, TILE, TILES)
    weight = tl.where(x > float("-inf"), tl.exp(x - top) if WEIGHTED else 1.0, 0.0)
    while low < high:
        middle = _middle_of(low, high)
        is_in = x >= middle
        is_enough = tl.sum(tl.sum(tl.where(is_in, weight, 0.0), 1), 0) >= target
        above = tl.min(tl.min(tl.where(is_in, x, float("inf")), 1), 0)
        below = tl.max(tl.max(tl.where(is_in, float("-inf"), x), 1), 0)
        high = tl.where(is_enough, high, tl.maximum(below, low))
        low = tl.where(is_enough, above, low)
    return low


@triton.jit
def _highest_floor(
    row_ptr, peaks_ptr, active_ptr, low, high, target, top,
    V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, FEW: tl.constexpr, PEAKS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The highest t in [low, high] such that the row from t up weighs at least target. From low up it must weigh so much; high is a score.

    Bisection between the ends, each of which then moves to a score that is really there: it ends on an exact answer, as a sort would,
    after about as many passes as the logarithm of the number of scores between them. A pass reads only tiles whose peak it cannot pass
    over, so most passes read little; once FEW tiles are left, they stay in registers.
    """
    while low < high:
        num_active, _ = _listed(peaks_ptr, active_ptr, low, (V + TILE - 1) // TILE, PEAKS)
        if num_active <= FEW:
            low = _highest_among_few(row_ptr, active_ptr, num_active, low, high, target, top, V, TILE, FEW, WEIGHTED)
            high = low
        else:
            middle = _middle_of(low, high)
            num_active, skipped = _listed(peaks_ptr, active_ptr, middle, (V + TILE - 1) // TILE, PEAKS)
            mass, above, below = _mass_from(row_ptr, active_ptr, num_active, middle, top, V, TILE, TILES, WEIGHTED)
            is_enough = mass >= target
            high = tl.where(is_enough, high, tl.maximum(tl.maximum(below, skipped), low))
            low = tl.where(is_enough, above, low)
    return low


@triton.jit
def _extent(peaks_ptr, sums_ptr, top, C: tl.constexpr, PEAKS: tl.constexpr):
    """Of the tiles with a score that is allowed: (how many, the lowest peak, the mass of the peaks alone, the mass of all scores)."""
    count = tl.zeros([PEAKS], dtype=tl.int32)
    least = tl.full([PEAKS], float("inf"), dtype=tl.float32)
    of_peaks = tl.zeros([PEAKS], dtype=tl.float32)
    of_all = tl.zeros([PEAKS], dtype=tl.float32)
    for start in range(0, C, PEAKS):
        tile = start + tl.arange(0, PEAKS)
        peak = tl.load(peaks_ptr + tile, mask=tile < C, other=float("-inf"))
        is_allowed = peak > float("-inf")
        weight = tl.where(is_allowed, tl.exp(peak - top), 0.0)
        count += is_allowed.to(tl.int32)
        least = tl.minimum(least, tl.where(is_allowed, peak, float("inf")))
        of_peaks += weight
        of_all += weight * tl.load(sums_ptr + tile, mask=tile < C, other=0.0)
    return tl.sum(count, 0), tl.min(least, 0), tl.sum(of_peaks, 0), tl.sum(of_all, 0)


@triton.jit
def _top_of(peaks_ptr, C: tl.constexpr, PEAKS: tl.constexpr):
    top = tl.full([PEAKS], float("-inf"), dtype=tl.float32)
    for start in range(0, C, PEAKS):
        tile = start + tl.arange(0, PEAKS)
        top = tl.maximum(top, tl.load(peaks_ptr + tile, mask=tile < C, other=float("-inf")))
    return tl.max(top, 0)


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def threshold_kernel(
    scores_ptr, peaks_ptr, sums_ptr, active_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floors_ptr,
    V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, FEW: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """One row: the lowest score that min-p, top-k and top-p keep, in this order; minus infinity when they are off. Greedy: the highest.

    active_ptr: room for a number a tile.
    """
    C: tl.constexpr = (V + TILE - 1) // TILE
    row = tl.program_id(0).to(tl.int64)
    row_ptr, peaks, active = scores_ptr + row * V, peaks_ptr + row * C, active_ptr + row * C
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    is_greedy = tl.load(temperature_ptr + row) < GREEDY_BELOW
    floor = tl.full([], float("-inf"), dtype=tl.float32)
    if is_greedy | (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        top = _top_of(peaks, C, PEAKS)
        if is_greedy:
            floor = top
        elif top > float("-inf"):
            num_peaks, least, of_peaks, mass = _extent(peaks, sums_ptr + row * C, top, C, PEAKS)
            if min_p > 0.0:
                floor = top + tl.log(min_p)
            if top_k > 0:
                low, count = least, num_peaks.to(tl.float32)
                if top_k > num_peaks:  # the peaks alone are too few to be sure that so many scores lie at or above the lowest of them
                    num_active, _ = _listed(peaks, active, least, C, PEAKS)
                    count, low, _ = _mass_from(row_ptr, active, num_active, float("-inf"), top, V, TILE, TILES, False)
                if top_k <= count:
                    wanted = top_k.to(tl.float32)
                    kept = _highest_floor(row_ptr, peaks, active, low, top, wanted, top, V, TILE, TILES, FEW, PEAKS, False)
                    floor = tl.maximum(floor, kept)
            if top_p < 1.0:
                # Scores below top - c weigh less than V * exp(-c) together, which for this c is what may be missing (and a little less).
                low = top - (tl.log(V / ((1.0 - top_p) * mass)) + 0.01)
                low = tl.where(of_peaks >= top_p * mass, tl.maximum(low, least), low)
                if floor > float("-inf"):
                    num_active, _ = _listed(peaks, active, floor, C, PEAKS)
                    mass, low, _ = _mass_from(row_ptr, active, num_active, floor, top, V, TILE, TILES, True)
                nucleus = _highest_floor(row_ptr, peaks, active, low, top, top_p * mass, top, V, TILE, TILES, FEW, PEAKS, True)
                floor = tl.maximum(floor, nucleus)
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


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def draw_kernel(
    scores_ptr, peaks_ptr, floors_ptr, temperature_ptr, seeds_ptr, positions_ptr, best_ptr, best_ids_ptr,
    V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The winner of some tiles of one row: score + noise over what the floor keeps; without noise when the row is greedy. Tiles that the
    floor leaves nothing of are not read."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tile = chunk * TILES + tl.arange(0, TILES)
    floor = tl.load(floors_ptr + row)
    peak = tl.load(peaks_ptr + row * ((V + TILE - 1) // TILE) + tile, mask=tile * TILE < V, other=float("-inf"))
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_token = token < V
    x = tl.load(scores_ptr + row * V + token, mask=is_token & (peak >= floor)[:, None], other=float("-inf"))
    if tl.load(temperature_ptr + row) >= GREEDY_BELOW:
        one = tl.zeros([1, 1], dtype=tl.int32)
        word = noise_word(tl.load(seeds_ptr + row + one), tl.load(positions_ptr + row + one), token)
        x = tl.where(x >= floor, x + gumbel(word), float("-inf"))
    highest = tl.max(tl.max(x, 1), 0)
    lowest_id = tl.min(tl.min(tl.where((x == highest) & is_token, token, V), 1), 0)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, highest)
    tl.store(best_ids_ptr + row * tl.num_programs(1) + chunk, lowest_id)


@triton.jit
def choose_kernel(best_ptr, best_ids_ptr, ids_ptr, C: tl.constexpr, CHUNKS: tl.constexpr):
    """The winner of one row, out of C stretches' winners: of equal ones the first, so that of equal scores the lowest id wins."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + row * C + chunk, mask=chunk < C, other=float("-inf"))
    winner = tl.min(tl.where((best == tl.max(best, 0)) & (chunk < C), chunk, C), 0)
    tl.store(ids_ptr + row, tl.load(best_ids_ptr + row * C + winner).to(tl.int64))
