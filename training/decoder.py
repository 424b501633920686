"""A decoder that can be taught: the serving `Transformer` over parameters, on the training back end; and the way back to named tensors.

Called by the language stages, fine-tuning and export.
Shape suffixes: T tokens, U rows of documents, L places of a row, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kernels.ops import LayerWeights, Ops
from kernels.training_ops import empty_kv, training_ops, whole_documents
from service.model.config import ModelConfig, expected_shapes
from service.model.layers import DecoderLayer
from service.model.transformer import Precision, Transformer, build_transformer

INITIAL_STD = 0.02


def fresh_weights(config: ModelConfig, seed: int) -> NamedSource:
    """Weights that know nothing: norms are 1, matrices normal, those that write to the residual stream smaller the more layers there are.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        std = INITIAL_STD / (math.sqrt(2 * len(config.layers)) if name.endswith((".out", ".down")) else 1.0)
        tensors[name] = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * std
    return NamedSource(tensors)


def fresh_decoder(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """A decoder with random weights, ready to be taught."""
    return teachable(config, fresh_weights(config, seed), device)


def teachable(config: ModelConfig, source: object, device: torch.device | str = "cpu", ops: Ops | None = None) -> Transformer:
    """The decoder of a `TensorSource`, float32, its tensors parameters."""
    model = build_transformer(config, source, ops or training_ops(), precision=Precision(torch.float32), device=device)  # type: ignore[arg-type]
    for layer in cast(list[DecoderLayer], list(model.layers)):
        weights = layer.weights
        for name in ("attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down", "qkv_bias", "q_norm", "k_norm"):
            tensor = getattr(weights, name)
            if tensor is not None:
                _teach(weights, name, tensor)
                layer.register_parameter(name, getattr(weights, name))
    is_tied = model.embedding is model.head
    for name in ("final_norm", "embedding", "grid_rows", "grid_columns"):
        tensor = getattr(model, name, None)
        if tensor is not None:
            delattr(model, name)
            setattr(model, name, nn.Parameter(tensor.clone()))
    model.head = model.embedding if is_tied else nn.Parameter(cast(Tensor, model.head).clone())
    return model


def _teach(weights: LayerWeights, name: str, tensor: Tensor) -> None:
    """Puts a parameter in a frozen record's place. Only here: serving's weights never change."""
    object.__setattr__(weights, name, nn.Parameter(tensor.clone()))


def hidden(
    model: Transformer, ids_UL: Tensor, grid_start_UL: Tensor | None, document_start_UL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x, residual), both [T, D], of rows of whole documents. document_start: see `kernels.training_ops.Rows`."""
    num_rows, length = ids_UL.shape
    config = model.config
    grid = None if grid_start_UL is None else grid_start_UL.flatten().int()
    batch = whole_documents(num_rows, length, grid, ids_UL.device, document_start_UL)
    kv = [empty_kv(batch, config.num_kv_heads, config.head_width) for _ in config.layers]
    places = torch.arange(length, device=ids_UL.device)
    positions = (places.expand(num_rows, -1) if document_start_UL is None else places - document_start_UL).flatten()
    return cast(tuple[Tensor, Tensor], model(ids_UL.flatten(), positions, kv))


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the config by our name (`expected_shapes`), detached; the fused ones taken apart."""
    config = model.config
    heads = [config.num_heads * config.head_width, config.num_kv_heads * config.head_width, config.num_kv_heads * config.head_width]
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cast(list[DecoderLayer], list(model.layers))):
        weights = layer.weights
        whole = ("attention_norm", "out", "mlp_norm", "down", "q_norm", "k_norm")
        parts: dict[str, Tensor | None] = {name: getattr(weights, name) for name in whole}
        parts |= dict(zip(("q", "k", "v"), torch.split(weights.qkv, heads), strict=True))  # type: ignore[arg-type]
        parts |= dict(zip(("gate", "up"), torch.chunk(weights.gate_up, 2), strict=True))  # type: ignore[arg-type]
        if weights.qkv_bias is not None:
            parts |= dict(zip(("q_bias", "k_bias", "v_bias"), torch.split(weights.qkv_bias, heads), strict=True))
        found |= {f"layers.{index}.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    for name in ("embedding", "final_norm", "head", "grid_rows", "grid_columns"):
        tensor = getattr(model, name, None)
        if tensor is not None and name in expected_shapes(config):
            found[name] = tensor
    return {name: tensor.detach() for name, tensor in found.items()}


@dataclass(frozen=True, slots=True)
class NamedSource:
    """Tensors by our names as a `TensorSource`."""

    tensors: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        return self.tensors[name].clone()
