"""Between a device that computes beside the host and plain values: what is sent there without waiting, and drawn ids on their way back.

Knows no model and no K/V. Used by `sampler`, `inputs` and `runner`.
Shape suffixes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Sampled
from service.scheduling.plan import Drawn, Sample


def send(values: Tensor, device: torch.device) -> Tensor:
    """Host values on the device, in order with what it was told before. A copy from memory that is not pinned would wait for all of it."""
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Memory that a copy to a GPU reads without the host's help: torch hands it to nobody else before that copy is done."""
    return values.pin_memory() if device.type == "cuda" and values.numel() else values


class Drawing:
    """What is being drawn for the samples of a plan, in their order. ids int64 [R], on the device: for who goes on from them there."""

    def __init__(self, samples: Sequence[Sample], drawn: Sampled) -> None:
        self.ids = drawn.ids
        self._samples = samples
        # Asked of a GPU without waiting, the host's tensors are pinned, and filled when the event has passed.
        parts = (drawn.ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        self._parts = [None if part is None else part.to("cpu", non_blocking=True) for part in parts]
        self._is_there: torch.cuda.Event | None = None
        if drawn.ids.is_cuda:
            self._is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_there.record()

    def wait(self) -> list[Drawn]:
        """One `Drawn` per sample."""
        if self._is_there is not None:
            self._is_there.synchronize()
        ids, logprobs, top_ids, top_logprobs = (None if part is None else part.tolist() for part in self._parts)
        if ids is None or logprobs is None:
            return [Drawn(token) for token in ids or ()]
        tops = [[] for _ in ids] if top_ids is None or top_logprobs is None else list(map(list, map(zip, top_ids, top_logprobs)))
        return [
            Drawn(token, logprob, tuple(top[: sample.params.logprobs])) if sample.params.logprobs is not None else Drawn(token)
            for token, logprob, top, sample in zip(ids, logprobs, tops, self._samples, strict=True)
        ]
