"""The paged K/V pool: one tensor, cut into blocks that any group of layers may hold. Owns memory, knows no sequence.

Layers with the same attention window form groups of equally many layers, so that every block has equal bytes. Used by the runner;
`partition_layers` also tells the scheduler its groups and `braid plan` the bytes of a token.
Shape suffixes: L layers in a group, B blocks, K key/value heads, P places in a block, H head width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.ops import PagedBatch, PagedKV
from service.model.config import ModelConfig
from service.scheduling.plan import KVGroup


@dataclass(frozen=True, slots=True)
class KVLayout:
    """groups: one per block table. places[i] is (group index, place in the group) of layer i."""

    groups: tuple[KVGroup, ...]
    places: tuple[tuple[int, int], ...]
    layers_per_group: int

    def block_bytes(self, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block: keys and values of block_size tokens in one group's layers; int8 with a float32 scale for each head."""
        head_bytes = config.head_width * dtype.itemsize + (4 if dtype is torch.int8 else 0)
        return 2 * self.layers_per_group * config.num_kv_heads * block_size * head_bytes


def partition_layers(config: ModelConfig) -> KVLayout:
    """Layers by (window, sink), then cut into groups of as many layers as divide every kind's number."""
    kinds: dict[tuple[int | None, int], list[int]] = defaultdict(list)
    for index, attention in enumerate(config.layers):
        kinds[(attention.window, attention.sink)].append(index)
    size = math.gcd(*(len(members) for members in kinds.values()))
    groups: list[KVGroup] = []
    places = [(0, 0)] * len(config.layers)
    for (window, sink), members in kinds.items():
        for offset, index in enumerate(members):
            if offset % size == 0:
                groups.append(KVGroup(window, sink))
            places[index] = (len(groups) - 1, offset % size)
    return KVLayout(tuple(groups), tuple(places), size)


def as_kept(keys: Tensor) -> Tensor:
    """Empty keys [B, K, P, H] as the back ends want them to lie. On the CPU a block's keys lie as columns [H, P]: a vector of one number of
    many keys is then a plain load."""
    return keys.view(*keys.shape[:2], keys.shape[3], keys.shape[2]).transpose(2, 3) if keys.device.type == "cpu" else keys


class KVCache:
    """pool [L, 2, B, K, P, H], and of int8 scales [L, 2, B, K, P]; `of_layers` binds them to one step's batches."""

    def __init__(
        self, config: ModelConfig, layout: KVLayout, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (layout.layers_per_group, 2, num_blocks, config.num_kv_heads, block_size, config.head_width)
        self.pool = _zeros(shape, dtype, device)
        self.places = layout.places
        self.block_size = block_size
        self.scales = _zeros(shape[:-1], torch.float32, device) if dtype is torch.int8 else None
        self.views = [(as_kept(self.pool[at, 0]), self.pool[at, 1]) for at in range(layout.layers_per_group)]
        self.scale_views = [(None, None) if self.scales is None else self.scales[at].unbind(0) for at in range(layout.layers_per_group)]

    def of_layers(self, batches: list[PagedBatch]) -> list[PagedKV]:
        """One `PagedKV` per layer. batches: one per group."""
        return [PagedKV(*self.views[place], batches[group], *self.scale_views[place]) for group, place in self.places]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: a place that a mask hides must not hold NaN, because 0 * NaN is NaN.

    On the CPU the system's own zero pages, which cost nothing until they are written; torch.zeros writes all of them (6 s a GiB).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
