"""How long one step of a SmolLM2-135M-shaped int8 model takes on the CPU back end, beside the read bandwidth of the same minute.

Random weights and paged K/V, no server and no scheduler: what `Ops` alone can do. `python -m bench.cpu_step [--isa avx2]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.cpu.ops import cpu_ops
from kernels.linear.reference import quantize_grouped, quantize_int8
from kernels.ops import AttentionSpec, Int8Weight, LayerSpec, LayerWeights, Ops, PagedBatch, PagedKV, SampleRows, Weight
from service.runner.kv_cache import as_kept

BLOCK_SIZE = 16
CONTEXT = 200


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder; as it stands, SmolLM2-135M's."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_width: int = 64
    wide: int = 1536
    vocab_size: int = 49_152

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


class Model:
    """Layers, table (embedding and head) and a K/V pool of num_blocks. bits: 8 for int8 rows, 4 for numbers in groups (the head's 8).
    has_columns: keys lie as columns, as the runner keeps them."""

    def __init__(
        self,
        ops: Ops,
        num_blocks: int,
        shape: Shape = Shape(),
        *,
        bits: Literal[4, 8] = 8,
        kv_dtype: torch.dtype = torch.int8,
        has_columns: bool = True,
    ) -> None:
        self.ops = ops
        self.shape = shape
        self.bits = bits
        width, head_width = shape.width, shape.head_width
        spec = LayerSpec(shape.heads, shape.kv_heads, head_width, AttentionSpec(head_width**-0.5), 1e-5, "silu")
        rotary = torch.randn(8192, 2, head_width // 2)
        self.layers = [
            LayerWeights(
                spec,
                torch.ones(width),
                self._matrix(shape.qkv_rows, width),
                self._matrix(width, shape.heads * head_width),
                torch.ones(width),
                self._matrix(2 * shape.wide, width),
                self._matrix(width, shape.wide),
                rotary,
            )
            for _ in range(shape.layers)
        ]
        self.table = self._matrix(shape.vocab_size, width, bits=8)
        self.norm = torch.ones(width)
        pool = torch.randn(shape.layers, 2, num_blocks, shape.kv_heads, BLOCK_SIZE, head_width).mul_(30 if kv_dtype is torch.int8 else 1)
        pool = pool.clamp_(-127, 127).to(kv_dtype)
        scales = torch.full(pool.shape[:-1], 1 / 30) if kv_dtype is torch.int8 else None
        self.views = [(as_kept(pool[layer, 0]) if has_columns else pool[layer, 0], pool[layer, 1]) for layer in range(shape.layers)]
        self.scales = [(None, None) if scales is None else scales[layer].unbind(0) for layer in range(shape.layers)]

    def _matrix(self, rows: int, columns: int, bits: int = 0) -> Weight:
        dense = torch.randn(rows, columns) / columns**0.5
        return self.ops.pack(quantize_int8(dense) if self.bits == 8 else quantize_grouped(dense, bits or self.bits))

    def kvs(self, batch: PagedBatch) -> list[PagedKV]:
        """One per layer."""
        return [PagedKV(*view, batch, *scales) for view, scales in zip(self.views, self.scales, strict=True)]

    def kv_bytes(self) -> float:
        """Of a number in the pool, its share of a scale included."""
        keys = self.views[0][0]
        return keys.itemsize + (4 / keys.shape[3] if self.scales[0][0] is not None else 0)

    def weight_bytes(self) -> int:
        matrices = [getattr(layer, name) for layer in self.layers for name in ("qkv", "out", "gate_up", "down")] + [self.table]
        return sum(m.out_features * m.in_features for m in matrices if isinstance(m, Int8Weight))

    def step(self, ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, sampled: torch.Tensor) -> torch.Tensor:
        """Logits of the sampled rows."""
        return self.ops.linear(self.hidden(ids, positions, batch, sampled), self.table)

    def draw(self, ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, sampled: torch.Tensor, rows: SampleRows) -> torch.Tensor:
        """Ids drawn for the sampled rows."""
        return self.ops.draw(self.hidden(ids, positions, batch, sampled), self.table, rows).ids

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, sampled: torch.Tensor) -> torch.Tensor:
        x = self.ops.embed(ids, self.table, torch.float32)
        x, residual = self.ops.layers(x, self.layers, positions, self.kvs(batch))
        return self.ops.rms_norm(x[sampled], residual[sampled], self.norm, 1e-5)[0]


def batch_of(num_sequences: int, length: int, start: int) -> tuple[PagedBatch, torch.Tensor]:
    """Equal sequences that each compute `length` tokens from `start`, with blocks of their own."""
    context = start + length
    blocks = -(-context // BLOCK_SIZE)
    table = torch.arange(num_sequences * blocks, dtype=torch.int32).view(num_sequences, blocks)
    positions = torch.arange(start, context).repeat(num_sequences)
    owner = torch.repeat_interleave(torch.arange(num_sequences), length)
    batch = PagedBatch(
        slots=table[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_table=table,
        query_start=torch.arange(num_sequences + 1, dtype=torch.int32) * length,
        context_len=torch.full((num_sequences,), context, dtype=torch.int32),
        num_decodes=num_sequences if length == 1 else 0,
        max_query_len=0 if length == 1 else length,
        max_context_len=context,
    )
    return batch, positions


def milliseconds(call: Callable[[], object], seconds: float = 1.5) -> tuple[float, float]:
    """Median and least of repeated calls."""
    for _ in range(3):
        call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default="", help="avx512, avx2, neon, generic; the best one by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", type=int, default=CONTEXT)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = Model(cpu_ops(options.isa, options.threads), num_blocks=64 * (options.context // BLOCK_SIZE + 1))
    stream = torch.ones(64 * 2**20)
    read = stream.numel() * 4 / milliseconds(stream.sum)[1] / 1e6
    limit = model.weight_bytes() / read / 1e6
    print(f"read {read:.1f} GB/s; {model.weight_bytes() / 1e6:.1f} MB of weights: the read limit is {limit:.2f} ms a step")
    print(f"{'tokens':>8} {'median ms':>10} {'least ms':>9} {'tokens/s':>9} {'of limit':>9}")
    with torch.inference_mode():
        for sequences, length, start in ((1, 1, options.context - 1), (4, 1, options.context - 1), (16, 1, options.context - 1),
                                         (64, 1, options.context - 1), (1, 512, 0)):  # fmt: skip
            batch, positions = batch_of(sequences, length, start)
            ids = torch.randint(model.shape.vocab_size, (sequences * length,))
            sampled = batch.query_start[1:].long() - 1
            median, least = milliseconds(
                lambda ids=ids, positions=positions, batch=batch, sampled=sampled: model.step(ids, positions, batch, sampled)
            )
            print(f"{sequences * length:8} {median:10.2f} {least:9.2f} {sequences * length / median * 1e3:9.0f} {limit / median:9.2f}")


if __name__ == "__main__":
    main()
