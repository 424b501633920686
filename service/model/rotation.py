"""Turns a decoder's weights into those of the same function on a rotated residual stream, so that int8 activations lose little.

Trained decoders put huge numbers into a few channels; with one scale per row the other channels keep only a few levels of the 256.
A random rotation spreads them evenly, and costs nothing at run time: RMSNorm commutes with a rotation once its weights are folded
into the matrices behind it, so every rotation is folded into a matrix too. Exact but for rounding. Used by `transformer` for int8, and
for 4-bit weights that it quantises itself.
Source: Ashkboos et al. 2024 (QuaRot), sections 4.1 and 4.2 (the residual stream and the values; no online transform).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from service.model.config import ModelConfig

SEED = 20_240_330  # any: the same model must always become the same numbers


class TensorSource(Protocol):
    """Where weights come from: a checkpoint (weights.py), or random numbers in a test."""

    def get(self, name: str) -> Tensor:
        """A dense tensor by our name, such as "layers.3.gate" or "embedding"."""


def random_rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix [width, width] float32, uniformly random. Source: Mezzadri 2007, section 5 (QR with the signs fixed)."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = (q * r.diagonal().sign()).float()
    return rotation


class RotatedSource:
    """A `TensorSource` over another: the same names, rotated. Norm weights become ones; the head is never tied any more.

    The residual stream is rotated by R: what reads it gets W diag(norm) R, what writes it gets R^T W. Each value head is rotated by
    its own V, undone in the columns of `out`.
    """

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        self.source = source
        self.config = config
        self.residual = random_rotation(config.width, SEED)
        self.values = random_rotation(config.head_width, SEED + 1)

    def get(self, name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        rotate: Callable[[str, Tensor], Tensor] | None = getattr(self, f"_{kind}", None)
        tensor = self.source.get("embedding" if name == "head" and self.config.has_tied_head else name).float()
        return tensor if rotate is None else rotate(layer, tensor)

    def basis(self) -> Tensor:
        """float32 [D, D]: the last norm's output times this is what the model that was not rotated gives there."""
        return self.residual.T * self.source.get("final_norm").float()

    def _reader(self, norm: str, weight: Tensor) -> Tensor:
        return weight @ (self.source.get(norm).float()[:, None] * self.residual)

    def _writer(self, weight: Tensor) -> Tensor:
        return self.residual.T @ weight

    def _head_rows(self, rows: Tensor) -> Tensor:
        """Turns the output dimensions of each value head: rows [K * H, ...]."""
        return (self.values.T @ rows.view(self.config.num_kv_heads, self.config.head_width, -1)).view(rows.shape)

    def _embedding(self, layer: str, table: Tensor) -> Tensor:
        return table @ self.residual

    _grid_rows = _grid_columns = _embedding  # added to it

    def _head(self, layer: str, weight: Tensor) -> Tensor:
        return self._reader("final_norm", weight)

    def _q(self, layer: str, weight: Tensor) -> Tensor:
        return self._reader(f"{layer}.attention_norm", weight)

    _k = _q

    def _v(self, layer: str, weight: Tensor) -> Tensor:
        return self._head_rows(self._q(layer, weight))

    def _v_bias(self, layer: str, bias: Tensor) -> Tensor:
        return self._head_rows(bias)

    def _out(self, layer: str, weight: Tensor) -> Tensor:
        columns = weight.view(-1, self.config.num_heads, self.config.head_width) @ self.values
        return self._writer(columns.reshape(weight.shape))

    def _gate(self, layer: str, weight: Tensor) -> Tensor:
        return self._reader(f"{layer}.mlp_norm", weight)

    _up = _router = _shared_gate = _shared_up = _shared_router = _gate

    def _down(self, layer: str, weight: Tensor) -> Tensor:
        experts = weight.view(-1, self.config.width, weight.shape[1])  # a layer may have several, one below the other
        return self._writer(experts).view(weight.shape)

    _shared_down = _down

    def _ones(self, layer: str, norm: Tensor) -> Tensor:
        return torch.ones_like(norm)

    _attention_norm = _mlp_norm = _final_norm = _ones
