"""The decoder: embedding, layers, final norm, head. One class for every family; what differs is in `ModelConfig` and in the weights.

Serving calls it with paged K/V on flat tokens; it owns no cache and knows no request. Used by the runner and by training.
Shape suffixes: T tokens, R rows to sample, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kernels.linear.reference import quantize_int8
from kernels.ops import Activation, AttentionSpec, LayerSpec, LayerWeights, Ops, PagedKV, Weight
from service.model.config import LayerAttention, ModelConfig
from service.model.layers import DecoderLayer, rotary_table
from service.model.rotation import RotatedSource, TensorSource


class Transformer(nn.Module):
    """layers, final_norm [D], embedding and head [V, D] (the same object when tied and dense)."""

    def __init__(self, config: ModelConfig, ops: Ops, layers: Sequence[LayerWeights], final_norm: Tensor, tables: tuple[Weight, Weight]):
        super().__init__()
        self.config = config
        self.ops = ops
        self.layers = nn.ModuleList(DecoderLayer(weights, ops) for weights in layers)
        self.final_norm = final_norm
        self.embedding, self.head = tables

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.final_norm.dtype

    def forward(self, ids_T: Tensor, positions_T: Tensor, kv: Sequence[PagedKV]) -> tuple[Tensor, Tensor]:
        """All layers over flat tokens. kv: one per layer. Returns (x [T, D], residual [T, D]), whose sum the head's norm takes.

        Mutates: the keys and values of every layer, at this step's slots.
        """
        x = self.ops.embed(ids_T, self.embedding, self.dtype)
        residual: Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, positions_T, layer_kv)
        return x, cast(Tensor, residual)  # a config has at least one layer

    def logits(self, x_TD: Tensor, residual_TD: Tensor, rows_R: Tensor) -> Tensor:
        """float32 [R, V] for the chosen rows."""
        normed, _ = self.ops.rms_norm(x_TD[rows_R], residual_TD[rows_R], self.final_norm, self.config.norm_eps)
        return self.ops.linear(normed, self.head).float()


def layer_spec(config: ModelConfig, attention: LayerAttention) -> LayerSpec:
    spec = AttentionSpec(config.attention_scale, attention.window, attention.sink, attention.softcap)
    activation: Activation = "gelu_tanh" if config.activation == "gelu_tanh" else "silu"
    return LayerSpec(config.num_heads, config.num_kv_heads, config.head_width, spec, config.norm_eps, activation)


def build_transformer(
    config: ModelConfig,
    source: TensorSource,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    is_int8: bool = False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Transformer:
    """Reads the weights tensor by tensor, so that the whole dense model is never in memory beside the packed one.

    dtype: of activations and of dense weights. is_int8 rotates the weights and quantises every matrix per output row, but for the
    embedding, of which a step reads only some rows: it stays dense, in bfloat16. Raises: what `source.get` raises.
    """
    if is_int8:
        source = RotatedSource(source, config)

    def vector(name: str) -> Tensor:
        return source.get(name).to(device=device, dtype=dtype).contiguous()

    def matrix(*names: str) -> Weight:
        parts = [source.get(name) for name in names]
        dense = torch.cat(parts) if len(parts) > 1 else parts[0]
        if is_int8:
            return ops.pack(quantize_int8(dense.to(device=device, dtype=torch.float32)))
        return ops.pack(dense.to(device=device, dtype=dtype).contiguous())

    rotary: dict[object, Tensor] = {}

    def rotary_of(attention: LayerAttention) -> Tensor:
        key = (attention.rope_base, attention.rope_scaling)
        if key not in rotary:
            rotary[key] = rotary_table(config.head_width, attention, config.max_context, device)
        return rotary[key]

    layers = []
    for index, attention in enumerate(config.layers):
        at = f"layers.{index}."
        bias = torch.cat([vector(at + name) for name in ("q_bias", "k_bias", "v_bias")]) if config.has_qkv_bias else None
        layers.append(
            LayerWeights(
                spec=layer_spec(config, attention),
                attention_norm=vector(at + "attention_norm"),
                qkv=matrix(at + "q", at + "k", at + "v"),
                out=matrix(at + "out"),
                mlp_norm=vector(at + "mlp_norm"),
                gate_up=matrix(at + "gate", at + "up"),
                down=matrix(at + "down"),
                rotary=rotary_of(attention),
                qkv_bias=bias,
                q_norm=vector(at + "q_norm") if config.has_qk_norm else None,
                k_norm=vector(at + "k_norm") if config.has_qk_norm else None,
            )
        )
        progress((index + 1) / (len(config.layers) + 1))
    embedding: Weight
    if is_int8:
        embedding, head = source.get("embedding").to(device=device, dtype=torch.bfloat16), matrix("head")
    else:
        embedding = matrix("embedding")
        head = embedding if config.has_tied_head else matrix("head")
    progress(1.0)
    return Transformer(config, ops, layers, vector("final_norm"), (embedding, head))
