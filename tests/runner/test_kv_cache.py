"""Layers fall into groups of equally many, so that all blocks have equal bytes."""

from __future__ import annotations

import torch

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
