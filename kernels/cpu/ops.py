"""The CPU back end: the compiled kernels where they apply, plain PyTorch for the rest.

No formula here, only pointers: which function takes which tensors. Called through `kernels.ops.select_ops("cpu")`.
Shape suffixes: T tokens, D model width, N query heads, H head width, R sampled rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import addressof, c_void_p
from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels.compose import FineOps, compose
from kernels.cpu.library import KV, Batch, Layer, Matrix, Spec, load
from kernels.cpu.packed import linear_floats, pack_floats, pack_groups, pack_strips, rows_of
from kernels.cpu.structs import DrawRows, batch_struct, key_of, layer_struct, pointer, pool_struct, spec_struct, strips_of, tensors_of
from kernels.experts.reference import Parts, by_expert
from kernels.linear import reference as plain_linear
from kernels.ops import (
    Activation,
    AttentionSpec,
    ExpertWeights,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    LayerWeights,
    Ops,
    PagedKV,
    Sampled,
    SampleRows,
    Stack,
    Weight,
)
from kernels.reference_ops import REFERENCE_FINE_OPS, reference_ops
from kernels.sample.reference import penalised, with_logprobs

ISA_VARIABLE = "BRAID_CPU_ISA"
SPIN_US = 50
# Between two operations of a step lie a few microseconds of Python, between two steps some hundred: spinning covers the former.
_LANES = 16
"""Head width and feed-forward width must be multiples of this for the compiled attention and the fused feed-forward block."""
_MOST_POOLS = 1024
_NEEDS_LOGITS = 3


def cpu_ops(isa: str | None = None, num_threads: int | None = None, *, spin_us: int = SPIN_US) -> Ops:
    """The table of the CPU back end, with threads and memory of its own.

    isa: "avx512", "avx2", "neon", "generic" or "" for the best this machine runs; None reads BRAID_CPU_ISA. num_threads: None takes
    PyTorch's number. spin_us: how long a thread without work looks for some before it sleeps. Raises: ValueError when the machine or the
    library can't run the instruction set asked for.
    """
    library = load()
    if library is None:
        fine = replace(REFERENCE_FINE_OPS, linear=_linear_without_library, experts=_experts_without_library, pack=_pack_without_library)
        return compose("cpu", fine)
    name = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    native = _Native(library, name, num_threads or torch.get_num_threads(), spin_us)
    fine = FineOps(**{field.name: getattr(native, field.name) for field in fields(FineOps)})
    native.composed = compose("cpu", fine)
    stack = Stack((native.qkv, native.attend, native.out_mlp), native.layers)
    return replace(native.composed, qkv=native.qkv, out_mlp=native.out_mlp, draw=native.draw, stack=stack)


def _pack_without_library(weight: Weight) -> Weight:
    if isinstance(weight, GroupedWeight):
        return plain_linear.dense_of(weight)
    return pack_floats(weight) if isinstance(weight, Int8Weight) else weight


def _linear_without_library(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Int8Weight) and isinstance(weight.packed, tuple):
        return linear_floats(x, weight, weight.packed)
    return plain_linear.linear(x, weight)


def _experts_without_library(x: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    return by_expert(x, weights, activation, Parts(_linear_without_library, REFERENCE_FINE_OPS.gated, rows_of))


def _is_native(x: Tensor) -> bool:
    return x.dtype is torch.float32 and not (x.requires_grad and torch.is_grad_enabled())


class _Native:
    """One context of the library, and the C structs of the layers, pools and batches it has met. Not for two threads at once."""

    def __init__(self, library: ctypes.CDLL, isa: str, num_threads: int, spin_us: int) -> None:
        self._library = library
        self._context = library.braid_create(isa.encode(), num_threads, spin_us)
        if self._context is None:
            raise ValueError(
                f"this machine can't run the CPU kernels {isa!r}; there are avx512, avx2, neon and generic, where the processor has them"
            )
        weakref.finalize(self, library.braid_destroy, self._context)
        self.composed = reference_ops()
        self._layers: dict[int, tuple[int, bool, tuple[LayerWeights, Layer]]] = {}
        self._stacks: dict[tuple[int, ...], tuple[ctypes.Array[c_void_p], ctypes.Array[Spec]]] = {}
        self._pools: dict[tuple[int, ...], tuple[tuple[Tensor | None, ...], KV | None]] = {}
        self._batches: dict[tuple[int, ...], tuple[tuple[Tensor | None, ...], Batch]] = {}  # of one step, one for each table
        self._query_start: Tensor | None = None  # of that step
        self._parts = Parts(self.linear, self.gated, self._rows_of)
        self._rows: dict[tuple[int, int, int], tuple[Weight, Weight]] = {}  # of experts, with the matrix that they are rows of

    # --- coarse -------------------------------------------------------------------------------------------------------------------

    def qkv(self, x: Tensor, residual: Tensor | None, weights: LayerWeights, positions: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor]:
        layer, is_fused = self._layer(weights)
        places = self._places(kv)
        if places is None or not is_fused or not _is_native(x):
            return self.composed.qkv(x, residual, weights, positions, kv)
        x, positions = x.contiguous(), positions.contiguous()
        # Without a residual the kernel copies x: later layers add to the sum in place, and that must not reach the caller's tensor.
        total = torch.empty_like(x) if residual is None else residual.contiguous()
        spec = weights.spec
        q = x.new_empty((len(x), spec.num_heads, spec.head_width))
        self._check(
            self._library.braid_qkv(
                self._context, layer, *places, x.data_ptr(), total.data_ptr(), residual is not None,
                positions.data_ptr(), q.data_ptr(), len(x),
            )
        )  # fmt: skip
        return q, total

    def out_mlp(self, y: Tensor, residual: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        layer, is_fused = self._layer(weights)
        if not (is_fused and weights.experts is None and _is_native(y)):
            return self.composed.out_mlp(y, residual, weights)
        y, residual = y.contiguous(), residual.contiguous()
        x = torch.empty_like(residual)
        self._check(self._library.braid_out_mlp(self._context, layer, y.data_ptr(), residual.data_ptr(), x.data_ptr(), len(y)))
        return x, residual

    def layers(self, x: Tensor, weights: Sequence[LayerWeights], positions: Tensor, kv: Sequence[PagedKV]) -> tuple[Tensor, Tensor] | None:
        if not weights or len(weights) != len(kv):
            raise ValueError(f"{len(weights)} layers and {len(kv)} pools: there must be one for each, and at least one")
        stack = self._stack(weights)
        self._trim(kv[0])
        places = [place for place in map(self._addresses, kv) if place is not None]
        if stack is None or len(places) < len(kv) or not _is_native(x):
            return None
        x, positions = x.contiguous().clone(), positions.contiguous()
        residual = torch.empty_like(x)
        pools, batches = (Pointers(*addresses) for Pointers in (c_void_p * len(places),) for addresses in zip(*places, strict=True))
        self._check(
            self._library.braid_layers(
                self._context, len(places), *stack, pools, batches, x.data_ptr(), residual.data_ptr(), positions.data_ptr(), len(x)
            )
        )
        return x, residual

    def draw(self, x: Tensor, head: Weight, rows: SampleRows) -> Sampled:
        strips = strips_of(head)
        if strips is None or rows.counts is not None or rows.logprobs or not _is_native(x):
            return self.composed.draw(x, head, rows)
        x, draw = x.contiguous(), DrawRows(rows, rows.mask)
        ids = torch.empty(len(x), dtype=torch.int64)
        status = self._library.braid_draw(
            self._context, addressof(strips.matrix), x.data_ptr(), addressof(draw.struct), ids.data_ptr(), len(x)
        )
        if status == _NEEDS_LOGITS:
            return self.composed.draw(x, head, rows)
        self._check(status)
        return Sampled(ids)

    # --- fine ---------------------------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
        places = self._places(kv)
        if places is None or not _is_native(q) or q.shape[2] % _LANES:
            return REFERENCE_FINE_OPS.attend(q, kv, spec)
        q = q.contiguous()
        num_tokens, num_heads, width = q.shape
        y = q.new_empty((num_tokens, num_heads * width))
        struct = spec_struct(spec)
        self._check(
            self._library.braid_attend(
                self._context, *places, addressof(struct), q.data_ptr(), y.data_ptr(), num_heads, num_tokens,
            )
        )  # fmt: skip
        return y

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        strips = strips_of(weight)
        if strips is None:
            return plain_linear.linear(x, weight)
        rows = x.float().contiguous()
        out = rows.new_empty((len(x), strips.matrix.out_features))
        self._check(self._library.braid_linear(self._context, addressof(strips.matrix), rows.data_ptr(), out.data_ptr(), len(x)))
        return out.to(x.dtype)

    def embed(self, ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        strips = strips_of(weight)
        if strips is None:
            return plain_linear.embed(ids, weight, dtype)
        ids = ids.contiguous()
        out = torch.empty((len(ids), strips.matrix.in_features), dtype=torch.float32)
        status = self._library.braid_embed(self._context, addressof(strips.matrix), ids.data_ptr(), out.data_ptr(), len(ids))
        if status == 2:
            raise IndexError(f"a token id lies outside the vocabulary of {strips.matrix.out_features}")
        self._check(status)
        return out.to(dtype)

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not (_is_native(x) and _is_native(weight)):
            return REFERENCE_FINE_OPS.rms_norm(x, residual, weight, eps)
        x, weight = x.contiguous(), weight.contiguous()
        normed = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        residual = None if residual is None else residual.contiguous()
        width = x.shape[-1]
        self._check(
            self._library.braid_rms_norm(
                self._context, x.data_ptr(), pointer(residual), weight.data_ptr(), eps, normed.data_ptr(), total.data_ptr(),
                x.numel() // width, width,
            )
        )  # fmt: skip
        return normed, total

    def kv_write(self, qkv: Tensor, weights: LayerWeights, positions: Tensor, kv: PagedKV) -> Tensor:
        places = self._places(kv)
        if places is None or not _is_native(qkv) or weights.attention_norm.dtype is not torch.float32:
            return REFERENCE_FINE_OPS.kv_write(qkv, weights, positions, kv)
        qkv, positions = qkv.contiguous(), positions.contiguous()
        spec = weights.spec
        layer, _ = self._layer(weights)
        q = qkv.new_empty((len(qkv), spec.num_heads, spec.head_width))
        self._check(
            self._library.braid_kv_write(self._context, layer, *places, qkv.data_ptr(), positions.data_ptr(), q.data_ptr(), len(qkv))
        )
        return q

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        if not _is_native(gate_up) or activation not in ("silu", "gelu_tanh"):
            return REFERENCE_FINE_OPS.gated(gate_up, activation)
        gate_up = gate_up.contiguous()
        num_rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty((num_rows, width))
        self._check(
            self._library.braid_gated(self._context, gate_up.data_ptr(), out.data_ptr(), num_rows, width, activation == "gelu_tanh")
        )
        return out

    def experts(self, x: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
        return by_expert(x, weights, activation, self._parts)

    def sample(self, logits: Tensor, rows: SampleRows) -> Sampled:
        scores = (penalised(logits, rows) if rows.counts is not None else logits.float()).contiguous()
        draw = DrawRows(rows, rows.mask if rows.counts is None else None)
        ids = torch.empty(len(scores), dtype=torch.int64)
        self._check(
            self._library.braid_sample(
                self._context, scores.data_ptr(), addressof(draw.struct), ids.data_ptr(), len(scores), scores.shape[1]
            )
        )
        return with_logprobs(ids, logits, rows)

    def pack(self, weight: Weight) -> Weight:
        if isinstance(weight, Tensor | Fp8Weight) or weight.packed is not None:
            return weight
        return pack_groups(weight) if isinstance(weight, GroupedWeight) else pack_strips(weight)

    # --- structs ------------------------------------------------------------------------------------------------------------------

    def _check(self, status: int) -> None:
        if status:
            raise MemoryError("the CPU kernels have no memory left for their intermediate results")

    def _layer(self, weights: LayerWeights) -> tuple[int, bool]:
        """The address of the layer's struct, kept as long as this back end, and whether its products can be fused."""
        known = self._layers.get(id(weights))
        if known is None:
            strips = [strips_of(weight) for weight in (weights.qkv, weights.out, weights.gate_up, weights.down)]
            matrices = [one.matrix for one in strips if one is not None]
            is_fused = len(matrices) == 4 and matrices[3].in_features % _LANES == 0 and weights.attention_norm.dtype is torch.float32
            struct = layer_struct(weights, matrices if is_fused else [Matrix()] * 4)
            known = self._layers[id(weights)] = (addressof(struct), is_fused, (weights, struct))
        return known[0], known[1]

    def _rows_of(self, weight: Weight, start: int, end: int) -> Weight:
        key = (id(weight), start, end)
        if key not in self._rows:
            self._rows[key] = weight, rows_of(weight, start, end)
        return self._rows[key][1]

    def _stack(self, weights: Sequence[LayerWeights]) -> tuple[ctypes.Array[c_void_p], ctypes.Array[Spec]] | None:
        """Addresses of all layers' structs, and their attention; None where some layer can't be fused."""
        key = tuple(map(id, weights))
        known = self._stacks.get(key)
        if known is None:
            layers = [self._layer(one) for one in weights]
            shapes = {(one.spec.num_heads, one.spec.head_width, len(one.attention_norm)) for one in weights}
            has_experts = any(one.experts is not None for one in weights)
            if has_experts or len(shapes) > 1 or weights[0].spec.head_width % _LANES or not all(is_fused for _, is_fused in layers):
                return None
            addresses = (c_void_p * len(layers))(*(address for address, _ in layers))
            known = self._stacks[key] = addresses, (Spec * len(layers))(*(spec_struct(one.spec.attention) for one in weights))
        return known

    def _places(self, kv: PagedKV) -> tuple[int, int] | None:
        """Addresses of the structs of the pool and of the step's batch; None for a pool that the kernels can't read."""
        self._trim(kv)
        return self._addresses(kv)

    def _trim(self, kv: PagedKV) -> None:
        """Forgets structs of the past before those of a step are asked for: none that is kept is ever replaced, so an address holds."""
        if len(self._pools) >= _MOST_POOLS:
            self._pools.clear()
        if kv.batch.query_start is not self._query_start:
            self._query_start = kv.batch.query_start
            self._batches.clear()

    def _addresses(self, kv: PagedKV) -> tuple[int, int] | None:
        ours = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
        pool = self._pools.get(key_of(ours))
        if pool is None:
            pool = self._pools[key_of(ours)] = (ours, pool_struct(kv))
        if pool[1] is None:
            return None
        tensors = tensors_of(kv.batch)
        batch = self._batches.get(key_of(tensors))
        if batch is None:
            batch = self._batches[key_of(tensors)] = (tensors, batch_struct(kv.batch))
        return addressof(pool[1]), addressof(batch[1])
