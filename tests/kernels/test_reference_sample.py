"""The sampling reference against policies written out token by token, the noise against a plain-integer hash and its distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import SampleRows
from kernels.sample.cases import CASES, SampleCase, build, pack_mask
from kernels.sample.noise import gumbel, noise_words
from kernels.sample.reference import penalised, sample, thresholds

M32, M64 = 2**32 - 1, 2**64 - 1


def word_of(seed: int, position: int, token: int) -> int:
    """The hash in Python's own unbounded integers."""

    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
        return x ^ (x >> 16)

    key = mix64((mix64((seed + 0x9E3779B97F4A7C15) & M64) + position) & M64)
    return mix32((mix32(token ^ (key & M32)) + (key >> 32)) & M32)


def test_noise_is_the_hash_of_plain_integers() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 7, 2**31, 12345, 2**40]
    words = noise_words(torch.tensor(seeds), torch.tensor(positions), 50)
    expected = [[word_of(seed, position, token) for token in range(50)] for seed, position in zip(seeds, positions, strict=True)]
    assert words.tolist() == expected


def test_noise_is_gumbel_in_both_tails() -> None:
    words = torch.tensor([0, 1, 1000, 2**20, 2**27 - 1, 2**27, 2**27 + 1, 2**31, 2**32 - 1000, 2**32 - 2, 2**32 - 1])
    expected = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words.tolist()]
    torch.testing.assert_close(gumbel(words), torch.tensor(expected), rtol=3e-6, atol=1e-6)


def test_noise_words_are_uniform_and_uncorrelated() -> None:
    """Neighbouring seeds, positions and tokens: 64 buckets by chi-square (63 degrees: mean 63, deviation 11), and bits that differ."""
    seeds, positions = torch.arange(64).repeat_interleave(16), torch.arange(16).repeat(64)
    words = noise_words(seeds, positions, 256)
    for bits in (26, 0):
        counts = torch.bincount(((words >> bits) & 63).flatten(), minlength=64).double()
        expected = words.numel() / 64
        assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 6 * 11
    for other in (noise_words(seeds + 1, positions, 256), noise_words(seeds, positions + 1, 256), words.roll(1, 1)):
        flipped = words ^ other
        share = sum(float(((flipped >> bit) & 1).double().mean()) for bit in range(32)) / 32
        assert abs(share - 0.5) < 0.003


def test_draws_follow_the_softmax() -> None:
    """40,000 positions of one row: each share within five standard deviations of its probability."""
    num, logits = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    rows = row_of(num)
    ids = sample(logits.expand(num, 5).contiguous(), rows).ids
    probabilities = logits.double().softmax(0)
    shares = torch.bincount(ids, minlength=5).double() / num
    deviations = (probabilities * (1 - probabilities) / num).sqrt()
    assert bool(((shares - probabilities).abs() < 5 * deviations).all()), shares


