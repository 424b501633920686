"""The decoder: embedding, layers, final norm, head. One class for every family; what differs is in `ModelConfig` and in the weights.

Serving calls it with paged K/V on flat tokens; it owns no cache and knows no request. Used by the runner and by training. Long, because
what the class holds and the builder that reads, turns and packs it are one agreement.
Shape suffixes: T tokens, R rows to sample, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from kernels.linear.reference import quantize_fp8, quantize_grouped, quantize_int8
from kernels.ops import (
    GROUP,
    Activation,
    AttentionSpec,
    ExpertWeights,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    LayerSpec,
    LayerWeights,
    Neighbourhood,
    Ops,
    PagedKV,
    SharedExpert,
    Weight,
)
from service.errors import WeightsError
from service.model.config import Experts, LayerAttention, ModelConfig
from service.model.layers import DecoderLayer, rotary_table
from service.model.prepared import Shelf
from service.model.rotation import RotatedSource, TensorSource
from service.model.weights import WeightSource

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound=Weight)


class Transformer(nn.Module):
    """layers, final_norm [D], embedding and head [V, D] (the same object when tied and dense). grid: the vectors [rows, D] and [columns, D]
    that tell a code's place, None without pictures. basis float32 [D, D]: what brings the last norm's output back where the weights were
    rotated, None where they were not."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        tables: tuple[Weight, Weight],
        basis: Tensor | None = None,
        grid: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.config = config
        self.ops = ops
        self.layers = nn.ModuleList(DecoderLayer(weights) for weights in layers)
        self.weights = tuple(layers)
        self.final_norm = final_norm
        self.basis = basis
        self.embedding, self.head = tables
        self.grid_rows: Tensor | None = None if grid is None else grid[0]
        self.grid_columns: Tensor | None = None if grid is None else grid[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.final_norm.dtype

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a decode step of one sequence reads: every matrix once, but of experts those of one token; of the embedding
        only some rows, unless it is the head too."""
        return self._bytes_of_layers(is_held=False) + _bytes_of(self.head)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights in memory."""
        rest = sum(_bytes_of(x) for x in (self.basis, self.grid_rows, self.grid_columns) if x is not None)
        tables = _bytes_of(self.head) + (0 if self.embedding is self.head else _bytes_of(self.embedding))
        return self._bytes_of_layers(is_held=True) + rest + tables

    def _bytes_of_layers(self, *, is_held: bool) -> int:
        total = 0
        for layer in self.weights:
            blocks = _bytes_of(layer.gate_up) + _bytes_of(layer.down)
            total += _bytes_of(layer.qkv) + _bytes_of(layer.out)
            if (experts := layer.experts) is not None:
                total += _bytes_of(experts.router)
                total += 0 if experts.shared is None else _bytes_of(experts.shared.gate_up) + _bytes_of(experts.shared.down)
                blocks = blocks if is_held else blocks * experts.top_k // experts.num_experts
            total += blocks
        return total

    def forward(self, ids_T: Tensor, positions_T: Tensor, kv: Sequence[PagedKV]) -> tuple[Tensor, Tensor]:
        """All layers over flat tokens. kv: one per layer. Returns (x [T, D], residual [T, D]), whose sum the head's norm takes.

        Mutates: the keys and values of every layer, at this step's slots.
        """
        x = self._with_places(self._embedded(ids_T), positions_T, kv[0].batch.grid_start)
        return self.ops.layers(x, self.weights, positions_T, kv)

    def _embedded(self, ids_T: Tensor) -> Tensor:
        x_TD = self.ops.embed(ids_T, self.embedding, self.dtype)
        if self.config.embedding_scale == 1.0:
            return x_TD
        # In the activations' own dtype, as these models were trained: 25.25 and not 25.298 in bfloat16.
        return x_TD * x_TD.new_full((), self.config.embedding_scale)

    def _with_places(self, x_TD: Tensor, positions_T: Tensor, grid_start_T: Tensor | None) -> Tensor:
        """Adds to every code's embedding the vectors of its row and its column."""
        if self.config.pictures is None or grid_start_T is None:
            return x_TD
        is_code = grid_start_T >= 0
        code = torch.where(is_code, positions_T - grid_start_T, 0)
        columns = self.config.pictures.columns
        place = self.ops.embed(code // columns, self.grid_rows, self.dtype) + self.ops.embed(code % columns, self.grid_columns, self.dtype)
        return x_TD + torch.where(is_code[:, None], place, 0)

    def logits(self, x_TD: Tensor, residual_TD: Tensor, rows_R: Tensor) -> Tensor:
        """float32 [R, V] for the chosen rows."""
        return self.project(self.hidden(x_TD, residual_TD, rows_R))

    def hidden(self, x_TD: Tensor, residual_TD: Tensor, rows_R: Tensor) -> Tensor:
        """[R, D]: the final hidden states of the chosen rows, after the last norm, as the model computes: see `restore`."""
        return self.ops.rms_norm(x_TD[rows_R], residual_TD[rows_R], self.final_norm, self.config.norm_eps)[0]

    def project(self, hidden_RD: Tensor) -> Tensor:
        """float32 [R, V]: logits."""
        logits = self.ops.linear(hidden_RD, self.head).float()
        cap = self.config.logit_softcap
        return logits if not cap else torch.tanh(logits / cap) * cap

    def restore(self, hidden_RD: Tensor) -> Tensor:
        """Final hidden states, or sums of them, in the basis that the model was trained in, float32 [R, D]."""
        return hidden_RD.float() if self.basis is None else hidden_RD.float() @ self.basis


def _bytes_of(weight: Weight) -> int:
    if isinstance(weight, GroupedWeight):
        return weight.out_features * weight.in_features // GROUP * (weight.bits * GROUP // 8 + 4)  # and two float16 per group
    if isinstance(weight, Int8Weight | Fp8Weight):
        return weight.out_features * (weight.in_features + 4)  # and a float32 scale per row
    return weight.numel() * weight.element_size()


def layer_spec(config: ModelConfig, attention: LayerAttention) -> LayerSpec:
    near = None
    if attention.radius is not None and config.pictures is not None:
        near = Neighbourhood(config.pictures.columns, *attention.radius)
    spec = AttentionSpec(config.attention_scale, attention.window, attention.sink, attention.softcap, near)
    activation: Activation = "gelu_tanh" if config.activation == "gelu_tanh" else "silu"
    return LayerSpec(config.num_heads, config.num_kv_heads, config.head_width, spec, config.norm_eps, activation)


@dataclass(frozen=True, slots=True)
class Precision:
    """dtype: of activations and dense weights. weights int8: matrices are rotated and quantised per output row, all but the embedding.
    int4: as numbers in groups, those of a GGUF file that has all of them so as they are. Others are rotated and get 4 bits, but 8 in q, k,
    v and `down`, whose loss is felt most: SmolLM2's bits per byte rise by 2.7 % (docs/models.md), with 4 bits in all by 7.
    With norms behind attention and feed-forward block nothing can be rotated; there int8 too means numbers in groups (see _Builder).
    fp8: the layers' matrices are 8-bit floats with a scale per output row. Such a number's error is a share of itself, so a large one
    costs the others nothing, and nothing is rotated. Embedding and head are dense, one table where they are tied: with a head of 8-bit
    floats SmolLM2 diverges from float32 by 0.024 nats instead of 0.012."""

    dtype: torch.dtype
    weights: Literal["dense", "int8", "int4", "fp8"] = "dense"


class _Builder:
    """Reads one model's weights tensor by tensor, so that the whole dense model is never in memory beside the packed one.

    Between a post norm's weights and the residual stream there is no matrix that a rotation could be folded into. Scales for every 32
    numbers keep outliers from costing the others precision too: Gemma 3 270M diverges from float32 by 0.003 nats in groups of 8 bits, by
    0.030 with a scale a row."""

    def __init__(
        self, config: ModelConfig, source: TensorSource | Shelf, ops: Ops, precision: Precision, device: torch.device | str
    ) -> None:
        self.config = config
        self.shelf = source if isinstance(source, Shelf) else None
        if not isinstance(source, Shelf):
            self._read(source, precision)
        elif not source.is_filled:
            self._read(source.open_source(), precision)
        else:
            self.is_rotated = "basis" in source
            self.is_grouped = not self.is_rotated
        self.ops = ops
        self.precision = precision
        self.device = device
        kinds = {(attention.rope_base, attention.rope_scaling): attention for attention in config.layers}
        self.rotary = {kind: rotary_table(config.head_width, attention, config.max_context, device) for kind, attention in kinds.items()}

    def _read(self, source: TensorSource, precision: Precision) -> None:
        is_file = isinstance(source, WeightSource)
        has_groups = precision.weights == "int4" and is_file and cast(WeightSource, source).layers_have_groups(self.config)
        is_plain = precision.weights in ("dense", "fp8") or has_groups or self.config.has_post_norms
        self.is_grouped = has_groups or (precision.weights in ("int8", "int4") and self.config.has_post_norms)
        self.groups = cast(WeightSource, source) if self.is_grouped and is_file else None
        self.source = source if is_plain else RotatedSource(source, self.config)
        self.is_rotated = isinstance(self.source, RotatedSource)

    def _kept(self, name: str, make: Callable[[], W]) -> W:
        """What an earlier start has made, else what this one makes."""
        return make() if self.shelf is None else cast(W, self.shelf.get(name, make))

    def vector(self, name: str) -> Tensor:
        return self._kept(name, lambda: self.source.get(name).to(device=self.device, dtype=self.precision.dtype).contiguous())

    def matrix(self, *names: str, bits: int = 4, count: int = 1) -> Weight:
        """bits: of each number where numbers in groups have to be made. count: of experts that the matrices hold."""
        return self._kept("+".join(names), lambda: self._matrix(names, bits, count))

    def _matrix(self, names: Sequence[str], bits: int, count: int) -> Weight:
        if self.groups is not None and all(map(self.groups.bits_of, names)):
            return self.ops.pack(_joined([self.groups.get_grouped(name) for name in names], count))
        dense = _below([self.source.get(name) for name in names], count)
        if self.precision.weights == "dense":
            return self.ops.pack(dense.to(device=self.device, dtype=self.precision.dtype).contiguous())
        dense = dense.to(device=self.device, dtype=torch.float32)
        if self.precision.weights == "fp8":
            return self.ops.pack(quantize_fp8(dense))
        if (self.precision.weights == "int4" or self.is_grouped) and dense.shape[1] % GROUP == 0:
            return self.ops.pack(quantize_grouped(dense, bits if self.precision.weights == "int4" else 8))
        return self.ops.pack(quantize_int8(dense))

    def _dense(self, name: str) -> Weight:
        return self._kept(
            name, lambda: self.ops.pack(self.source.get(name).to(device=self.device, dtype=self.precision.dtype).contiguous())
        )

    def tables(self) -> tuple[Weight, Weight]:
        """Embedding and head. A step reads only some rows of the embedding, so beside rotated weights it stays dense, in bfloat16. Of a
        head the file's numbers are kept or 8 bits: it decides between ids that are close. Beside fp8, whose numbers have 4 digits, both
        stay dense."""
        if self.precision.weights == "fp8":
            embedding = self._dense("embedding")
            return embedding, embedding if self.config.has_tied_head else self._dense("head")
        if self.precision.weights != "dense" and not self.is_grouped:
            is_one = self.config.has_tied_head and not self.is_rotated
            table = self._kept("table", lambda: self.source.get("embedding").to(device=self.device, dtype=torch.bfloat16))
            return table, self.matrix("embedding" if is_one else "head", bits=8)
        embedding = self.matrix("embedding", bits=8)
        return embedding, embedding if self.config.has_tied_head else self.matrix("head", bits=8)

    def grid(self) -> tuple[Tensor, Tensor] | None:
        return (self.vector("grid_rows"), self.vector("grid_columns")) if self.config.pictures is not None else None

    def basis(self) -> Tensor | None:
        return self._kept("basis", lambda: cast(RotatedSource, self.source).basis().to(self.device)) if self.is_rotated else None

    def layer(self, index: int) -> LayerWeights:
        config, at = self.config, f"layers.{index}."
        attention, sparse = config.layers[index], config.experts_of(index)
        experts = None if sparse is None else self.experts(at, sparse)
        return LayerWeights(
            spec=layer_spec(config, attention),
            attention_norm=self.vector(at + "attention_norm"),
            qkv=self.matrix(at + "q", at + "k", at + "v", bits=8),
            out=self.matrix(at + "out"),
            mlp_norm=self.vector(at + "mlp_norm"),
            gate_up=self.matrix(at + "gate", at + "up") if experts is None else experts.gate_up,
            down=self.matrix(at + "down", bits=8) if experts is None else experts.down,
            rotary=self.rotary[(attention.rope_base, attention.rope_scaling)],
            qkv_bias=torch.cat([self.vector(at + name) for name in ("q_bias", "k_bias", "v_bias")]) if config.has_qkv_bias else None,
            q_norm=self.vector(at + "q_norm") if config.has_qk_norm else None,
            k_norm=self.vector(at + "k_norm") if config.has_qk_norm else None,
            out_norm=self.vector(at + "out_norm") if config.has_post_norms else None,
            down_norm=self.vector(at + "down_norm") if config.has_post_norms else None,
            experts=experts,
        )

    def experts(self, at: str, experts: Experts) -> ExpertWeights:
        """Raises: WeightsError where the CPU's packed matrices can't be taken apart into those of experts again."""
        if self.precision.weights != "dense" and torch.device(self.device).type == "cpu" and (experts.width % 8 or self.config.width % 16):
            raise WeightsError(
                f"the model has experts of width {experts.width} and is {self.config.width} wide; on a CPU those in int8 and int4 must be "
                "a multiple of 8 wide and the model one of 16; use float32 or bfloat16"
            )
        router, shared = self.vector(at + "router"), None
        if experts.shared_width:
            router = torch.cat([router, self.vector(at + "shared_router")])
            shared = SharedExpert(self.matrix(at + "shared_gate", at + "shared_up"), self.matrix(at + "shared_down", bits=8))
        return ExpertWeights(
            router=router,
            gate_up=self.matrix(at + "gate", at + "up", count=experts.count),
            down=self.matrix(at + "down", bits=8),
            num_experts=experts.count,
            top_k=experts.top_k,
            is_normalised=experts.is_normalised,
            shared=shared,
        )


def _below(parts: Sequence[Tensor], count: int) -> Tensor:
    """One matrix below the other, [..., in]; of `count` experts the first one's rows of all, then the next one's."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(count, -1, part.shape[-1]) for part in parts], dim=1).flatten(0, 1)


def _joined(parts: Sequence[GroupedWeight], count: int) -> GroupedWeight:
    """As `_below`. Numbers of 4 bits beside some of 8 become such themselves: what they stand for is the same."""
    out_features = sum(part.out_features for part in parts)
    tensors = (_below([getattr(part, name) for part in parts], count) for name in ("values", "scales", "offsets"))
    return GroupedWeight(out_features, parts[0].in_features, max(part.bits for part in parts), *tensors)


def build_transformer(
    config: ModelConfig,
    source: TensorSource | Shelf,
    ops: Ops,
    *,
    precision: Precision,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Transformer:
    """Reads, rotates, quantises and packs on all cores, one layer a core; takes what a `Shelf` has. Raises: what `source.get` raises."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # dequantising runs on one core; whole layers side by side keep all of them busy
    try:
        with torch.inference_mode(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            builder = _Builder(config, source, ops, precision, device)
            tables = pool.submit(_inferring(builder.tables))
            layers = []
            for weights in pool.map(_inferring(builder.layer), range(len(config.layers))):
                layers.append(weights)
                progress(len(layers) / (len(config.layers) + 1))
            final_norm, basis, grid = builder.vector("final_norm"), builder.basis(), builder.grid()
            model = Transformer(config, ops, layers, final_norm, tables.result(), basis, grid)
    finally:
        torch.set_num_threads(threads)
    progress(1.0)
    return model


def _inferring(work: Callable[P, R]) -> Callable[P, R]:
    """The same call without autograd, which torch switches off per thread."""

    def run(*arguments: P.args, **keywords: P.kwargs) -> R:
        with torch.inference_mode():
            return work(*arguments, **keywords)

    return run
