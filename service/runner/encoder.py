"""Runs plans on an encoder: whole prompts in, a vector each out. The engine's `Runner` protocol, without K/V, logits or samples.

What may not come in: requests, text, queues. Called by the engine loop, whose scheduler gives an encoder's lane whole prompts only and
finds no prefixes. Shape suffixes: T tokens, L tokens of one text, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.encoder import Encoder
from service.scheduling.plan import Drawn, PromptReading, StepPlan

BATCH_TOKENS = 512
"""Tokens that one thread takes at a time: few enough that all threads have work to the end of a step, and enough of them to spread the
padding of a last tile over."""


@dataclass(frozen=True, slots=True)
class EncoderHandle:
    """A step that was computed: its plan, and the last layer's vectors of each slice [L, D]."""

    plan: StepPlan
    states: Sequence[Tensor]


class EncoderRunner:
    """num_threads: that share a step on a CPU. Each takes whole texts and computes alone, so they never wait for one another within an
    operation: with PyTorch's own threads a busy neighbour on one core slows all of them down."""

    def __init__(self, model: Encoder, num_threads: int) -> None:
        self.model = model
        self.num_threads = num_threads if model.embedding.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="encoder", initializer=torch.set_num_threads, initargs=(1,))

    def forward(self, plan: StepPlan) -> EncoderHandle:
        """Raises: RuntimeError for a slice that is not a whole prompt from its start, and for a sample."""
        if plan.samples or any(piece.start for piece in plan.slices):
            raise RuntimeError("an encoder reads whole prompts and draws nothing")
        texts = [piece.tokens for piece in plan.slices]
        parts = list(self._pool.map(self._run, batches(texts, self._batch_tokens(sum(map(len, texts))))))
        return EncoderHandle(plan, [states for part in parts for states in part])

    def _batch_tokens(self, num_tokens: int) -> int:
        """A share for each thread, and no more than `BATCH_TOKENS`. A GPU takes all at once."""
        if self.model.embedding.device.type != "cpu":
            return num_tokens
        return min(-(-num_tokens // self.num_threads), BATCH_TOKENS)

    def _run(self, texts: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        with torch.inference_mode():
            return torch.split(self.model(texts), [len(text) for text in texts])

    def sample(self, handle: EncoderHandle, masks: Tensor | None = None) -> list[Drawn]:
        return []

    def read(self, handle: EncoderHandle) -> list[PromptReading]:
        """One `PromptReading` per read of the plan. Raises: RuntimeError for a read that wants more than a vector."""
        readings = []
        for read in handle.plan.reads:
            if read.targets or not (read.pool and read.is_last):
                raise RuntimeError("an encoder gives vectors of whole prompts and nothing else")
            with torch.inference_mode():
                vector = pooled(handle.states[read.slice_index], read.pool).cpu().numpy()
            readings.append(PromptReading(vector=vector.astype("<f4").tobytes()))
        return readings


def batches(texts: Sequence[Sequence[int]], num_tokens: int) -> list[list[Sequence[int]]]:
    """The texts in their order, in lists that end with the text that brings them to num_tokens."""
    found: list[list[Sequence[int]]] = []
    size = num_tokens
    for text in texts:
        if size >= num_tokens:
            found.append([])
            size = 0
        found[-1].append(text)
        size += len(text)
    return found


def pooled(rows_LD: Tensor, pool: str) -> Tensor:
    """One text's vector, float32 [D]. The mean is summed in float64, as the decoders' is."""
    if pool == "mean":
        return rows_LD.double().mean(0).float()
    return rows_LD[0 if pool == "cls" else -1].float()
