"""What a step's final hidden states say about its prompts: log-probabilities of the ids that follow, and pooled vectors.

Knows no K/V and no layer. State: per sequence whose vector is a mean or of the first id, what its slices have given so far; dropped with
the vector, or when the plan releases the sequence. Called by `runner`. Shape suffixes: T tokens, R rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import torch
from torch import Tensor

from service.model.transformer import Transformer
from service.scheduling.plan import PromptRead, PromptReading, StepPlan, TokenReading

# Logits of so many rows exist at once: 64 rows of 49,152 float32 are 12 MiB, and a product of 64 rows is as efficient as one of more.
LOGIT_ROWS = 64
_NEVER = float("-inf")


@dataclass(slots=True)
class _Pooled:
    """total float64 [D]: of the hidden states at positions 0 ... num_rows - 1 (of the first alone for "cls")."""

    total: Tensor
    num_rows: int


class Reader:
    def __init__(self, model: Transformer, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._pooled: dict[int, _Pooled] = {}
        self._released: tuple[int, ...] = ()

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Called once for each step that is begun. What is kept of these goes with the step after: the one in front of this may hold
        slices of them, and be read later than this one is begun."""
        for sequence_id in self._released:
            self._pooled.pop(sequence_id, None)
        self._released = tuple(sequence_ids)

    def read(self, plan: StepPlan, x_TD: Tensor, residual_TD: Tensor) -> list[PromptReading]:
        """One `PromptReading` per read of the plan. Mutates: what is kept of sequences whose prompts go on."""
        starts = list(accumulate((len(piece.tokens) for piece in plan.slices), initial=0))
        logprobs = self._logprobs(plan.reads, starts, x_TD, residual_TD)
        return [
            PromptReading(tuple(islice(logprobs, len(read.targets))), self._vector(plan, read, starts, x_TD, residual_TD))
            for read in plan.reads
        ]

    # -- log-probabilities --

    def _logprobs(self, reads: Sequence[PromptRead], starts: Sequence[int], x_TD: Tensor, residual_TD: Tensor) -> Iterator[TokenReading]:
        """Of all targets of all reads, in order, whichever read they belong to."""
        targets = list(chain.from_iterable(read.targets for read in reads))
        if not targets:
            return iter(())
        firsts = (starts[read.slice_index] + read.first_row for read in reads)
        rows = [row for first, read in zip(firsts, reads, strict=True) for row in range(first, first + len(read.targets))]
        tops = [read.num_top for read in reads for _ in read.targets]
        targets_R, rows_R = torch.tensor(targets, device=self.device), torch.tensor(rows, device=self.device)
        return chain.from_iterable(
            self._token_readings(self.model.logits(x_TD, residual_TD, rows_R[part]), targets_R[part], tops[part])
            for part in (slice(at, at + LOGIT_ROWS) for at in range(0, len(rows), LOGIT_ROWS))
        )

    def _token_readings(self, logits_RV: Tensor, targets_R: Tensor, tops: Sequence[int]) -> list[TokenReading]:
        """tops: how many of the likeliest ids each row tells. A row that holds NaN tells minus infinity."""
        logits_RV.nan_to_num_(nan=_NEVER, posinf=torch.finfo(torch.float32).max, neginf=_NEVER)
        norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
        chosen = (logits_RV.gather(1, targets_R[:, None]) - norm_R1)[:, 0].nan_to_num(nan=_NEVER, neginf=_NEVER).tolist()
        widest = min(max(tops), logits_RV.shape[1])
        if not widest:
            return [(logprob, ()) for logprob in chosen]
        top = logits_RV.topk(widest, dim=-1)
        values = (top.values - norm_R1).nan_to_num(nan=_NEVER, neginf=_NEVER).tolist()
        pairs = (tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(top.indices.tolist(), values, strict=True))
        return [(logprob, pair[:count]) for logprob, pair, count in zip(chosen, pairs, tops, strict=True)]

    # -- vectors --

    def _vector(self, plan: StepPlan, read: PromptRead, starts: Sequence[int], x_TD: Tensor, residual_TD: Tensor) -> bytes | None:
        """The vector of a prompt that ends with this slice; None for every other one."""
        if not read.pool:
            return None
        first, end = starts[read.slice_index], starts[read.slice_index + 1]
        start = plan.slices[read.slice_index].start
        if read.pool == "last":
            first = end - 1
        elif read.pool == "cls" and start == 0:
            end = first + 1
        elif read.pool == "cls":
            end = first
        pooled = self._pool(read.sequence_id, first, end, x_TD, residual_TD, is_new=start == 0 or read.pool == "last")
        if not read.is_last:
            return None
        self._pooled.pop(read.sequence_id, None)
        mean_1D = (pooled.total / pooled.num_rows).float()[None]
        vector: bytes = self.model.restore(mean_1D)[0].cpu().numpy().astype("<f4").tobytes()
        return vector

    def _pool(self, sequence_id: int, first: int, end: int, x_TD: Tensor, residual_TD: Tensor, *, is_new: bool) -> _Pooled:
        """Adds the rows first ... end - 1 of the step to what the sequence's earlier slices gave. A prompt that is computed again from its
        beginning, after a preemption, begins anew."""
        if is_new:
            self._pooled[sequence_id] = _Pooled(torch.zeros(x_TD.shape[1], dtype=torch.float64, device=self.device), 0)
        pooled = self._pooled[sequence_id]
        if end > first:
            rows_R = torch.arange(first, end, device=self.device)
            pooled.total += self.model.hidden(x_TD, residual_TD, rows_R).sum(0, dtype=torch.float64)
            pooled.num_rows += end - first
        return pooled
