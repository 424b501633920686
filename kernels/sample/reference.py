"""From logits to drawn ids, in plain PyTorch: mask, penalties, temperature, min-p, top-k, top-p, keyed noise, logprobs.

No Triton here and no request. Called by `reference_ops`, by back ends without a kernel of their own, and by tests.
Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import Sampled, SampleRows
from kernels.sample.noise import gumbel, noise_words

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0: they give the arg-max anyway, and the division would overflow."""
LARGEST_LOGIT = 1e30
"""Larger logits are cut to this, so that penalties (up to 100 x) and temperature (down to 1e-5) stay finite."""


def sample(logits_RV: Tensor, rows: SampleRows) -> Sampled:
    """One id per row of float32 logits: the arg-max of score + Gumbel noise over the tokens that the filters keep.

    Steps, in this order: mask, penalties, temperature, min-p, top-k, top-p. Equal scores are kept or dropped together; of equal
    winners the lowest id is drawn. Temperature 0 is the arg-max of the masked, penalised logits. NaN counts as minus infinity. A
    row that is masked out altogether (or all NaN) gives id 0, the lowest of its equal scores. Source: Maddison et al. 2014,
    section 2 (Gumbel-max); Keskar et al. 2019 (CTRL), section 4.1 (repetition); Nguyen et al. 2024 (min-p); Holtzman et al. 2020
    (top-p).
    """
    scores = penalised(logits_RV, rows)
    is_greedy = rows.temperature < GREEDY_BELOW
    scores = scores / torch.where(is_greedy, 1.0, rows.temperature)[:, None]
    if not bool(is_greedy.all()):
        kept = scores.masked_fill(scores < thresholds(scores, rows)[:, None], float("-inf"))
        noise = gumbel(noise_words(rows.seeds, rows.positions, logits_RV.shape[1]))
        scores = torch.where(is_greedy[:, None], scores, kept + noise)
    return with_logprobs(lowest_argmax(scores), logits_RV, rows)


def penalised(logits_RV: Tensor, rows: SampleRows) -> Tensor:
    """Masked and penalised logits float32 [R, V]; minus infinity where a token is not allowed."""
    vocab_size = logits_RV.shape[1]
    scores = logits_RV.float().clamp(max=LARGEST_LOGIT).nan_to_num(nan=float("-inf"), posinf=LARGEST_LOGIT, neginf=float("-inf"))
    if rows.mask is not None:
        tokens = torch.arange(vocab_size, device=logits_RV.device)
        allowed = (rows.mask[:, tokens // 32] >> (tokens % 32)) & 1
        scores = scores.masked_fill(allowed == 0, float("-inf"))
    if rows.counts is not None and rows.seen is not None:
        repetition, presence, frequency = rows.repetition, rows.presence, rows.frequency
        if repetition is None or presence is None or frequency is None:
            raise ValueError("counts and seen are given, so repetition, presence and frequency must be given too")
        repeated = torch.where(scores > 0, scores / repetition[:, None], scores * repetition[:, None])
        scores = torch.where(rows.seen, repeated, scores)
        scores = scores - frequency[:, None] * rows.counts - presence[:, None] * (rows.counts > 0)
    return scores


def thresholds(scores_RV: Tensor, rows: SampleRows) -> Tensor:
    """The lowest score that each row's min-p, top-k and top-p keep, float32 [R]; minus infinity when all three are off."""
    is_filtered = (rows.min_p > 0) | (rows.top_k > 0) | (rows.top_p < 1)
    if not bool(is_filtered.any()):
        return torch.full_like(scores_RV[:, 0], float("-inf"))  # the sort below is the dear part
    ordered = scores_RV.sort(dim=-1, descending=True).values
    top = ordered[:, :1]
    floor = torch.where(rows.min_p > 0, top[:, 0] + rows.min_p.log(), float("-inf"))
    vocab_size = scores_RV.shape[1]
    last = torch.where(rows.top_k > 0, rows.top_k, vocab_size).clamp(max=vocab_size).long() - 1
    floor = torch.maximum(floor, ordered.gather(1, last[:, None])[:, 0])
    masses = torch.where((ordered >= floor[:, None]) & (ordered > float("-inf")), (ordered - top).exp(), 0.0)
    reached = masses.cumsum(-1, dtype=torch.float64)
    num_short = (reached < rows.top_p[:, None].double() * reached[:, -1:]).sum(-1, keepdim=True)  # the next one completes the mass
    nucleus = ordered.gather(1, num_short)[:, 0]
    return torch.where(rows.top_p < 1, torch.maximum(floor, nucleus), floor)


def lowest_argmax(scores_RV: Tensor) -> Tensor:
    """int64 [R]: of equal maxima the lowest index, which `torch.argmax` does not promise. No score may be NaN."""
    tokens = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    return torch.where(scores_RV == scores_RV.amax(-1, keepdim=True), tokens, scores_RV.shape[1]).amin(-1)


def with_logprobs(ids_R: Tensor, logits_RV: Tensor, rows: SampleRows) -> Sampled:
    """The ids, with the logprobs that the rows ask for: log-softmax of the logits as the model gave them."""
    if not rows.logprobs:
        return Sampled(ids_R)
    logprobs = torch.log_softmax(logits_RV.float(), dim=-1)
    chosen = logprobs.gather(1, ids_R[:, None])[:, 0]
    if rows.num_top == 0:
        return Sampled(ids_R, chosen)
    top = logprobs.topk(min(rows.num_top, logits_RV.shape[1]), dim=-1)
    return Sampled(ids_R, chosen, top.indices, top.values)
