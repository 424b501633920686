"""From logits to ids that are being drawn: gathers each sample's parameters into rows and calls `Ops.sample`. Waits for nothing.

Knows no K/V and no layer. State: per gang with penalties, what it has seen; dropped when the plan releases its sequence.
Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.ops import Ops, Sampled, SampleRows, Weight
from kernels.sample.reference import GREEDY_BELOW
from service.runner.drawing import Drawing, send
from service.scheduling.plan import PENDING, Sample, StepPlan


@dataclass(slots=True)
class _Seen:
    """counts int32 [V] of generated ids, seen bool [V] of prompt and output, and how many ids of the history are in them."""

    counts: Tensor
    seen: Tensor
    length: int


class Sampler:
    """last: the id, int64 [1] on the device, that was drawn last for a sequence, where a plan says `PENDING`."""

    def __init__(self, ops: Ops, vocab_size: int, device: torch.device, last: Callable[[int], Tensor] | None = None) -> None:
        self.ops = ops
        self.vocab_size = vocab_size
        self.device = device
        self._last = last
        self._seen: dict[int, _Seen] = {}

    def release(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            self._seen.pop(sequence_id, None)

    def sample(self, logits: Tensor, plan: StepPlan, masks: Tensor | None = None) -> Drawing:
        """logits float32: a row for each slice that a sample names, in that order. masks int32 [R, ceil(V / 32)], on the host: bit set =
        allowed.

        Mutates: logits, and the penalty state of the plan's gangs.
        """
        samples = plan.samples
        if not samples:
            return Drawing(samples, Sampled(torch.empty(0, dtype=torch.int64)))
        masks = self._banned(samples, masks)
        logits = self._guided(logits, samples, masks)
        self._add_bias(logits, samples)
        return Drawing(samples, self.ops.sample(logits, self._rows(samples, masks)))

    def draw(self, hidden: Tensor, head: Weight, plan: StepPlan, masks: Tensor | None = None) -> Drawing:
        """The same out of final hidden states [R, D], for a plan that `can_draw`. Mutates: the penalty state of the plan's gangs."""
        samples = plan.samples
        return Drawing(samples, self.ops.draw(hidden, head, self._rows(samples, self._banned(samples, masks))))

    def _sent(self, values: Tensor) -> Tensor:
        return send(values, self.device)

    def _guided(self, logits: Tensor, samples: Sequence[Sample], masks: Tensor | None) -> Tensor:
        """Classifier-free guidance: one row out of each gang's two. What the conditional row itself finds unlikely (min-p) is no candidate,
        however much guidance would like it. There probabilities are those of the temperature, and greedy rows have none to speak of: there
        those of temperature 1 count. Source: Ho and Salimans 2022, equation 6."""
        pairs = [row for row, sample in enumerate(samples) if len(sample.slice_indexes) == 2]
        if not pairs:
            return logits
        firsts = list(accumulate((len(sample.slice_indexes) for sample in samples[:-1]), initial=0))
        guided = [samples[row] for row in pairs]
        temperatures = [s.params.temperature if s.params.temperature >= GREEDY_BELOW else 1.0 for s in guided]
        floors = [math.log(s.params.min_p) if s.params.min_p > 0 else -math.inf for s in guided]
        numbers = self._sent(torch.tensor([temperatures, floors, [s.guidance for s in guided]], dtype=torch.float32))[:, :, None]
        at, where = self._sent(torch.tensor(firsts)), self._sent(torch.tensor(pairs))
        rows = logits[at]
        with_words = rows[where]
        without = logits[at[where] + 1]
        scores = with_words / numbers[0]
        if masks is not None:
            tokens = torch.arange(self.vocab_size, device=self.device)
            scores = scores.masked_fill((masks[where][:, tokens // 32] >> (tokens % 32)) & 1 == 0, -math.inf)
        is_candidate = scores >= scores.amax(-1, keepdim=True) + numbers[1]
        mixed = without + numbers[2] * (with_words - without)
        rows[where] = torch.where(is_candidate | (numbers[1] == -math.inf), mixed, -math.inf)
        return rows

    def _add_bias(self, logits: Tensor, samples: Sequence[Sample]) -> None:
        for row, sample in enumerate(samples):
            if sample.params.logit_bias:
                ids, values = zip(*sample.params.logit_bias, strict=True)
                logits[row, self._sent(torch.tensor(ids))] += self._sent(torch.tensor(values))

    def _rows(self, samples: Sequence[Sample], masks: Tensor | None) -> SampleRows:
        params = [sample.params for sample in samples]
        # A guided row's min-p has chosen its candidates already.
        min_ps = [p.min_p if len(s.slice_indexes) == 1 else 0.0 for p, s in zip(params, samples, strict=True)]
        floats = self._sent(torch.tensor([(p.temperature, p.top_p, m) for p, m in zip(params, min_ps, strict=True)]).T.contiguous())
        numbers = [(_signed(p.seed), s.position, p.top_k) for p, s in zip(params, samples, strict=True)]
        ints = self._sent(torch.tensor(numbers, dtype=torch.int64).T.contiguous())
        rows = SampleRows(
            temperature=floats[0],
            top_k=ints[2].int(),
            top_p=floats[1],
            min_p=floats[2],
            seeds=ints[0],
            positions=ints[1],
            mask=masks,
            num_top=max((p.logprobs or 0 for p in params), default=0),
            logprobs=any(p.logprobs is not None for p in params),
            is_filtered=any(p.temperature >= GREEDY_BELOW and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
        )
        if any(p.has_penalties for p in params):
            self._add_penalties(rows, samples)
        return rows

    def _banned(self, samples: Sequence[Sample], masks: Tensor | None) -> Tensor | None:
        """The bit mask with each sample's banned ids cleared, on the device; None when everything is allowed."""
        if any(sample.banned for sample in samples):
            words = (self.vocab_size + 31) // 32
            masks = torch.full((len(samples), words), -1, dtype=torch.int32) if masks is None else masks.clone()
            for row, sample in enumerate(samples):
                for token in sample.banned:
                    masks[row, token // 32] &= ~_signed32(1 << (token % 32))
        return None if masks is None else self._sent(masks)

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
        rows.repetition = self._sent(torch.tensor([p.repetition_penalty for p in params]))
        rows.presence = self._sent(torch.tensor([p.presence_penalty for p in params]))
        rows.frequency = self._sent(torch.tensor([p.frequency_penalty for p in params]))

    def _seen_of(self, sample: Sample, history: tuple[int, ...]) -> _Seen:
        """Adds only the ids that are new since the gang's last draw."""
        state = self._seen.get(sample.sequence_id)
        if state is None or state.length > len(history):
            zeros = torch.zeros(self.vocab_size, dtype=torch.int32, device=self.device)
            state = _Seen(zeros, torch.zeros_like(zeros, dtype=torch.bool), 0)
            self._seen[sample.sequence_id] = state
        is_ahead = history[-1] == PENDING and self._last is not None
        new = self._sent(torch.tensor(history[state.length : len(history) - is_ahead], dtype=torch.int64))
        if is_ahead and self._last is not None:
            new = torch.cat((new, self._last(sample.sequence_id)))
        generated = new[max(sample.prompt_len - state.length, 0) :]
        state.seen.index_fill_(0, new, True)
        state.counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        state.length = len(history)
        return state


def can_draw(plan: StepPlan) -> bool:
    """Do the logits need no change before they are drawn from that a back end does not know: guidance, a bias?"""
    return all(len(sample.slice_indexes) == 1 and not sample.params.logit_bias for sample in plan.samples)


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number that an int64 tensor holds."""
    return (value + 2**63) % 2**64 - 2**63


def _signed32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
