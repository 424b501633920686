"""Processes that train together: how they start, and the two sums they share. torch.distributed and nothing else.

gloo between CPU processes of one thread each (measured: two of them beat one process of two threads), NCCL between GPUs. Called by the
loop and by the stages.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

from service.errors import StartupError


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `count` processes that hold equal weights and see different batches."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Adds up over all processes. Mutates: the tensors, which are equal everywhere after."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agreed(self, figure: float) -> float:
        """The first process's figure, in all of them: what they decide by must not differ in a last bit."""
        if self.count == 1:
            return figure
        box = [figure]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Mutates: the gradients, which are the mean of all processes' after. Where a batch of one did not touch a parameter, its is 0."""
        if self.count == 1:
            return
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in learned:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [cast(Tensor, parameter.grad) for parameter in learned]
        self.sum(gradients)
        torch._foreach_div_(gradients, self.count)


def run_ranks(count: int, work: Callable[[Rank], None]) -> None:
    """Runs `work` once per rank and waits. One rank runs here, more in processes of their own, so `work` must be picklable.

    Raises: what a rank raised.
    """
    if count == 1:
        work(Rank())
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = get_context("spawn").SimpleQueue()
    try:
        spawn(_run_rank, (count, port, work, said), nprocs=count)  # type: ignore[no-untyped-call]
    except ProcessException:
        if said.empty():
            raise
        raise StartupError(said.get()) from None  # one line for whoever started it, as a single rank gives


def _run_rank(index: int, count: int, port: int, work: Callable[[Rank], None], said: SimpleQueue[str]) -> None:
    """said: takes the message of a StartupError, which else would arrive as a traceback."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
    try:
        work(Rank(index, count))
    except StartupError as error:
        said.put(error.message)
        raise
    finally:
        dist.destroy_process_group()
