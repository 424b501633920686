"""Part of `bench.gpu`: the kernel table. Every case marked "bench", in bfloat16: seconds, bytes or operations a second, share of the limit.

Limits are measured beside the cases: read bandwidth for what moves bytes, the bf16 matrix product for what multiplies. Each kernel is
timed inside a CUDA graph, beside plain PyTorch for the same case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from bench.gpu import graph_of, seconds
from kernels.attention import cases as attention_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.ops import select_ops
from kernels.sample import cases as sample_cases

DTYPE = torch.bfloat16


@cache
def limits() -> tuple[float, float]:
    """(bytes a second read, bf16 operations a second)."""
    source = torch.randn(2**29, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return source.nbytes / seconds(lambda: source.sum()), 2 * 8192**3 / seconds(lambda: a @ b)


def steps() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    tables: list[tuple[str, Any, Callable[[Any], dict[str, Any]]]] = [
        ("attention", attention_cases, attention),
        ("kv_write", kv_write_cases, kv_write),
        ("norm", norm_cases, norm),
        ("gated", gated_cases, gated),
        ("linear", linear_cases, linear),
        ("sample", sample_cases, sample),
    ]
    for kernel, module, work in tables:
        for case in (case for case in module.CASES if case.size == "bench"):
            yield f"{kernel}/{case.name}", lambda case=case, work=work: work(case)  # type: ignore[misc]


def row(ours: Callable[[], Any], plain: Callable[[], Any] | None, *, moved: float, flops: float = 0.0) -> dict[str, Any]:
    """moved: bytes that must cross the memory once. The limit is the larger of moving and multiplying."""
    bandwidth, peak = limits()
    ours_s = seconds(graph_of(ours))
    limit_s = max(moved / bandwidth, flops / peak)
    result = {"seconds": ours_s, "bytes_per_s": moved / ours_s, "flops_per_s": flops / ours_s, "of_limit": limit_s / ours_s}
    if plain is not None:
        result["plain_torch_s"] = seconds(plain)
    return result


def attention(case: attention_cases.AttentionCase) -> dict[str, Any]:
    q, kv = attention_cases.build(case, DTYPE, "cuda")
    token_bytes = 2 * case.num_kv_heads * (case.head_width * kv.keys.itemsize + (0 if kv.key_scales is None else 4))
    window = case.window or 1 << 30
    keys = sum(min(context, window + queries - 1 + case.sink) for queries, context in case.sequences)
    pairs = sum(
        min(position + 1, window + case.sink) for queries, context in case.sequences for position in range(context - queries, context)
    )
    moved = keys * token_bytes + 2 * q.nbytes
    flops = 4.0 * pairs * case.num_heads * case.head_width
    return row(lambda: select_ops("triton").attend(q, kv, case.spec), None, moved=moved, flops=flops)


def kv_write(case: kv_write_cases.KVWriteCase) -> dict[str, Any]:
    qkv, weights, positions, kv = kv_write_cases.build(case, DTYPE, "cuda")
    ours, plain = (select_ops(name).kv_write for name in ("triton", "reference"))
    return row(lambda: ours(qkv, weights, positions, kv), lambda: plain(qkv, weights, positions, kv), moved=2 * qkv.nbytes)


def norm(case: norm_cases.NormCase) -> dict[str, Any]:
    x, residual, weight, eps = norm_cases.build(case, DTYPE, "cuda")
    ours, plain = (select_ops(name).rms_norm for name in ("triton", "reference"))
    return row(lambda: ours(x, residual, weight, eps), lambda: plain(x, residual, weight, eps), moved=4 * x.nbytes)


def gated(case: gated_cases.GatedCase) -> dict[str, Any]:
    gate_up, activation = gated_cases.build(case, DTYPE, "cuda")
    ours, plain = (select_ops(name).gated for name in ("triton", "reference"))
    return row(lambda: ours(gate_up, activation), lambda: plain(gate_up, activation), moved=1.5 * gate_up.nbytes)


def linear(case: linear_cases.LinearCase) -> dict[str, Any]:
    """int8 beside the dense product of the same shape through cuBLAS."""
    x, weight = linear_cases.build(case, DTYPE, "cuda")
    dense = (weight.values.float() * weight.scales[:, None]).to(DTYPE)
    flops = 2.0 * case.num_rows * case.in_features * case.out_features
    moved = weight.values.nbytes + x.nbytes + case.num_rows * case.out_features * DTYPE.itemsize
    return row(lambda: select_ops("triton").linear(x, weight), lambda: torch.nn.functional.linear(x, dense), moved=moved, flops=flops)


def sample(case: sample_cases.SampleCase) -> dict[str, Any]:
    logits, rows = sample_cases.build(case, "cuda")
    ours, plain = (select_ops(name).sample for name in ("triton", "reference"))
    return row(lambda: ours(logits, rows), lambda: plain(logits, rows), moved=logits.nbytes)
