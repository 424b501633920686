"""Layers fall into groups of equally many, so that all blocks have equal bytes."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_write.pool import pool_words
from kernels.ops import PagedBatch
from service.model.config import LayerAttention, ModelConfig
from service.runner.kv_cache import KVCache, partition_layers
from service.scheduling.plan import KVGroup


def config_of(*windows: int | None) -> ModelConfig:
    layers = tuple(LayerAttention(window=window) for window in windows)
    return ModelConfig(
        vocab_size=32, width=16, feed_forward_width=32, num_heads=2, num_kv_heads=1, head_width=8, layers=layers, max_context=64
    )


def test_uniform_layers_are_one_group() -> None:
    layout = partition_layers(config_of(None, None, None))
    assert layout.groups == (KVGroup(),)
    assert layout.places == ((0, 0), (0, 1), (0, 2))


def test_hybrid_layers_are_cut_to_equal_groups() -> None:
    layout = partition_layers(config_of(8, 8, None, 8, 8, None))
    assert layout.layers_per_group == 2
    assert layout.groups == (KVGroup(8), KVGroup(8), KVGroup())
    assert layout.places == ((0, 0), (0, 1), (2, 0), (1, 0), (1, 1), (2, 1))


def test_every_layer_has_a_place_of_its_own() -> None:
    layout = partition_layers(config_of(*([4] * 15 + [None] * 3)))
    assert len(set(layout.places)) == 18
    assert len(layout.groups) == 6


def test_views_alias_the_pool() -> None:
    config = config_of(None, None)
    layout = partition_layers(config)
    cache = KVCache(config, layout, num_blocks=5, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.pool.numel() * 2 == 5 * layout.block_bytes(config, 4, torch.bfloat16)
    cache.views[1][1][3] = 1
    assert float(cache.pool.sum()) == 4 * 8
    assert float(cache.pool[1, 1, 3].sum()) == 4 * 8


def test_int8_has_a_scale_for_each_head_of_a_token() -> None:
    config = config_of(None, None)
    layout = partition_layers(config)
    cache = KVCache(config, layout, num_blocks=5, block_size=4, dtype=torch.int8, device=torch.device("cpu"))
    assert cache.scales is not None
    assert cache.pool.numel() + cache.scales.numel() * 4 == 5 * layout.block_bytes(config, 4, torch.int8)
    scales = cache.scale_views[1][1]
    assert scales is not None
    assert scales.shape == cache.views[1][1].shape[:3]
    scales[3] = 1
    assert float(cache.scales[1, 1, 3].sum()) == float(cache.scales.sum()) > 0


@pytest.mark.parametrize(
    ("windows", "places", "num_groups"),
    [
        ([8, 8, None, None], 2, 3),  # one of both globals, two of a local each
        ([8] * 6 + [None] * 6, 6, 3),
        ([8] * 15 + [None] * 3, 2, 17),  # two groups for three globals: one place stays empty
        ([8, 4, None], 2, 3),
    ],
)
def test_local_layers_in_bfloat16_make_groups_of_half_as_many(windows: list[int | None], places: int, num_groups: int) -> None:
    layout = partition_layers(config_of(*windows), torch.bfloat16)
    assert layout.layers_per_group == places
    assert len(layout.groups) == num_groups
    assert len(set(layout.places)) == len(windows)
    for window, (group, place) in zip(windows, layout.places, strict=True):
        assert layout.groups[group].window == window
        assert place < (places if window is None else places // 2)


@pytest.mark.parametrize("windows", [[None, None], [8, 8]])
def test_layers_of_one_kind_have_one_dtype(windows: list[int | None]) -> None:
    assert partition_layers(config_of(*windows), torch.bfloat16) == partition_layers(config_of(*windows))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_block_holds_quantised_layers_or_half_as_many_local_ones(dtype: torch.dtype) -> None:
    """Every byte of a block belongs to one layer of whatever group has it, and to no other block."""
    config = config_of(8, 8, None, None, None, None)
    layout = partition_layers(config, torch.bfloat16)
    cache = KVCache(config, layout, num_blocks=5, block_size=4, dtype=dtype, device=torch.device("cpu"))
    assert cache.scales is not None
    assert cache.pool.numel() + cache.scales.numel() * 4 == 5 * layout.block_bytes(config, 4, dtype)
    nothing = torch.zeros(0, dtype=torch.int32)
    batch = PagedBatch(nothing, nothing, nothing, nothing, 0, 0, 0)
    layers = cache.of_layers([batch] * len(layout.groups))
    assert [kv.keys.dtype for kv in layers] == [torch.bfloat16] * 2 + [dtype] * 4
    assert [kv.key_scales is None for kv in layers] == [True] * 2 + [False] * 4
    pool = cache.pool.view(torch.uint8)
    of_block = pool[:, :, 3].numel()
    for kind in (layers[:2], layers[2:]):
        pool.zero_()
        for kv in kind:
            for side in (kv.keys, kv.values):
                bits = side.view(torch.uint8) if side.stride(3) == 1 else side.transpose(2, 3).view(torch.uint8)
                assert not bits[3].any(), "two layers share bytes"
                bits[3] = 1
        assert int(pool.count_nonzero()) == int(pool[:, :, 3].count_nonzero()) == of_block


def test_scales_lie_where_the_kernels_look_for_them() -> None:
    config = config_of(8, 8, None, None, None, None)
    layout = partition_layers(config, torch.bfloat16)
    cache = KVCache(config, layout, num_blocks=5, block_size=4, dtype=torch.int8, device=torch.device("meta"))
    nothing = torch.zeros(0, dtype=torch.int32)
    batch = PagedBatch(nothing, nothing, nothing, nothing, 0, 0, 0)
    for kv in cache.of_layers([batch] * len(layout.groups)):
        keys, _, scales, _ = pool_words(kv)
        assert (scales is None) == (keys.dtype == torch.bfloat16)
