"""The experts' reference against a loop over tokens as the papers write it, and the CPU back end against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import ops as cpu_module
from kernels.cpu.packed import pack_floats, rows_of
from kernels.experts import cases, reference
from kernels.linear.reference import dense_of, quantize_grouped, quantize_int8
from kernels.ops import ExpertWeights, GroupedWeight, Int8Weight, Weight, select_ops
from tests.kernels.cpu_inputs import copied, needs_library, packed, paged_batch, random_kv, random_layer

SMALL = [case for case in cases.CASES if case.size != "bench"]
DENSE = [case for case in SMALL if not case.is_int8]


def one_token(x_D: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    """Expert by expert, in Python."""
    act = F.silu if activation == "silu" else lambda gate: F.gelu(gate, approximate="tanh")

    def block(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ x_D).chunk(2)
        return down @ (act(gate) * up)

    assert isinstance(weights.gate_up, Tensor)
    assert isinstance(weights.down, Tensor)
    logits = [float(row @ x_D) for row in weights.router]
    shares = torch.tensor(logits[: weights.num_experts], dtype=torch.float64).softmax(0).tolist()
    chosen = sorted(range(weights.num_experts), key=lambda expert: (-logits[expert], expert))[: weights.top_k]
    whole = sum(shares[expert] for expert in chosen) if weights.is_normalised else 1.0
    gate_up = weights.gate_up.view(weights.num_experts, -1, len(x_D))
    down = weights.down.view(weights.num_experts, len(x_D), -1)
    y = torch.zeros_like(x_D)
    for expert in chosen:
        y = y + shares[expert] / whole * block(gate_up[expert], down[expert])
    if weights.shared is not None:
        assert isinstance(weights.shared.gate_up, Tensor)
        assert isinstance(weights.shared.down, Tensor)
        y = y + block(weights.shared.gate_up, weights.shared.down) / (1 + torch.exp(torch.tensor(-logits[-1], dtype=torch.float64)))
    return y


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_reference_is_the_sum_over_each_tokens_experts(case: cases.ExpertsCase) -> None:
    x, weights, activation = cases.build(case, torch.float64)
    expected = torch.stack([one_token(row, weights, activation) for row in x])
    torch.testing.assert_close(reference.experts(x, weights, activation), expected, rtol=1e-9, atol=1e-9)


def test_of_equal_logits_the_lower_expert_comes_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    chosen, shares = reference.route(logits, 2, is_normalised=True)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    assert shares.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_step_without_tokens() -> None:
    x, weights, activation = cases.build(SMALL[0], torch.float32)
    assert select_ops("cpu").experts(x[:0], weights, activation).shape == (0, x.shape[1])


def test_gradients_reach_every_part() -> None:
    x, weights, activation = cases.build(next(case for case in SMALL if case.shared), torch.float32)
    assert weights.shared is not None
    parts = [x, weights.router, weights.gate_up, weights.down, weights.shared.gate_up]
    for part in parts:
        part.requires_grad_()  # type: ignore[union-attr]
    reference.experts(x, weights, activation).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(float(part.grad.abs().sum()) > 0 for part in parts)  # type: ignore[union-attr]


def quantised(weight: Weight, kind: str) -> Weight:
    assert isinstance(weight, Tensor)
    return quantize_int8(weight) if kind == "int8" else quantize_grouped(weight, int(kind))


@pytest.mark.parametrize("kind", ["int8", "4", "8"])
def test_packed_experts_are_the_reference_and_company_changes_no_bit(kind: str) -> None:
    case = cases.ExpertsCase("packed", "", 37, 8, 3, 64, 32, shared=96)
    x, weights, activation = cases.build(case, torch.float32)
    ops, shared = select_ops("cpu"), weights.shared
    assert shared is not None
    plain = replace(weights, gate_up=quantised(weights.gate_up, kind), down=quantised(weights.down, kind))
    plain = replace(plain, shared=replace(shared, gate_up=quantised(shared.gate_up, kind), down=quantised(shared.down, kind)))
    assert plain.shared is not None
    packed = replace(plain, gate_up=ops.pack(plain.gate_up), down=ops.pack(plain.down))
    packed = replace(packed, shared=replace(plain.shared, gate_up=ops.pack(plain.shared.gate_up), down=ops.pack(plain.shared.down)))
    got = ops.experts(x, packed, activation)
    torch.testing.assert_close(got, reference.experts(x, plain, activation), rtol=1e-5, atol=1e-5)
    alone = torch.cat([ops.experts(row, packed, activation) for row in torch.split(x, 1)])
    assert torch.equal(alone, got)


@pytest.mark.parametrize("kind", ["int8", "4", "8"])
def test_rows_of_a_packed_matrix(kind: str) -> None:
    """The rows between two strips are the matrix of those rows; others can't be had."""
    generator = torch.Generator().manual_seed(1)
    dense, x = torch.randn(64, 96, generator=generator), torch.randn(5, 96, generator=generator)
    ops = select_ops("cpu")
    packed = ops.pack(quantised(dense, kind))
    part = rows_of(packed, 16, 48)
    assert torch.equal(ops.linear(x, part), ops.linear(x, packed)[:, 16:48])
    if not isinstance(packed, Tensor) and packed.packed is not None:
        with pytest.raises(ValueError, match=r"rows 8 \.\.\. 23 .* multiples of 16"):
            rows_of(packed, 8, 24)


def test_rows_of_what_is_not_packed() -> None:
    dense = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    floats, grouped = pack_floats(quantize_int8(dense)), quantize_grouped(dense, 4)
    rows, groups = rows_of(floats, 5, 9), rows_of(grouped, 5, 9)
    assert isinstance(rows, Int8Weight)
    assert isinstance(groups, GroupedWeight)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    linear = cpu_module._linear_without_library
    assert torch.equal(linear(x, rows), linear(x, floats)[:, 5:9])
    assert torch.equal(dense_of(groups), dense_of(grouped)[5:9])


@needs_library
def test_a_layer_of_experts_is_not_computed_as_one_block() -> None:
    """The C library's layers know one block. With one expert, whose share is 1, both ways must give the same."""
    ops, generator = select_ops("cpu"), torch.Generator().manual_seed(11)
    batch, positions = paged_batch([(3, 1), (0, 6)], 16, 8, generator)
    kv = random_kv(batch, (8, 2, 16, 48), torch.float32, generator)
    plain = packed(random_layer(generator), ops)
    one = ExpertWeights(torch.randn(1, 92, generator=generator), plain.gate_up, plain.down, num_experts=1, top_k=1, is_normalised=True)
    sparse = replace(plain, experts=one)
    x = torch.randn(len(positions), 92, generator=generator)
    assert ops.stack is not None
    assert ops.stack.run(x, [plain], positions, [copied(kv)]) is not None
    assert ops.stack.run(x, [plain, sparse], positions, [copied(kv), copied(kv)]) is None
    expected = ops.layers(x, [plain, plain], positions, [copied(kv), copied(kv)])
    for layers in ([plain, sparse], [sparse, plain]):
        for got, want in zip(ops.layers(x, layers, positions, [copied(kv), copied(kv)]), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
