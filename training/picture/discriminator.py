"""The adversary of the image tokenizer: a small PatchGAN that says of every patch whether it was photographed or redrawn.

Called by the adversarial stage; never shipped.
Source: Isola et al. 2017, section 3.2.2; spectral norm: Miyato et al. 2018.
Shape suffixes: N pictures, Y and X pixels.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Three convolutions of stride 2, 2 and 1, then a score per patch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        plan = ((3, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1))
        self.convs = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4 if stride == 2 else 3, stride, padding=1)) for a, b, stride in plan)
        self.score = spectral_norm(nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, pixels_N3YX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(scores [N, 1, Y / 4, X / 4], the features of every layer)."""
        x, features = pixels_N3YX, []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return cast(Tensor, self.score(x)), features
