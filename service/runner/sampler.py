"""From logits to drawn ids: gathers each sample's parameters into rows, calls `Ops.sample`, brings the ids back as plain values.

Knows no K/V and no layer. State: per gang with penalties, what it has seen; dropped when the plan releases its sequence.
Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops, Sampled, SampleRows, Weight
from kernels.sample.reference import GREEDY_BELOW
from service.scheduling.plan import Drawn, Sample, StepPlan
from service.scheduling.sampling import SamplingParams


@dataclass(slots=True)
class _Seen:
    """counts int32 [V] of generated ids, seen bool [V] of prompt and output, and how many ids of the history are in them."""

    counts: Tensor
    seen: Tensor
    length: int


class Sampler:
    def __init__(self, ops: Ops, vocab_size: int, device: torch.device) -> None:
        self.ops = ops
        self.vocab_size = vocab_size
        self.device = device
        self._seen: dict[int, _Seen] = {}

    def release(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            self._seen.pop(sequence_id, None)

    def sample(self, logits: Tensor, plan: StepPlan, masks: Tensor | None = None) -> list[Drawn]:
        """logits float32: a row for each slice that a sample names, in that order. masks int32 [R, ceil(V / 32)]: bit set = allowed.

        Returns one `Drawn` per sample of the plan. Mutates: logits, and the penalty state of the plan's gangs.
        """
        samples = plan.samples
        if not samples:
            return []
        logits = self._guided(logits, samples, masks)
        self._add_bias(logits, samples)
        return self._told(self.ops.sample(logits, self._rows(samples, masks)), samples)

    def draw(self, hidden: Tensor, head: Weight, plan: StepPlan, masks: Tensor | None = None) -> list[Drawn]:
        """The same out of final hidden states [R, D], for a plan that `can_draw`. Mutates: the penalty state of the plan's gangs."""
        return self._told(self.ops.draw(hidden, head, self._rows(plan.samples, masks)), plan.samples)

    def _told(self, drawn: Sampled, samples: Sequence[Sample]) -> list[Drawn]:
        ids = drawn.ids.tolist()
        if drawn.logprobs is None:
            return [Drawn(token) for token in ids]
        logprobs = drawn.logprobs.tolist()
        tops = (
            [[] for _ in ids]
            if drawn.top_ids is None or drawn.top_logprobs is None
            else list(map(list, map(zip, drawn.top_ids.tolist(), drawn.top_logprobs.tolist())))
        )
        return [
            Drawn(token, logprob, tuple(top[: sample.params.logprobs])) if sample.params.logprobs is not None else Drawn(token)
            for token, logprob, top, sample in zip(ids, logprobs, tops, samples, strict=True)
        ]

    def _guided(self, logits: Tensor, samples: Sequence[Sample], masks: Tensor | None) -> Tensor:
        """Classifier-free guidance: one row out of each gang's two. What the conditional row itself finds unlikely (min-p) is no candidate,
        however much guidance would like it. Source: Ho and Salimans 2022, equation 6."""
        if all(len(sample.slice_indexes) == 1 for sample in samples):
            return logits
        rows, at = [], 0
        for index, sample in enumerate(samples):
            row = logits[at]
            if len(sample.slice_indexes) == 2:
                candidates = _candidates(row, sample.params, None if masks is None else masks[index])
                guided = logits[at + 1] + sample.guidance * (row - logits[at + 1])
                row = guided if candidates is None else guided.masked_fill(~candidates, float("-inf"))
            rows.append(row)
            at += len(sample.slice_indexes)
        return torch.stack(rows)

    def _add_bias(self, logits: Tensor, samples: Sequence[Sample]) -> None:
        for row, sample in enumerate(samples):
            if sample.params.logit_bias:
                ids, values = zip(*sample.params.logit_bias, strict=True)
                logits[row, torch.tensor(ids, device=self.device)] += torch.tensor(values, device=self.device)

    def _rows(self, samples: Sequence[Sample], masks: Tensor | None) -> SampleRows:
        params = [sample.params for sample in samples]
        # A guided row's min-p has chosen its candidates already.
        min_ps = [p.min_p if len(s.slice_indexes) == 1 else 0.0 for p, s in zip(params, samples, strict=True)]
        floats = torch.tensor([(p.temperature, p.top_p, m) for p, m in zip(params, min_ps, strict=True)], device=self.device).T.contiguous()
        ints = torch.tensor(
            [(_signed(p.seed), s.position) for p, s in zip(params, samples, strict=True)], dtype=torch.int64, device=self.device
        ).T.contiguous()
        rows = SampleRows(
            temperature=floats[0],
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32, device=self.device),
            top_p=floats[1],
            min_p=floats[2],
            seeds=ints[0],
            positions=ints[1],
            mask=self._banned(samples, masks),
            num_top=max((p.logprobs or 0 for p in params), default=0),
            logprobs=any(p.logprobs is not None for p in params),
            is_filtered=any(p.temperature >= GREEDY_BELOW and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
        )
        if any(p.has_penalties for p in params):
            self._add_penalties(rows, samples)
        return rows

    def _banned(self, samples: Sequence[Sample], masks: Tensor | None) -> Tensor | None:
        """The bit mask with each sample's banned ids cleared; None when everything is allowed."""
        if not any(sample.banned for sample in samples):
            return masks
        words = (self.vocab_size + 31) // 32
        masks = torch.full((len(samples), words), -1, dtype=torch.int32) if masks is None else masks.cpu().clone()
        for row, sample in enumerate(samples):
            for token in sample.banned:
                masks[row, token // 32] &= ~_signed32(1 << (token % 32))
        return masks.to(self.device)

    def _add_penalties(self, rows: SampleRows, samples: Sequence[Sample]) -> None:
        """Fills the penalty tensors. Rows without penalties keep neutral numbers, so their counts may be zeros."""
        counts = torch.zeros((len(samples), self.vocab_size), dtype=torch.int32, device=self.device)
        seen = torch.zeros((len(samples), self.vocab_size), dtype=torch.bool, device=self.device)
        for row, sample in enumerate(samples):
            if sample.params.has_penalties and sample.history is not None:
                state = self._seen_of(sample, sample.history)
                counts[row], seen[row] = state.counts, state.seen
        rows.counts, rows.seen = counts, seen
        params = [sample.params for sample in samples]
        rows.repetition = torch.tensor([p.repetition_penalty for p in params], device=self.device)
        rows.presence = torch.tensor([p.presence_penalty for p in params], device=self.device)
        rows.frequency = torch.tensor([p.frequency_penalty for p in params], device=self.device)

    def _seen_of(self, sample: Sample, history: tuple[int, ...]) -> _Seen:
        """Adds only the ids that are new since the gang's last draw."""
        state = self._seen.get(sample.sequence_id)
        if state is None or state.length > len(history):
            zeros = torch.zeros(self.vocab_size, dtype=torch.int32, device=self.device)
            state = _Seen(zeros, torch.zeros_like(zeros, dtype=torch.bool), 0)
            self._seen[sample.sequence_id] = state
        new = torch.tensor(history[state.length :], dtype=torch.int64, device=self.device)
        generated = torch.tensor(history[max(state.length, sample.prompt_len) :], dtype=torch.int64, device=self.device)
        state.seen[new] = True
        state.counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        state.length = len(history)
        return state


def can_draw(plan: StepPlan) -> bool:
    """Do the logits need no change before they are drawn from that a back end does not know: guidance, a bias?"""
    return all(len(sample.slice_indexes) == 1 and not sample.params.logit_bias for sample in plan.samples)


def _candidates(logits_V: Tensor, params: SamplingParams, mask: Tensor | None) -> Tensor | None:
    """bool [V]: the ids whose probability is at least min_p of the likeliest allowed one's; None for all. Temperature 0 has no
    probabilities to speak of: there those of temperature 1 count."""
    if params.min_p <= 0:
        return None
    scores = logits_V.float() / (params.temperature if params.temperature >= GREEDY_BELOW else 1.0)
    if mask is not None:
        tokens = torch.arange(len(scores), device=scores.device)
        scores = scores.masked_fill((mask[tokens // 32] >> (tokens % 32)) & 1 == 0, float("-inf"))
    return scores >= scores.max() + math.log(params.min_p)


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number that an int64 tensor holds."""
    return (value + 2**63) % 2**64 - 2**63


def _signed32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
