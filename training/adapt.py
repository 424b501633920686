"""What can be put into a decoder that is taught: low-rank adapters beside its matrices, and attention that sees both directions.

Both are fine ops put in the training back end's place, so the model's own code stays as it is. Called by the language stages, whose
decoder may begin as somebody else's, and by fine-tuning.
Shape suffixes: U documents, L places of a document, T = U * L, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from kernels.compose import FineOps, compose
from kernels.ops import AttentionSpec, Ops, PagedKV, Weight
from kernels.training_ops import training_ops
from service.model.layers import DecoderLayer
from service.model.transformer import Transformer
from training.tokens import SPECIALS

MATRICES = ("qkv", "out", "gate_up", "down")


class Adapters(nn.Module):
    """To every fused matrix W [out, in] of the layers from first_layer on a product alpha / rank * B A is added, A [rank, in] and
    B [out, rank], which is 0 at first. Source: Hu et al. 2021 (LoRA), section 4."""

    def __init__(self, model: Transformer, rank: int, alpha: float, first_layer: int) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.pairs = nn.ParameterDict()
        self.of: dict[int, tuple[Tensor, nn.Parameter, nn.Parameter]] = {}  # by the identity of the matrix, which the model keeps
        for index, layer in enumerate(cast(list[DecoderLayer], list(model.layers))):
            for name in MATRICES if index >= first_layer else ():
                weight = cast(Tensor, getattr(layer.weights, name))
                down = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
                up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
                nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                self.pairs[f"{index}_{name}_a"], self.pairs[f"{index}_{name}_b"] = down, up
                self.of[id(weight)] = (weight, down, up)

    def linear(self, x: Tensor, weight: Weight, product: Tensor) -> Tensor:
        """product is x W^T; with the adapter's own product where the matrix has one."""
        found = self.of.get(id(weight))
        return product if found is None else product + (x @ found[1].T) @ found[2].T * self.scale

    @torch.no_grad()
    def merge(self) -> None:
        """Adds what was learned to the matrices themselves, after which the adapters are 0 again. Mutates: the model's weights."""
        for weight, down, up in self.of.values():
            weight += up @ down * self.scale
            up.zero_()


def learn_only_codes(model: Transformer) -> None:
    """Leaves everything as it is but what a picture adds: the rows of codes and of our special tokens, and the grid's vectors.

    Mutates: which parameters want gradients, and a hook on the embedding's (no decay may be put on it: the rows of text would shrink).
    """
    if model.config.pictures is None:
        raise ValueError("a decoder without pictures has nothing to learn of them")
    model.requires_grad_(False)
    ids = torch.arange(model.config.vocab_size)
    is_learned = (ids < len(SPECIALS)) | (ids >= model.config.pictures.first_code)
    for table in dict.fromkeys(cast(nn.Parameter, each) for each in (model.embedding, model.head)):
        table.requires_grad_(True)
        table.register_hook(partial(torch.mul, is_learned[:, None].to(table)))  # type: ignore[no-untyped-call]
    for grid in (model.grid_rows, model.grid_columns):
        cast(nn.Parameter, grid).requires_grad_(True)


@dataclass(slots=True)
class BothWays:
    """Attention in which a place sees every place of its document, in layers with a window those less than it away and the sink.

    lengths int64 [U]: of the documents of the batch that comes next, without their padding, which nothing may see.
    """

    lengths: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def attend(self, q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
        """y [T, N * H]. Source: Li et al. 2023 (label-supervised Llama), which drops the causal mask of a decoder that classifies."""
        k, v = kv.keys, kv.values  # [U, K, L, H]
        num_documents, num_kv_heads, length, width = k.shape
        q = q_TNH.view(num_documents, length, num_kv_heads, -1, width).permute(0, 2, 3, 1, 4)  # [U, K, G, L, H]
        scores = ((q * spec.scale) @ k[:, :, None].transpose(-1, -2)).float()
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.masked_fill(~self._seen(length, spec)[:, None, None], float("-inf"))
        y = torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, :, None]
        return y.permute(0, 3, 1, 2, 4).reshape(len(q_TNH), -1)

    def _seen(self, length: int, spec: AttentionSpec) -> Tensor:
        """bool [U, L, L]. A padded place sees its document too: a row that saw nothing would have no softmax."""
        at = torch.arange(length, device=self.lengths.device)
        seen = (at < self.lengths[:, None])[:, None].expand(-1, length, -1)
        if spec.window is None:
            return seen
        near = ((at[:, None] - at).abs() < spec.window) | (at < spec.sink)
        is_padding = (at >= self.lengths[:, None])[:, :, None]
        return seen & (near | is_padding)


def adapted_ops(adapters: Sequence[Adapters], both_ways: BothWays | None = None) -> Ops:
    """The training back end with adapters' products and, if given, attention in both directions. adapters: a list that is filled once the
    model is there, because adapters are made from its weights."""
    base = training_ops()

    def linear(x: Tensor, weight: Weight) -> Tensor:
        product = base.linear(x, weight)
        for each in adapters:
            product = each.linear(x, weight, product)
        return product

    attend = base.attend if both_ways is None else both_ways.attend
    return compose(
        "fine-tuning", FineOps(attend, linear, base.embed, base.rms_norm, base.kv_write, base.gated, base.experts, base.sample, base.pack)
    )
