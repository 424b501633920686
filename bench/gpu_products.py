"""Part of `bench.gpu`: what goes over rows and what multiplies, lines G5 to G8, beside eager and compiled PyTorch, cuBLAS and `_scaled_mm`.

Products are timed as the four matrices of a layer in turn, so that none is found in the L2 cache. No correctness here: that is
`gpu_correctness`. Shape suffixes: M rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_clock import Clock, NotBuiltError
from bench.gpu_models import weights_of
from bench.gpu_score import Line, Step, found, scored, steps_of, timed
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.norm import cases as norm_cases
from kernels.ops import GroupedWeight, Weight, select_ops

# [out, in] of qkv, out, gate and up, down.
LAYERS = {
    "8B": ((6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)),
    "1B": ((3072, 2048), (2048, 2048), (16_384, 2048), (2048, 8192)),
}
TINY = ((64, 64), (64, 64), (96, 64), (64, 96))
ROWS = (1, 4, 16)


def matrices(clock: Clock, model: str) -> list[Tensor]:
    shapes = clock.sized(LAYERS[model], TINY)
    return [torch.randn(shape, dtype=clock.dtype, device=clock.device) / shape[1] ** 0.5 for shape in shapes]


def inputs(clock: Clock, num_rows: int, weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn((num_rows, weight.shape[1]), dtype=clock.dtype, device=clock.device) for weight in weights]


def each(linear: Callable[[Tensor, Any], Tensor], xs: Sequence[Tensor], weights: Sequence[Any]) -> Callable[[], None]:
    def run() -> None:
        for x, weight in zip(xs, weights, strict=True):
            linear(x, weight)

    return run


def dense(clock: Clock, num_rows: int, model: str) -> dict[str, Any]:
    """By whatever the Triton back end takes for few rows; where that is cuBLAS the two agree."""
    weights = matrices(clock, model)
    xs = inputs(clock, num_rows, weights)
    ops = select_ops("triton")
    mine = clock.in_graph_s(each(ops.linear, xs, [ops.pack(weight) for weight in weights]))
    num_bytes = sum(weight.nbytes for weight in weights)
    baselines = timed(clock, {"cuBLAS": lambda: each(F.linear, xs, weights)})
    limit = clock.rates.seconds(num_bytes=num_bytes, flops=2.0 * num_rows * sum(w.numel() for w in weights), kernels=len(weights))
    return scored(limit, mine, baselines, bytes_per_s=num_bytes / mine)


def narrow(clock: Clock, num_rows: int, kind: str, model: str = "8B") -> dict[str, Any]:
    """Weights of fewer bits, of which only the packed bytes move."""
    weights_of(kind)
    weights = matrices(clock, model)
    xs = inputs(clock, num_rows, weights)
    ops = select_ops("triton")
    packed = [ops.pack(quantised(weight, kind)) for weight in weights]
    num_bytes = sum(map(bytes_of, packed))
    mine = clock.in_graph_s(each(ops.linear, xs, packed))
    baselines = timed(clock, {"cuBLAS, bf16": lambda: each(F.linear, xs, weights)})
    return scored(clock.rates.seconds(num_bytes=num_bytes, kernels=len(weights)), mine, baselines, bytes_per_s=num_bytes / mine)


def quantised(weight: Tensor, kind: str) -> Weight:
    """Raises: NotBuiltError."""
    make = found("kernels.linear.reference", "quantize_fp8" if kind == "fp8" else "quantize_grouped")
    made: Weight = make(weight.float()) if kind == "fp8" else make(weight.float(), 4)
    return made


def bytes_of(weight: Weight) -> float:
    """That a product reads."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    if isinstance(weight, GroupedWeight):
        return weight.out_features * weight.in_features * (weight.bits / 8 + 4 / 32)
    return float(weight.out_features * (weight.in_features + 4))


