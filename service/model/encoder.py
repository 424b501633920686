"""An encoder of BERT's class: embeddings, post-norm layers that see the whole text, one vector a token. And how its weights are read.

Texts lie one behind the other in flat rows. Every row's numbers are those it would get alone, bit for bit on a CPU: products are made
of tiles of equally many rows, attention of one text at a time. It owns no cache and knows no request. Called by the runner.
Shape suffixes: T tokens of all texts, L tokens of one, D width, N heads, H head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.model.encoder_config import EncoderConfig
from service.model.rotation import TensorSource

TILE = 32
"""Rows of one product on a CPU. A library picks its kernel by the number of rows, so that a row's last bits change with its company; in
tiles of one size they can't. Of the 108 GFLOPS that one product of 384 rows reaches, tiles of 16, 32, 64 and 128 rows keep 84, 94, 77 and
105 (MiniLM's matrices, one core of an AMD Zen 5); a short text alone pays for a whole tile, so the largest is not the best."""


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """x W^T + b. weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in], T a multiple of `TILE` on a CPU; [T, out]."""
        if x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        out = x.new_empty(len(x), len(self.weight))
        columns = self.weight.t()
        for start in range(0, len(x), TILE):
            torch.addmm(self.bias, x[start : start + TILE], columns, out=out[start : start + TILE])
        return out


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """LayerNorm with weight and bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, eq=False, slots=True)
class EncoderLayer:
    """qkv: the query, key and value rows in this order. A norm stands behind each half, over its sum with what came in."""

    num_heads: int
    qkv: Affine
    out: Affine
    attention_norm: Norm
    up: Affine
    activate: Callable[[Tensor], Tensor]
    down: Affine
    mlp_norm: Norm

    def __call__(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        x_TD = self.attention_norm(x_TD + self.out(self._attend(self.qkv(x_TD), lengths)))
        return self.mlp_norm(x_TD + self.down(self.activate(self.up(x_TD))))

    def _attend(self, qkv: Tensor, lengths: Sequence[int]) -> Tensor:
        """Every token sees its whole text and no other. Rows behind the last text stay zero."""
        heads = qkv.view(len(qkv), 3, self.num_heads, -1)
        y_TD = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
        start = 0
        for length in lengths:
            q, k, v = heads[start : start + length].permute(1, 2, 0, 3)  # each [N, L, H]
            y = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            y_TD[start : start + length] = y.transpose(0, 1).reshape(length, -1)
            start += length
        return y_TD


class Encoder(nn.Module):
    """embedding [V, D], positions [P, D] with the vector of the first token type added, the norm over their sum, layers."""

    def __init__(self, config: EncoderConfig, embedding: Tensor, positions: Tensor, norm: Norm, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.positions = positions
        self.norm = norm
        self.stack = tuple(layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights in memory."""
        return self.config.num_parameters * self.embedding.element_size()

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The last layer's vectors, [T, D], T the ids of all texts. Raises: IndexError for an id or a position outside of the tables."""
        lengths = [len(text) for text in texts]
        total = sum(lengths)
        padded = total if self.embedding.device.type != "cpu" else -(-total // TILE) * TILE
        ids = torch.zeros(padded, dtype=torch.int64)
        places = torch.zeros(padded, dtype=torch.int64)
        ids[:total] = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        places[:total] = torch.cat([torch.arange(length) for length in lengths])
        device = self.embedding.device
        x = self.norm(self.embedding[ids.to(device)] + self.positions[places.to(device)])
        for layer in self.stack:
            x = layer(x, lengths)
        return x[:total]


def build_encoder(
    config: EncoderConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Encoder:
    """Raises: what `source.get` raises."""

    def get(*names: str) -> Tensor:
        parts = [source.get(name).to(device=device, dtype=dtype) for name in names]
        return torch.cat(parts).contiguous()

    def affine(at: str, *names: str) -> Affine:
        return Affine(get(*(at + name for name in names)), get(*(f"{at}{name}_bias" for name in names)))

    def norm(name: str) -> Norm:
        return Norm(get(name), get(f"{name}_bias"), config.norm_eps)

    def layer(index: int) -> EncoderLayer:
        at = f"layers.{index}."
        progress(index / config.num_layers)
        return EncoderLayer(
            num_heads=config.num_heads,
            qkv=affine(at, "q", "k", "v"),
            out=affine(at, "out"),
            attention_norm=norm(f"{at}attention_norm"),
            up=affine(at, "up"),
            activate=_ACTIVATIONS[config.activation],
            down=affine(at, "down"),
            mlp_norm=norm(f"{at}mlp_norm"),
        )

    with torch.inference_mode():
        # A single text is of the first type throughout, so its vector can be part of the positions.
        positions = get("positions") + get("kinds")[0]
        layers = [layer(index) for index in range(config.num_layers)]
        model = Encoder(config, get("embedding"), positions, norm("embedding_norm"), layers)
    progress(1.0)
    return model


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}
