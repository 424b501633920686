"""Can a fresh classifier tell reconstructed pictures from real ones? Half is as good as chance, and the best that a tokenizer can reach.

A net of its own, trained here and thrown away; it shares nothing with the adversary. Called by ablations.
Shape suffixes: N pictures, S pixels of a side.
Source: Lopez-Paz and Oquab 2017 (classifier two-sample tests), section 3.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.evaluate.shares import share_of
from training.picture.measures import to_tensor
from training.stream.document import Pixels

STEPS, BATCH, WIDTH = 300, 64, 24


def told_apart(real: Pixels, drawn: Pixels, seed: int, *, steps: int = STEPS) -> dict[str, float]:
    """Share of held-out pictures that the classifier puts on the right side; real, drawn: uint8 [N, S, S, 3], pairwise the same scenes.

    It learns from the first two thirds of the pairs and is asked about the rest, so it never sees a scene of the test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        split = len(real) * 2 // 3
        net = _taught(to_tensor(real[:split]), to_tensor(drawn[:split]), np.random.default_rng(seed), steps)
        with torch.no_grad():
            says_real = [(net(to_tensor(side[split:]))[:, 0] > 0).tolist() for side in (real, drawn)]
    return share_of([*says_real[0], *(not each for each in says_real[1])])


def _taught(real: torch.Tensor, drawn: torch.Tensor, random: np.random.Generator, steps: int) -> nn.Module:
    """Each batch holds as many real pictures as drawn ones."""
    convs: list[nn.Module] = []
    for inner, outer in ((3, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 2 * WIDTH)):
        convs += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.GELU()]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    labels = torch.cat((torch.ones(BATCH // 2, 1), torch.zeros(BATCH // 2, 1)))
    for _ in range(steps):
        one, other = (torch.from_numpy(random.integers(len(real), size=BATCH // 2)) for _ in range(2))
        loss = F.binary_cross_entropy_with_logits(net(torch.cat((real[one], drawn[other]))), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.eval()
