"""All layers in one call of the compiled CPU back end: the same bits as layer by layer, and nobody's replaced operation passed over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import cpu_ops
from kernels.ops import AttentionSpec, LayerWeights, Ops, PagedKV
from tests.kernels.cpu_inputs import ISAS, copied, dense, needs_library, packed, paged_batch, random_kv, random_layer

pytestmark = needs_library
BLOCKS = 40
SLICES = [(30, 1), (0, 1), (7, 5), (0, 20)]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return cpu_ops(request.param, 2)


def inputs(ops: Ops, dtype: torch.dtype) -> tuple[list[LayerWeights], list[PagedKV], Tensor, Tensor]:
    """Five layers of two kinds that take turns, each kind with a block table of its own."""
    generator = torch.Generator().manual_seed(11)
    tables = [paged_batch(SLICES, 16, BLOCKS, generator) for _ in range(2)]
    layers, pools = [], []
    for at in range(5):
        weights = packed(random_layer(generator, has_bias=at == 1, has_norms=at == 2), ops)
        spec = AttentionSpec(0.2, window=6) if at % 2 else AttentionSpec(0.1, softcap=5.0)
        layers.append(replace(weights, spec=replace(weights.spec, attention=spec)))
        pools.append(random_kv(tables[at % 2][0], (BLOCKS, 2, 16, 48), dtype, generator))
    return layers, pools, tables[0][1], torch.randn(len(tables[0][1]), 92, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_one_call_gives_the_bits_of_many(ops: Ops, dtype: torch.dtype) -> None:
    layers, pools, positions, x = inputs(ops, dtype)
    before, apart = x.clone(), [copied(kv) for kv in pools]
    assert ops.stack is not None
    assert ops.stack.run(x, layers, positions, [copied(kv) for kv in pools]) is not None
    found = ops.layers(x, layers, positions, pools)
    expected = replace(ops, stack=None).layers(x, layers, positions, apart)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.keys[1:], b.keys[1:]) and torch.equal(a.values[1:], b.values[1:]) for a, b in zip(pools, apart, strict=True))


def test_models_that_share_layers_are_told_apart(ops: Ops) -> None:
    layers, pools, positions, x = inputs(ops, torch.float32)
    for chosen in ([0, 1], [0], [0, 2], [0, 1]):
        some = [layers[at] for at in chosen]
        found = ops.layers(x, some, positions, [copied(pools[at]) for at in chosen])
        expected = replace(ops, stack=None).layers(x, some, positions, [copied(pools[at]) for at in chosen])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="2 layers and 1 pools"):
        ops.layers(x, layers[:2], positions, pools[:1])


def test_pools_that_share_all_but_one_tensor_are_told_apart(ops: Ops) -> None:
    layers, pools, positions, x = inputs(ops, torch.int8)
    first = pools[0]
    batches = [first.batch, replace(first.batch, context_len=first.batch.context_len.clone())]
    assert first.key_scales is not None
    others = [first, replace(first, batch=batches[1], key_scales=first.key_scales * 2)]
    found = ops.layers(x, layers[:2], positions, [copied(kv) for kv in others])
    expected = replace(ops, stack=None).layers(x, layers[:2], positions, [copied(kv) for kv in others])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_replaced_operation_is_not_passed_over(ops: Ops) -> None:
    layers, pools, positions, x = inputs(ops, torch.float32)
    seen = []

    def out_mlp(y: Tensor, residual: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        seen.append(weights)
        return ops.out_mlp(y, residual, weights)

    replace(ops, out_mlp=out_mlp).layers(x, layers, positions, pools)
    assert [id(weights) for weights in seen] == [id(weights) for weights in layers]


def test_layers_that_cannot_be_fused_are_computed_one_by_one(ops: Ops) -> None:
    layers, pools, positions, x = inputs(ops, torch.float32)
    layers[3] = dense(random_layer(torch.Generator().manual_seed(12)))
    apart = [copied(kv) for kv in pools]
    found, expected = ops.layers(x, layers, positions, pools), replace(ops, stack=None).layers(x, layers, positions, apart)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
