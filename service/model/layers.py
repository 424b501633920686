"""One decoder layer, and the rotary tables its kind needs. A module holds weights; the arithmetic is in `Ops.layers`.

No file is read here (weights.py does) and no K/V is owned here (the runner, or training, hands it in). Used by `transformer`.
Shape suffixes: T tokens, D width, H head width.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor, nn

from kernels.ops import LayerWeights
from service.model.config import LayerAttention, RopeScaling


def rotary_frequencies(head_width: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Angles per position, float64 [H / 2], lowest dimension first.

    Source: RoFormer, section 3.2.2; the scaled bands follow the Llama 3.1 release's reference code.
    """
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rotary_table(head_width: int, attention: LayerAttention, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every position, float32 [num_positions, 2, H / 2]."""
    frequencies = rotary_frequencies(head_width, attention.rope_base, attention.rope_scaling)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device=device, dtype=torch.float32)


class DecoderLayer(nn.Module):
    """One layer's weights, which `Ops.layers` works on. The dense ones are also parameters, so that an optimiser finds them."""

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        self.weights = weights
        for field in fields(weights):
            value = getattr(weights, field.name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(field.name, value)
