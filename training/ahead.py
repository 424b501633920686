"""Batches made ahead of the step that needs them, by processes beside the one that trains: a GPU takes a step in the time in which one
core makes a few documents. torch's data loader, and nothing of what a batch is. Called by the stages.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
MOST_WORKERS = 14
_READY = 6
"""Batches that each process has ready at most."""
_WATCH_S = 2.0


def num_workers(device: torch.device, num_ranks: int) -> int:
    """Processes that make batches for a rank: the cores that its GPU leaves idle; none on a CPU, which has no time to wait for."""
    if device.type != "cuda":
        return 0
    return max(1, min(MOST_WORKERS, _num_cores() // num_ranks - 1))


def _num_cores() -> int:
    """That this process may use, which `taskset` and containers bound."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Ahead(Generic[Item]):
    """`make(step)` for one step after the other. make: a function of the step alone, which does not hold its user: the workers end when
    both are gone. workers: processes that call it, forked from this one, each with one thread and without its GPU; 0 calls it here."""

    def __init__(self, make: Callable[[int], Item], workers: int) -> None:
        self.make, self.workers = make, workers
        self.next = -1
        self.items: Iterator[Item] = iter(())

    def __call__(self, step: int) -> Item:
        """Any step may come first, as after an interruption; those that follow it are made while it is used."""
        if not self.workers:
            return self.make(step)
        if step != self.next:
            self.items = self._from(step)
        self.next = step + 1
        return next(self.items)

    def _from(self, step: int) -> Iterator[Item]:
        loader: DataLoader[Any] = DataLoader(
            _Steps(self.make, step),
            batch_size=None,
            sampler=range(2**40),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            prefetch_factor=_READY,
            multiprocessing_context="fork",
            worker_init_fn=_end_with_parent,
        )
        return iter(loader)


@dataclass(frozen=True)
class _Steps(Dataset[Any]):
    make: Callable[[int], Any]
    begin: int

    def __getitem__(self, index: int) -> Any:
        return self.make(self.begin + index)


def _end_with_parent(worker: int) -> None:
    """A trainer that is killed must not leave its workers behind, which wait for ever for somebody to take what they made."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(item: Item) -> Item:
    return item