def prompt_fp8(clock: Clock) -> dict[str, Any]:
    """Weights and activations of 8 bits, over many rows; the limit is what `_scaled_mm` reached on a larger square."""
    if not clock.rates.fp8:
        raise NotBuiltError("no rate of fp8 products to compare with")
    weights_of("fp8")
    num_rows = clock.sized(4096, 8)
    weight = matrices(clock, "8B")[2]
    x = inputs(clock, num_rows, [weight])[0]
    ops = select_ops("triton")
    packed = ops.pack(quantised(weight, "fp8"))
    x8, w8, one = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn), torch.ones((), device=clock.device)
    scaled = partial(torch._scaled_mm, x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    mine = clock.in_graph_s(lambda: ops.linear(x, packed))
    flops = 2.0 * num_rows * weight.numel()
    baselines = timed(clock, {"_scaled_mm": lambda: scaled, "cuBLAS, bf16": lambda: partial(F.linear, x, weight)})
    return scored(flops / clock.rates.fp8, mine, baselines, flops_per_s=flops / mine)


def over_rows(clock: Clock, ours: Callable[[], Any], plain: Callable[[], Any], num_bytes: float) -> dict[str, Any]:
    """Beside plain PyTorch, and the same compiled where the case is large: compiling takes seconds, and on a CPU it would say nothing."""
    is_large = clock.is_gpu and num_bytes > 2**24
    baselines = {"eager": lambda: plain} | ({"torch.compile": lambda: torch.compile(plain, dynamic=False)} if is_large else {})
    mine = clock.in_graph_s(ours)
    found_s = timed(clock, baselines, in_graph=False)
    return scored(clock.rates.seconds(num_bytes=num_bytes, kernels=1), mine, found_s, bytes_per_s=num_bytes / mine)


def kv_write(clock: Clock, num_tokens: int) -> dict[str, Any]:
    shape = clock.sized((num_tokens, 32, 8, 128), (5, 2, 1, 16))
    qkv, weights, positions, kv = kv_write_cases.build(
        kv_write_cases.KVWriteCase("", "", *shape, has_norms=True), clock.dtype, clock.device
    )
    ours, plain = (select_ops(name).kv_write for name in ("triton", "reference"))
    return over_rows(clock, lambda: ours(qkv, weights, positions, kv), lambda: plain(qkv, weights, positions, kv), 2 * qkv.nbytes)


def norm(clock: Clock, num_tokens: int) -> dict[str, Any]:
    shape = clock.sized((num_tokens, 4096), (3, 64))
    x, residual, weight, eps = norm_cases.build(norm_cases.NormCase("", "", *shape), clock.dtype, clock.device)
    ours, plain = (select_ops(name).rms_norm for name in ("triton", "reference"))
    return over_rows(clock, lambda: ours(x, residual, weight, eps), lambda: plain(x, residual, weight, eps), 4 * x.nbytes)


def gated(clock: Clock, num_tokens: int) -> dict[str, Any]:
    shape = clock.sized((num_tokens, 14_336), (3, 64))
    gate_up, activation = gated_cases.build(gated_cases.GatedCase("", "", *shape), clock.dtype, clock.device)
    ours, plain = (select_ops(name).gated for name in ("triton", "reference"))
    return over_rows(clock, lambda: ours(gate_up, activation), lambda: plain(gate_up, activation), 1.5 * gate_up.nbytes)


LINES = (
    Line(
        "G5",
        "what goes over rows: q/k norm, rotary and K/V write; add and norm; gated activation",
        "bytes / read bandwidth + a launch",
        0.75,
        0.93,
        {f"{work.__name__} {count} tokens": partial(work, num_tokens=count) for count in (8192, 64) for work in (kv_write, norm, gated)},
    ),
    Line(
        "G6",
        "dense products of a layer, few rows",
        "weights / read bandwidth + a launch each",
        0.80,
        0.93,
        {f"{model}, {num_rows} rows": partial(dense, num_rows=num_rows, model=model) for num_rows in ROWS for model in LAYERS},
    ),
    Line(
        "G7",
        "products of a layer by int4 and fp8 weights, few rows",
        "packed weights / read bandwidth + a launch each",
        0.55,
        0.85,
        {f"{kind}, {num_rows} rows": partial(narrow, num_rows=num_rows, kind=kind) for num_rows in ROWS for kind in ("int4", "fp8")},
    ),
    Line("G8", "fp8 by fp8, 4,096 rows, 28,672 x 4,096", "operations / measured fp8 rate", 0.60, 0.85, {"4096 rows": prompt_fp8}),
)


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES)
