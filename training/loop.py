"""The loop that every stage runs in: steps, learning rate, checkpoints, evaluation, early stop, logs. It knows no model and no data.

A stage's step is a function of (weights, optimiser state, seed, step): all its random draws come from generators seeded by these. So a
run that was interrupted and resumed ends in the weights of one that was not. Called by the stages' recipes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from training.log import RunLog
from training.ranks import Rank

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """steps: of the optimiser. Learning rates rise over warmup_steps and fall as a cosine to final_share of their peak at the end.

    evaluate_every and save_every in steps; patience: evaluations without improvement after which training ends, 0 never.
    """

    steps: int
    warmup_steps: int = 100
    final_share: float = 0.05
    evaluate_every: int = 500
    save_every: int = 250
    patience: int = 0

    def factor(self, step: int) -> float:
        """Of the peak learning rate, at a step counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Stage(Protocol):
    """One thing to train. module: all that is saved and restored, buffers included; optimizers: so are their states."""

    name: str

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizers(self) -> Sequence[Optimizer]: ...

    def step(self, step: int) -> Mapping[str, float]:
        """One update from this rank's batch of that step; figures for the log."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Held-out figures; the first is what early stopping minimises. The same on every rank."""
        ...

    def picture(self, folder: Path) -> None:
        """Writes contact sheets, if the stage has any."""
        ...


@dataclass(slots=True)
class _Progress:
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    idle_evaluations: int = 0


def run(stage: Stage, schedule: Schedule, folder: Path, rank: Rank, seed: int = 0) -> float:
    """Trains until the schedule ends or early stopping does, from the last checkpoint in the folder if there is one.

    Returns the seconds trained, interruptions not counted. Mutates: stage.module; it holds the last weights, or with patience the best.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = _restore(stage, folder / "checkpoint.pt")
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in _fresh_rates(stage)]
    with RunLog(folder, stage.name, schedule.steps, progress.step, is_silent=not rank.is_first) as log:
        while progress.step < schedule.steps and not _is_over(progress, schedule):
            begun = time.perf_counter()
            _set_rates(stage, peaks, schedule.factor(progress.step))
            torch.manual_seed(step_seed(seed, progress.step, rank.index))
            figures = stage.step(progress.step)
            progress.step += 1
            progress.seconds += time.perf_counter() - begun
            log.step(progress.step, progress.seconds, figures)
            is_last = progress.step == schedule.steps
            if progress.step % schedule.evaluate_every == 0 or is_last:
                _evaluate(stage, schedule, progress, folder, rank, log)
            is_last = is_last or _is_over(progress, schedule)
            if rank.is_first and (progress.step % schedule.save_every == 0 or is_last):
                _save(stage, progress, folder / "checkpoint.pt")
    if schedule.patience and (folder / "best.pt").exists():
        stage.module.load_state_dict(torch.load(folder / "best.pt", weights_only=True, map_location="cpu"))
    return progress.seconds


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step of every rank."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


def _is_over(progress: _Progress, schedule: Schedule) -> bool:
    """Has it not improved for too long? Every rank comes to the same answer."""
    return bool(schedule.patience) and progress.idle_evaluations >= schedule.patience


def _evaluate(stage: Stage, schedule: Schedule, progress: _Progress, folder: Path, rank: Rank, log: RunLog) -> None:
    """Mutates: progress, and the best weights on disk."""
    stage.module.eval()
    with torch.no_grad():
        figures = stage.evaluate()
        if rank.is_first:
            stage.picture(folder)
    stage.module.train()
    log.evaluation(progress.step, progress.seconds, figures)
    own = next(iter(figures.values()))
    if rank.is_first and schedule.patience and own < progress.best:
        _replace(folder / "best.pt", stage.module.state_dict())
    watched = rank.agreed(own)  # only now: whoever knows it may read the file
    if watched < progress.best:
        progress.best, progress.idle_evaluations = watched, 0
    else:
        progress.idle_evaluations += 1


def _fresh_rates(stage: Stage) -> Iterator[Optimizer]:
    """The optimisers with their peak rates back in place, which a restored state has overwritten."""
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"])
        yield optimizer


def _set_rates(stage: Stage, peaks: list[list[float]], factor: float) -> None:
    for optimizer, rates in zip(stage.optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor


def _save(stage: Stage, progress: _Progress, path: Path) -> None:
    state: dict[str, Any] = {
        "module": stage.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
        "progress": (progress.step, progress.seconds, progress.best, progress.idle_evaluations),
    }
    _replace(path, state)


def _replace(path: Path, state: Mapping[str, Any]) -> None:
    """Never leaves half a file: an interrupted run must find the last whole one."""
    fresh = path.with_suffix(".tmp")
    torch.save(dict(state), fresh)
    os.replace(fresh, path)


def _restore(stage: Stage, path: Path) -> _Progress:
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
    if not path.exists():
        return _Progress()
    state = torch.load(path, weights_only=True, map_location="cpu")
    stage.module.load_state_dict(state["module"])
    for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return _Progress(*state["progress"])


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 have instructions of their own there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions round their inputs to bfloat16 and add in float32; weights, norms, sums and the optimiser stay
    float32. "auto": where the hardware has instructions for it."""
    is_bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
        yield
