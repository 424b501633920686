"""What the image tokenizer is taught by: pixels, edges, and an adversary. Functions of tensors only.

Called by the tokenizer's stages.
Shape suffixes: N pictures, Y and X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4


def edges(pixels_N3YX: Tensor) -> Tensor:
    """Sobel derivatives to the right and down, of every channel: [N * 3, 2, Y - 2, X - 2]."""
    kernels = torch.stack((_SOBEL, _SOBEL.T))[:, None].to(pixels_N3YX)
    return F.conv2d(pixels_N3YX.flatten(0, 1)[:, None], kernels)


def reconstruction(drawn_N3YX: Tensor, real_N3YX: Tensor, edge_weight: float = 0.5) -> Tensor:
    """Mean absolute difference of pixels, and of edges. The latter stands in for a perceptual loss, which would need a trained net."""
    return F.l1_loss(drawn_N3YX, real_N3YX) + edge_weight * F.l1_loss(edges(drawn_N3YX), edges(real_N3YX))


def commitment(latents: Tensor, codes: Tensor) -> Tensor:
    """Keeps latents near the codes they were rounded to; no gradient reaches the codes."""
    return F.mse_loss(latents, codes.detach())


def hinge_judge(real: Tensor, drawn: Tensor) -> Tensor:
    """What the discriminator minimises. Source: Lim and Ye 2017, equation 2."""
    return F.relu(1 - real).mean() + F.relu(1 + drawn).mean()


def hinge_draw(drawn: Tensor) -> Tensor:
    """What the decoder minimises against it."""
    return -drawn.mean()


def feature_matching(drawn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of a discriminator's features, over its layers. Source: Wang et al. 2018 (pix2pixHD), equation 4."""
    return torch.stack([F.l1_loss(one, other.detach()) for one, other in zip(drawn, real, strict=True)]).mean()
