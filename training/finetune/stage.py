"""Fine-tuning as a stage of the loop: batches of examples, the loss at their places, and the development split's figures.

Called by the command. Which examples a step sees is a function of seed and step, so an interrupted run ends as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from training.finetune.examples import Example
from training.finetune.learner import Learner
from training.finetune.tasks import Figures, Split, Task, figures_of
from training.loop import Precision, products_in

MOST_NORM = 1.0
_POOL = 16
"""Batches that are cut from examples in order of length, so that little is padding."""


@dataclass(frozen=True, slots=True)
class Settings:
    """batch: examples of a step. head_learning_rate: of the classes' head, which starts from nothing."""

    batch: int = 16
    learning_rate: float = 5e-4
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    precision: Precision = "auto"


class TaskStage:
    """See `training.loop.Stage`."""

    def __init__(self, learner: Learner, task: Task, settings: Settings, seed: int) -> None:
        self.name = f"finetune-{task.kind}"
        self.learner, self.task, self.settings, self.seed = learner, task, settings, seed
        self.module: nn.Module = learner.module
        self.train = task.splits["train"].examples
        self.optimizers: list[Optimizer] = [_optimizer(learner, settings)]

    @property
    def epoch_steps(self) -> int:
        return -(-len(self.train) // self.settings.batch)

    def step(self, step: int) -> Mapping[str, float]:
        epoch, index = divmod(step, self.epoch_steps)
        chosen = [self.train[at] for at in self._batches(epoch)[index]]
        with products_in(self.settings.precision, self.learner.device):
            scores = self.learner.answers(chosen)
        targets = _targets(chosen, self.learner.device)
        loss = F.cross_entropy(scores.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(self.learner.learned, MOST_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        right = (scores.argmax(-1) == targets).float().mean()
        return {"loss": loss.item(), "right": right.item(), "norm": norm.item()}

    def _batches(self, epoch: int) -> list[list[int]]:
        """Places of the training examples, a list a step, all of them once."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.train)).tolist()
        batch, pool = self.settings.batch, self.settings.batch * _POOL
        found: list[list[int]] = []
        for at in range(0, len(order), pool):
            some = sorted(order[at : at + pool], key=lambda place: len(self.train[place].ids))
            found += [some[begin : begin + batch] for begin in range(0, len(some), batch)]
        return [found[index] for index in random.permutation(len(found))]

    def evaluate(self) -> Mapping[str, float]:
        figures = self.measure(self.task.splits["dev"])
        return {"watched": figures.watched, **figures.summary}

    def measure(self, split: Split) -> Figures:
        said, nats = answer_all(self.learner, split.examples, self.settings.batch, self.settings.precision)
        return figures_of(self.task, split, said, nats)

    def picture(self, folder: Path) -> None:
        """Text has no contact sheet."""


def _optimizer(learner: Learner, settings: Settings) -> Optimizer:
    """Matrices decay; norms, biases and the head do not."""
    head = set(learner.head.parameters()) if learner.head is not None else set()
    others = [each for each in learner.learned if each not in head]
    groups = [
        {"params": [each for each in others if each.ndim > 1], "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": [each for each in others if each.ndim == 1], "lr": settings.learning_rate, "weight_decay": 0.0},
        {"params": list(head), "lr": settings.head_learning_rate, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


@torch.no_grad()
def answer_all(learner: Learner, examples: Sequence[Example], batch: int, precision: Precision) -> tuple[list[int], float]:
    """The likeliest class at every place of the examples, in their order, and the mean nats of the right ones."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids))
    found: dict[int, list[int]] = {}
    nats, count = 0.0, 0
    for at in range(0, len(order), batch):
        chosen = [examples[place] for place in order[at : at + batch]]
        with products_in(precision, learner.device):
            scores = learner.answers(chosen)
        targets = _targets(chosen, learner.device)
        nats += float(F.cross_entropy(scores.float(), targets, reduction="sum"))
        count += len(targets)
        said = iter(scores.argmax(-1).tolist())
        for place, example in zip(order[at : at + batch], chosen, strict=True):
            found[place] = [next(said) for _ in example.places]
    return [each for place in range(len(examples)) for each in found[place]], nats / count


def _targets(examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    return torch.tensor([target for each in examples for target in each.targets], device=device)