def row_of(num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> SampleRows:
    def filled(value: float) -> Tensor:
        return torch.full((num_rows,), value)

    return SampleRows(
        filled(temperature),
        torch.full((num_rows,), top_k, dtype=torch.int32),
        filled(top_p),
        filled(min_p),
        seeds=torch.zeros(num_rows, dtype=torch.int64),
        positions=torch.arange(num_rows),
    )


def kept_by_hand(scores: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """min-p, top-k and top-p one after the other over a sorted list; equal scores stay together."""
    top = max(scores)
    kept = [i for i, score in enumerate(scores) if score > -math.inf]
    if min_p > 0:
        kept = [i for i in kept if math.exp(scores[i] - top) >= min_p * (1 - 1e-6)]
    if 0 < top_k < len(kept):
        edge = sorted((scores[i] for i in kept), reverse=True)[top_k - 1]
        kept = [i for i in kept if scores[i] >= edge]
    if top_p < 1:
        total, mass, edge = sum(math.exp(scores[i] - top) for i in kept), 0.0, -math.inf
        for score in sorted((scores[i] for i in kept), reverse=True):
            mass, edge = mass + math.exp(score - top), score
            if mass >= top_p * total:
                break
        kept = [i for i in kept if scores[i] >= edge]
    return set(kept)


@pytest.mark.parametrize("case", [case for case in CASES if case.size == "tiny"], ids=lambda case: case.name)
def test_filters_keep_what_a_sorted_list_keeps(case: SampleCase) -> None:
    logits, rows = build(case)
    scores = penalised(logits, rows) / (case.temperature or 1.0)
    floors = thresholds(scores, rows)
    ids = sample(logits, rows).ids
    for row in range(case.num_rows):
        values = scores[row].tolist()
        if max(values) == -math.inf:
            assert int(ids[row]) == 0
            continue
        expected = kept_by_hand(values, case.top_k, case.top_p, case.min_p)
        kept = {i for i, value in enumerate(values) if value > -math.inf and value >= float(floors[row])}
        assert kept == expected
        assert int(ids[row]) in expected


def test_penalties_by_hand() -> None:
    rows = replace(
        row_of(1, temperature=0.0),
        counts=torch.tensor([[0, 2, 1, 0]], dtype=torch.int32),
        seen=torch.tensor([[True, True, True, False]]),
        repetition=torch.tensor([2.0]),
        presence=torch.tensor([0.5]),
        frequency=torch.tensor([0.25]),
    )
    got = penalised(torch.tensor([[4.0, 6.0, -1.0, 1.5]]), rows)
    assert got.tolist() == [[2.0, 6.0 / 2 - 0.5 - 2 * 0.25, -2.0 - 0.5 - 0.25, 1.5]]


def test_temperature_zero_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0], [7.0, 7.0, 0.0, 7.0], [0.0, 0.0, 0.0, 9.0]])
    assert sample(logits, row_of(3, temperature=0.0)).ids.tolist() == [1, 0, 3]


def test_mask_forbids_and_bits_are_where_the_contract_says() -> None:
    logits = torch.zeros(40, 70)
    logits[:, 65] = 50.0
    allowed = torch.zeros(40, 70, dtype=torch.bool)
    allowed[:, [0, 31, 32, 63, 69]] = True
    mask = pack_mask(allowed)
    assert mask.shape == (40, 3)
    assert mask[0].tolist() == [1 - 2**31, 1 - 2**31, 1 << 5]
    ids = set(sample(logits, replace(row_of(40), mask=mask)).ids.tolist())
    assert ids <= {0, 31, 32, 63, 69}
    assert len(ids) > 1


def test_bad_numbers_end_in_a_valid_id() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan, nan, nan], [nan, 1.0, -inf], [-inf, -inf, -inf], [inf, 0.0, inf]])
    for rows in (row_of(4, temperature=0.0), row_of(4, top_p=0.5, top_k=2, min_p=0.1), row_of(4)):
        ids = sample(logits, rows).ids.tolist()
        assert ids[:3] == [0, 1, 0]
        assert ids[3] in (0, 2)


def test_a_row_is_the_same_alone_and_in_a_crowd() -> None:
    case = next(case for case in CASES if case.name == "all_filters")
    logits, rows = build(case)
    together = sample(logits, rows).ids
    for row in range(case.num_rows):
        only = slice(row, row + 1)
        alone = SampleRows(
            rows.temperature[only], rows.top_k[only], rows.top_p[only], rows.min_p[only], rows.seeds[only], rows.positions[only]
        )
        assert torch.equal(sample(logits[only], alone).ids, together[only])


def test_logprobs_are_of_the_logits_as_given() -> None:
    case = next(case for case in CASES if case.name == "penalties")
    logits, rows = build(case)
    drawn = sample(logits, replace(rows, logprobs=True, num_top=4))
    raw = logits.double().log_softmax(-1)
    assert drawn.logprobs is not None
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    torch.testing.assert_close(drawn.logprobs.double(), raw.gather(1, drawn.ids[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    order = raw.argsort(-1, descending=True)[:, :4]
    assert torch.equal(drawn.top_ids, order)
    torch.testing.assert_close(drawn.top_logprobs.double(), raw.gather(1, order), rtol=1e-5, atol=1e-5)
    assert sample(logits, rows).logprobs is None
    assert sample(logits, replace(rows, logprobs=True)).top_ids is None


def test_penalties_need_their_numbers() -> None:
    rows = replace(row_of(1), counts=torch.zeros(1, 4, dtype=torch.int32), seen=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="repetition"):
        sample(torch.zeros(1, 4), rows)
