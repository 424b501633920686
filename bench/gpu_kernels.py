"""Part of `bench.gpu`: the kernel table. Every case marked "bench", in bfloat16: seconds, bytes or operations a second, share of the limit.

Each kernel is timed inside a CUDA graph, beside plain PyTorch for the same case. In a tiny run the first tiny case stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu_clock import Clock
from bench.gpu_products import bytes_of
from bench.gpu_score import Step
from kernels.attention import cases as attention_cases
from kernels.experts import cases as experts_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.ops import select_ops
from kernels.sample import cases as sample_cases


def steps(clock: Clock) -> list[Step]:
    tables: list[tuple[str, Any, Callable[..., dict[str, Any]]]] = [
        ("attention", attention_cases.CASES, attention),
        ("kv_write", kv_write_cases.CASES, kv_write),
        ("norm", norm_cases.CASES, norm),
        ("gated", gated_cases.CASES, gated),
        ("linear", linear_cases.CASES, linear),
        ("sample", sample_cases.CASES, sample),
        ("experts", experts_cases.CASES, experts),
        ("linear", linear_cases.FLOAT_CASES, float_product),
    ]
    return [
        ({"case": f"{kernel}/{case.name}"}, partial(work, clock, case))
        for kernel, cases, work in tables
        for case in clock.sized([case for case in cases if case.size == "bench"], cases[:1])
    ]


def row(clock: Clock, ours: Callable[[], Any], plain: Callable[[], Any] | None, *, moved: float, flops: float = 0.0) -> dict[str, Any]:
    """moved: bytes that must cross the memory once. The limit is the larger of moving and multiplying."""
    ours_s = clock.in_graph_s(ours)
    limit_s = clock.rates.seconds(num_bytes=moved, flops=flops)
    result = {"seconds": ours_s, "bytes_per_s": moved / ours_s, "flops_per_s": flops / ours_s, "of_limit": limit_s / ours_s}
    if plain is not None:
        result["plain_torch_s"] = clock.seconds(plain)
    return result


def attention(clock: Clock, case: attention_cases.AttentionCase) -> dict[str, Any]:
    q, kv = attention_cases.build(case, clock.dtype, clock.device)
    token_bytes = 2 * case.num_kv_heads * (case.head_width * kv.keys.itemsize + (0 if kv.key_scales is None else 4))
    window = case.window or 1 << 30
    keys = sum(min(context, window + queries - 1 + case.sink) for queries, context in case.sequences)
    pairs = sum(
        min(position + 1, window + case.sink) for queries, context in case.sequences for position in range(context - queries, context)
    )
    moved = keys * token_bytes + 2 * q.nbytes
    flops = 4.0 * pairs * case.num_heads * case.head_width
    return row(clock, lambda: select_ops("triton").attend(q, kv, case.spec), None, moved=moved, flops=flops)


def kv_write(clock: Clock, case: kv_write_cases.KVWriteCase) -> dict[str, Any]:
    qkv, weights, positions, kv = kv_write_cases.build(case, clock.dtype, clock.device)
    ours, plain = (select_ops(name).kv_write for name in ("triton", "reference"))
    return row(clock, lambda: ours(qkv, weights, positions, kv), lambda: plain(qkv, weights, positions, kv), moved=2 * qkv.nbytes)


def norm(clock: Clock, case: norm_cases.NormCase) -> dict[str, Any]:
    x, residual, weight, eps = norm_cases.build(case, clock.dtype, clock.device)
    ours, plain = (select_ops(name).rms_norm for name in ("triton", "reference"))
    return row(clock, lambda: ours(x, residual, weight, eps), lambda: plain(x, residual, weight, eps), moved=4 * x.nbytes)


def gated(clock: Clock, case: gated_cases.GatedCase) -> dict[str, Any]:
    gate_up, activation = gated_cases.build(case, clock.dtype, clock.device)
    ours, plain = (select_ops(name).gated for name in ("triton", "reference"))
    return row(clock, lambda: ours(gate_up, activation), lambda: plain(gate_up, activation), moved=1.5 * gate_up.nbytes)


def linear(clock: Clock, case: linear_cases.LinearCase) -> dict[str, Any]:
    """int8 beside the dense product of the same shape through cuBLAS."""
    x, weight = linear_cases.build(case, clock.dtype, clock.device)
    dense = (weight.values.float() * weight.scales[:, None]).to(clock.dtype)
    flops = 2.0 * case.num_rows * case.in_features * case.out_features
    moved = weight.values.nbytes + x.nbytes + case.num_rows * case.out_features * clock.dtype.itemsize
    return row(
        clock, lambda: select_ops("triton").linear(x, weight), lambda: torch.nn.functional.linear(x, dense), moved=moved, flops=flops
    )


def sample(clock: Clock, case: sample_cases.SampleCase) -> dict[str, Any]:
    logits, rows = sample_cases.build(case, clock.device)
    ours, plain = (select_ops(name).sample for name in ("triton", "reference"))
    return row(clock, lambda: ours(logits, rows), lambda: plain(logits, rows), moved=logits.nbytes)


def experts(clock: Clock, case: experts_cases.ExpertsCase) -> dict[str, Any]:
    """Weights of as many experts as so many tokens reach on average, if the router likes all the same."""
    x, weights, activation = experts_cases.build(case, clock.dtype, clock.device)
    ours, plain = (select_ops(name).experts for name in ("triton", "reference"))
    share = 1 - (1 - case.top_k / case.num_experts) ** case.num_tokens
    flops = 6.0 * case.num_tokens * case.top_k * case.hidden * case.width
    moved = share * (bytes_of(weights.gate_up) + bytes_of(weights.down))
    return row(clock, lambda: ours(x, weights, activation), lambda: plain(x, weights, activation), moved=moved, flops=flops)


def float_product(clock: Clock, case: linear_cases.FloatCase) -> dict[str, Any]:
    x, weight = linear_cases.build_float(case, clock.dtype, clock.device)
    ops = select_ops("triton")
    packed = ops.pack(weight)
    flops = 2.0 * case.num_rows * case.in_features * case.out_features
    return row(clock, lambda: ops.linear(x, packed), None, moved=bytes_of(weight) + x.nbytes, flops=flops)
