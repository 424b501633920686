"""The paged K/V pool: one tensor, cut into blocks that any group of layers may hold. Owns memory, knows no sequence.

Layers with the same attention window form groups of equally many layers, so that every block has equal bytes. Beside quantised layers
those with a window may stay in bfloat16: a group of them has half as many, so that a block is still as large. Used by the runner;
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

QUANTISED = (torch.int8, torch.float8_e4m3fn)
"""Kept with a float32 scale for each head of a token."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """groups: one per block table. places[i] is (group index, place in the group) of layer i. layers_per_group: places of a group whose
    layers are kept in the pool's dtype. local_dtype: of groups with a window, None where it is the pool's; those hold
    layers_per_group / local_dtype.itemsize layers, beside a pool of single bytes."""

    groups: tuple[KVGroup, ...]
    places: tuple[tuple[int, int], ...]
    layers_per_group: int
    local_dtype: torch.dtype | None = None

    @property
    def layers_abreast(self) -> int:
        """Layers of the pool's dtype in the bytes of one that has a window."""
        return 1 if self.local_dtype is None else self.local_dtype.itemsize

    def is_local(self, group: int) -> bool:
        return self.local_dtype is not None and self.groups[group].window is not None

    def block_bytes(self, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block: keys and values of block_size tokens in one group's layers, and where they are quantised the scales."""
        head_bytes = config.head_width * dtype.itemsize + (4 if dtype in QUANTISED else 0)
        return 2 * self.layers_per_group * config.num_kv_heads * block_size * head_bytes


def partition_layers(config: ModelConfig, local_dtype: torch.dtype | None = None) -> KVLayout:
    """Layers by (window, sink), then cut into groups of as many layers as divide every kind's number.

    local_dtype: of layers with a window, beside a pool of single bytes; None for the pool's own. A model whose layers all have windows has
    nothing else to quantise, so there it changes nothing. Of layers that see everything a last group may have empty places then.
    """
    kinds: dict[tuple[int | None, int], list[int]] = defaultdict(list)
    for index, attention in enumerate(config.layers):
        kinds[(attention.window, attention.sink)].append(index)
    if len({window is None for window, _ in kinds}) < 2:
        local_dtype = None
    abreast = 1 if local_dtype is None else local_dtype.itemsize

    def layers_in(window: int | None) -> int:
        """Of a group, for each layer of a group that has a window."""
        return abreast if window is None else 1

    size = math.gcd(*(-(-len(members) // layers_in(window)) for (window, _), members in kinds.items()))
    groups: list[KVGroup] = []
    places = [(0, 0)] * len(config.layers)
    for (window, sink), members in kinds.items():
        for offset, index in enumerate(members):
            place = offset % (size * layers_in(window))
            if place == 0:
                groups.append(KVGroup(window, sink))
            places[index] = (len(groups) - 1, place)
    return KVLayout(tuple(groups), tuple(places), size * abreast, local_dtype)


def as_kept(keys: Tensor) -> Tensor:
    """Empty keys [B, K, P, H] as the back ends want them to lie. On the CPU a block's keys lie as columns [H, P]: a vector of one number of
    many keys is then a plain load."""
    return keys.view(*keys.shape[:2], keys.shape[3], keys.shape[2]).transpose(2, 3) if keys.device.type == "cpu" else keys


class KVCache:
    """pool [L / A, 2, B, A * K, P, H], where A layers lie abreast in a block (1, but for a layout with a local_dtype), and of a quantised
    pool scales [L / A, 2, B, A * K, P], which lie as the rows of the pool do. Layers with a local_dtype have the bytes of A others, and
    leave the scales beside theirs unused. `of_layers` binds all to one step's batches."""

    def __init__(
        self, config: ModelConfig, layout: KVLayout, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        heads, abreast = config.num_kv_heads, layout.layers_abreast
        if layout.local_dtype is not None and dtype.itemsize != 1:
            raise ValueError("layers with a window have a dtype of their own beside a pool of single bytes alone")
        shape = (layout.layers_per_group // abreast, 2, num_blocks, abreast * heads, block_size, config.head_width)
        self.pool = _zeros(shape, dtype, device)
        self.places = layout.places
        self.block_size = block_size
        self.scales = _zeros(shape[:-1], torch.float32, device) if dtype in QUANTISED else None
        self.views: list[tuple[Tensor, Tensor]] = []
        self.scale_views: list[tuple[Tensor, Tensor] | tuple[None, None]] = []
        for place in range(layout.layers_per_group):
            row, first = place // abreast, place % abreast * heads
            self.views.append((as_kept(self.pool[row, 0, :, first : first + heads]), self.pool[row, 1, :, first : first + heads]))
            scales = None if self.scales is None else self.scales[row, :, :, first : first + heads]
            self.scale_views.append((None, None) if scales is None else (scales[0], scales[1]))
        self.local_views = self._local_views(layout, (*shape[:3], heads, *shape[4:]))
        self._local_groups = frozenset(group for group in range(len(layout.groups)) if layout.is_local(group))

    def _local_views(self, layout: KVLayout, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        if layout.local_dtype is None:
            return []
        local = self.pool.flatten(3).view(layout.local_dtype).view(shape)
        return [(as_kept(keys), values) for keys, values in local]

    def of_layers(self, batches: list[PagedBatch]) -> list[PagedKV]:
        """One `PagedKV` per layer. batches: one per group."""
        return [
            PagedKV(*self.local_views[place], batches[group])
            if group in self._local_groups
            else PagedKV(*self.views[place], batches[group], *self.scale_views[place])
            for group, place in self.places
        ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: a place that a mask hides must not hold NaN, because 0 * NaN is NaN. (A block that another kind of
    layer had before may hold anything, so only kernels that read no hidden place can have a local_dtype beside them: Triton's do not.)

    On the CPU the system's own zero pages, which cost nothing until they are written; torch.zeros writes all of them (6 s a GiB).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
