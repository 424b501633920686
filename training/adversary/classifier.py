"""Telling real texts from generated ones by their features: logistic regression, and the classifier two-sample test made of it.

Knows features only. Called by the experiment, for the reranker and for its judge.
Shape suffixes: X texts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Features = NDArray[np.float64]
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 5


@dataclass(frozen=True, eq=False, slots=True)
class Logistic:
    """score = (x - mean) / std @ weight + bias; above 0 it says real."""

    mean: Features
    std: Features
    weight: Features
    bias: float

    def __call__(self, features_XD: Features) -> Features:
        return np.asarray((features_XD - self.mean) / self.std @ self.weight + self.bias)


def fit(real_XD: Features, generated_XD: Features, penalty: float) -> Logistic:
    """The mean logistic loss, both sides of equal weight, plus penalty / 2 times the squared weights, at its minimum."""
    whole = np.concatenate((real_XD, generated_XD))
    mean, std = whole.mean(0), whole.std(0) + 1e-6
    x = torch.from_numpy((whole - mean) / std)
    y = torch.cat((torch.ones(len(real_XD), dtype=torch.float64), torch.zeros(len(generated_XD), dtype=torch.float64)))
    share = torch.where(y > 0, 0.5 / len(real_XD), 0.5 / len(generated_XD))
    weight, bias = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none") * share).sum()
        value = value + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Logistic(mean, std, weight.detach().numpy(), bias.item())


@dataclass(frozen=True, slots=True)
class Test:
    """accuracy: of telling both sides apart, 0.5 when they can't be; error: its standard error over the prompts."""

    accuracy: float
    error: float


def two_sample_test(real_XD: Features, generated_XD: Features, penalty: float, seeds: Sequence[int] = (0, 1, 2)) -> Test:
    """Row i of both sides continues the same prompt, and no prompt is in training and test at once.

    Source: Lopez-Paz and Oquab 2017, with cross-validation instead of one split; the mean over splits drawn by the seeds.
    """
    if len(real_XD) != len(generated_XD):
        raise ValueError("both sides must continue the same prompts")
    right = np.zeros(len(real_XD))
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(real_XD))
        for fold in range(FOLDS):
            test = order[fold::FOLDS]
            train = np.setdiff1d(order, test)
            judge = fit(real_XD[train], generated_XD[train], penalty)
            right[test] += ((judge(real_XD[test]) > 0) * 0.5 + (judge(generated_XD[test]) <= 0) * 0.5) / len(seeds)
    return Test(float(right.mean()), float(right.std(ddof=1) / np.sqrt(len(right))))


def choose_penalty(real_XD: Features, generated_XD: Features) -> float:
    """The penalty that tells both sides apart best; to be chosen on other prompts than those judged."""
    return max(PENALTIES, key=lambda penalty: two_sample_test(real_XD, generated_XD, penalty, seeds=(0,)).accuracy)
