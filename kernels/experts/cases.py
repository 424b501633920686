"""Named inputs of the experts as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels` and `bench`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.linear.reference import quantize_int8
from kernels.ops import Activation, ExpertWeights, SharedExpert, Weight


@dataclass(frozen=True, slots=True)
class ExpertsCase:
    """width: of the model; hidden: of an expert. routed: to which experts tokens go: as the router likes, all to the first ones, or half of
    the experts twice, so that each has an equal. shared: width of the shared expert, 0 for none. is_int8: quantise the matrices."""

    name: str
    why: str
    num_tokens: int
    num_experts: int
    top_k: int
    width: int
    hidden: int
    activation: Activation = "silu"
    is_normalised: bool = True
    routed: Literal["freely", "to_the_first", "in_ties"] = "freely"
    shared: int = 0
    is_int8: bool = False
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    ExpertsCase("alone", "one token: most experts have none", 1, 8, 2, 64, 48),
    ExpertsCase("few", "some experts have several tokens, some none", 5, 4, 2, 96, 40, is_normalised=False),
    ExpertsCase("crowded", "all tokens to the same experts: more than a tile holds", 20, 6, 2, 64, 32, routed="to_the_first"),
    ExpertsCase("ties", "equal logits: the lower expert comes first", 7, 8, 3, 48, 32, routed="in_ties"),
    ExpertsCase("gelu", "the other activation, and one expert a token", 3, 5, 1, 64, 48, "gelu_tanh", is_normalised=False),
    ExpertsCase("ragged", "no side is a multiple of its tile", 9, 7, 3, 70, 50),
    ExpertsCase("shared", "an expert for every token, by its own factor", 6, 4, 2, 64, 32, is_normalised=False, shared=80),
    ExpertsCase("int8", "whole numbers with a scale a row", 6, 4, 2, 64, 32, is_int8=True),
    ExpertsCase("prompt", "the tiles of a prompt", 260, 6, 2, 48, 32, size="small"),
    ExpertsCase("long_prompt", "the largest tiles", 260, 4, 2, 48, 32, size="small"),
    ExpertsCase("int8_prompt", "the tiles of a prompt in whole numbers", 260, 6, 1, 32, 32, is_int8=True, size="small"),
    ExpertsCase("bench_one", "Qwen3-30B-A3B, one sequence", 1, 128, 8, 2048, 768, size="bench"),
    ExpertsCase("bench_decode", "Qwen3-30B-A3B, 64 sequences", 64, 128, 8, 2048, 768, size="bench"),
    ExpertsCase("bench_prefill", "Qwen3-30B-A3B, a token budget", 2048, 128, 8, 2048, 768, size="bench"),
    ExpertsCase("bench_int8", "Qwen3-30B-A3B in int8, 64 sequences", 64, 128, 8, 2048, 768, is_int8=True, size="bench"),
    ExpertsCase("bench_mixtral", "Mixtral 8x7B, 64 sequences", 64, 8, 2, 4096, 14336, size="bench"),
)


def build(
    case: ExpertsCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, ExpertWeights, Activation]:
    """(x [T, D], weights, activation) of a case. Large matrices are drawn on the device."""
    generator = torch.Generator(device if case.size == "bench" else "cpu").manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn((rows, columns), generator=generator, device=generator.device, dtype=torch.float32)
        scaled: Tensor = drawn / columns**0.5
        return scaled.to(device, dtype)

    x = normal(case.num_tokens, case.width) * case.width**0.5
    router = normal(case.num_experts, case.width) * 2
    if case.routed == "to_the_first":  # what the first experts see of every token is far above what the others see
        x[:, 0] = 8.0
        router[:, 0] = torch.where(torch.arange(case.num_experts, device=device) < case.top_k, 4.0, -4.0).to(dtype)
    if case.routed == "in_ties":
        router[case.num_experts // 2 :] = router[: case.num_experts - case.num_experts // 2]
    shared = SharedExpert(normal(2 * case.shared, case.width), normal(case.width, case.shared)) if case.shared else None
    weights = ExpertWeights(
        router=torch.cat([router, normal(1, case.width)]) if case.shared else router,
        gate_up=normal(case.num_experts * 2 * case.hidden, case.width),
        down=normal(case.num_experts * case.width, case.hidden),
        num_experts=case.num_experts,
        top_k=case.top_k,
        is_normalised=case.is_normalised,
        shared=shared,
    )
    return x, in_int8(weights) if case.is_int8 else weights, case.activation


def in_int8(weights: ExpertWeights) -> ExpertWeights:
    """The same with its matrices, all but the router, as int8 rows."""
    gate_up, down = (quantize_int8(matrix) for matrix in (weights.gate_up, weights.down) if isinstance(matrix, Tensor))
    shared = weights.shared
    if shared is not None and isinstance(shared.gate_up, Tensor) and isinstance(shared.down, Tensor):
        shared = SharedExpert(quantize_int8(shared.gate_up), quantize_int8(shared.down))
    return replace(weights, gate_up=gate_up, down=down, shared=shared)


def in_double(weights: ExpertWeights) -> ExpertWeights:
    """The same in float64, for what the exact result is computed with; quantised matrices stay what they are."""

    def wide(matrix: Weight) -> Weight:
        return matrix.double() if isinstance(matrix, Tensor) else matrix

    shared = weights.shared
    if shared is not None:
        shared = replace(shared, gate_up=wide(shared.gate_up), down=wide(shared.down))
    return replace(weights, router=weights.router.double(), gate_up=wide(weights.gate_up), down=wide(weights.down), shared=shared)
