"""Named sampling inputs as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels` and `bench/kernels`.
Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.linear.reference import quantize_int8
from kernels.ops import SampleRows, Weight


@dataclass(frozen=True, slots=True)
class SampleCase:
    """Every row of a case has the same parameters. masked: share of tokens not allowed; 1 forbids them all.

    flat: how many of the logits are made equal to the largest.
    """

    name: str
    why: str
    num_rows: int = 4
    vocab_size: int = 300
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    masked: float | None = None
    has_penalties: bool = False
    flat: int = 0
    spread: float = 3.0
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    SampleCase("plain", "noise alone decides"),
    SampleCase("greedy", "no noise at all", temperature=0.0),
    SampleCase("greedy_tie", "of equal maxima the lowest id", temperature=0.0, flat=7),
    SampleCase("cold", "a small temperature makes scores large", temperature=0.05),
    SampleCase("top_k", "a few tokens stay", top_k=5),
    SampleCase("top_k_one", "sampling that must be the arg-max", top_k=1),
    SampleCase("top_k_tie", "equal scores at the edge stay together", top_k=3, flat=6),
    SampleCase("top_k_large", "more than the vocabulary: off", top_k=1000),
    SampleCase("top_p", "the nucleus", top_p=0.8),
    SampleCase("top_p_zero", "no mass at all still leaves the likeliest", top_p=0.0),
    SampleCase("min_p", "a floor relative to the likeliest", min_p=0.2),
    SampleCase("all_filters", "each filter works on what the one before has left", temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    SampleCase("masked", "a grammar allows a tenth", masked=0.9, top_p=0.9),
    SampleCase("masked_out", "a grammar that allows nothing must not crash", masked=1.0, top_k=5, top_p=0.5),
    SampleCase("penalties", "repetition, presence and frequency on counted tokens", has_penalties=True, top_k=20),
    SampleCase("penalties_greedy", "penalties change the arg-max too", has_penalties=True, temperature=0.0),
    SampleCase("flat", "equal logits everywhere: the hash alone decides", flat=300, top_p=0.5),
    SampleCase("chunks", "several chunks a row, the last one ragged", 2, 9001, top_k=50, top_p=0.95, size="small"),
    SampleCase("large_vocab", "a vocabulary of a quarter million", 3, 262_144, top_p=0.9, size="small"),
    SampleCase("bench_greedy", "a full batch, greedy", 64, 49_152, temperature=0.0, size="bench"),
    SampleCase("bench_filters", "a full batch with both common filters", 64, 49_152, temperature=0.7, top_k=50, top_p=0.9, size="bench"),
)


def build(case: SampleCase, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, SampleRows]:
    """(logits float32 [R, V], rows) of a case; seeds cover both signs."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, vocab_size = case.num_rows, case.vocab_size
    logits = torch.randn((num_rows, vocab_size), generator=generator) * case.spread
    if case.flat:
        equal = torch.randperm(vocab_size, generator=generator)[: case.flat]
        logits[:, equal] = logits.amax(-1, keepdim=True)

    def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    rows = SampleRows(
        temperature=filled(case.temperature),
        top_k=filled(case.top_k, torch.int32),
        top_p=filled(case.top_p),
        min_p=filled(case.min_p),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator).to(device),
        positions=torch.randint(2**31, (num_rows,), generator=generator).to(device),
    )
    if case.masked is not None:
        allowed = torch.rand((num_rows, vocab_size), generator=generator) >= case.masked
        rows.mask = pack_mask(allowed).to(device)
    if case.has_penalties:
        counts = torch.randint(-6, 4, (num_rows, vocab_size), generator=generator).clamp(min=0).int()
        in_prompt = torch.rand((num_rows, vocab_size), generator=generator) < 0.2
        rows.counts, rows.seen = counts.to(device), ((counts > 0) | in_prompt).to(device)
        rows.repetition, rows.presence, rows.frequency = filled(1.3), filled(0.4), filled(0.25)
    return logits.to(device), rows


HEAD_CASES = (
    (SampleCase("head_plain", "noise alone decides; logits are never written"), 64),
    (SampleCase("head_greedy", "of the largest product, without noise", temperature=0.0), 80),
    (SampleCase("head_one", "a row alone, in a tile of sixteen", 1, temperature=0.7), 200),
    (SampleCase("head_more_rows", "more than sixteen, the last tile of the vocabulary ragged", 17, 129), 64),
    (SampleCase("head_masked", "a grammar allows a tenth", masked=0.9), 64),
    (SampleCase("head_masked_out", "a grammar that allows nothing gives id 0", masked=1.0), 64),
    (SampleCase("head_penalties", "on counted tokens", has_penalties=True), 64),
    (SampleCase("head_filters", "scores are written, filtered, drawn", temperature=0.8, top_k=20, top_p=0.9), 64),
    (SampleCase("head_all", "everything at once", top_p=0.9, min_p=0.01, masked=0.5, has_penalties=True), 64),
    (SampleCase("head_two_blocks", "the second with one row", 65, 40), 64),
    (SampleCase("head_composed", "penalties on more rows than the kernel has registers for", 17, 40, has_penalties=True, size="small"), 64),
    (SampleCase("head_wide", "many tiles and a wide model", 3, 3000, temperature=0.7, top_k=50, top_p=0.9, size="small"), 576),
    (SampleCase("head_large", "a small model's head", 3, 49_152, temperature=0.7, size="bench"), 576),
    (SampleCase("head_large_filters", "a large model's head", 64, 128_256, temperature=0.7, top_k=50, top_p=0.9, size="bench"), 4096),
)
"""Each with the width of the hidden states that the head multiplies."""


def build_head(
    case: SampleCase, width: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Weight, SampleRows]:
    """(hidden states [R, width], head [V, width], rows) whose product has logits as spread as the case says. dtype: of the head; beside one
    in int8 the hidden states are bfloat16."""
    _, rows = build(case, device, seed)
    rows.is_filtered = case.temperature > 0 and (case.top_k > 0 or case.top_p < 1 or case.min_p > 0)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn((case.num_rows, width), generator=generator)
    head = torch.randn((case.vocab_size, width), generator=generator) * (case.spread / width**0.5)
    if dtype == torch.int8:
        return x.to(device, torch.bfloat16), quantize_int8(head.to(device)), rows
    return x.to(device, dtype), head.to(device, dtype), rows


def pack_mask(allowed_RV: Tensor) -> Tensor:
    """bool [R, V] as the bit mask of `SampleRows`: int32 [R, ceil(V / 32)]."""
    num_rows, vocab_size = allowed_RV.shape
    bits = torch.zeros((num_rows, -(-vocab_size // 32) * 32), dtype=torch.int64)
    bits[:, :vocab_size] = allowed_RV
    words = (bits.view(num_rows, -1, 32) << torch.arange(32)).sum(-1)
    return (words - (words >= 2**31) * 2**32).int()
