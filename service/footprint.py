"""How much memory a model takes and how many tokens and sequences fit beside it, from its description alone: `braid plan`.

The numbers are the loader's own (its block size, precisions and budget), so that a plan is what a start will do. Loads torch, no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from kernels.ops import GROUP
from service.catalog import Resolved
from service.errors import StartupError
from service.memory import available_bytes
from service.model.config import ROUTERS, ModelConfig, expected_shapes
from service.model.encoder_config import EncoderConfig, read_encoder_config
from service.model.families import read_config
from service.model.weights import WeightSource, open_weights
from service.runner.kv_cache import KVLayout, partition_layers
from service.runner.load import BLOCK_SIZE, MOST_KV_BYTES_CPU, Storage, choose_encoder_storage, choose_storage
from service.settings import format_bytes

_JOINED = (("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up"))
"""Parts of a layer that are one matrix in memory."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """One precision's numbers. kv_tokens: that fit in kv_bytes. num_sequences: that fit at the config's full context."""

    weight_bytes: int
    kv_token_bytes: int
    kv_bytes: int
    kv_tokens: int
    num_sequences: int


def weight_bytes(config: ModelConfig, storage: Storage, source: WeightSource | None = None) -> int:
    """Of all matrices, each counted once; beside a quantised head there are a bfloat16 embedding and the basis of the rotation, unless
    numbers in groups are kept, which int4 does where source has them, or nothing can be rotated. Of fp8 only the layers are quantised."""
    if storage.precision.weights == "fp8":
        return _fp8_bytes(config, storage)
    has_groups = source is not None and source.layers_have_groups(config)
    if storage.precision.weights != "dense" and (config.has_post_norms or (storage.precision.weights == "int4" and has_groups)):
        return _grouped_bytes(config, source, has_4_bits=storage.precision.weights == "int4") + _router_bytes(config, storage)
    matrices = _matrices(config)
    if storage.precision.weights != "dense":
        rows, columns = matrices.pop("embedding")
        head = matrices.pop("head", (rows, columns))
        basis = 4 * config.width**2  # brings vectors back to where the model's own channels are
        has_groups = storage.precision.weights == "int4"
        quantised = (quantised_bytes(name, *shape, has_groups=has_groups) for name, shape in {**matrices, "head": head}.items())
        return 2 * rows * columns + basis + sum(quantised) + _router_bytes(config, storage)
    return sum(rows * columns for rows, columns in matrices.values()) * storage.precision.dtype.itemsize + _router_bytes(config, storage)


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """All that a precision may quantise, by name."""
    shapes = expected_shapes(config).items()
    return {name: (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2 and name.rpartition(".")[2] not in ROUTERS}


def _router_bytes(config: ModelConfig, storage: Storage) -> int:
    if config.experts is None:
        return 0
    rows = config.experts.count + (1 if config.experts.shared_width else 0)
    return sum(config.experts.is_sparse) * rows * config.width * storage.precision.dtype.itemsize


def _fp8_bytes(config: ModelConfig, storage: Storage) -> int:
    matrices = [(name, *shape) for name, shape in expected_shapes(config).items() if len(shape) == 2]
    sizes = (
        rows * (columns + 4 if name.startswith("layers.") else columns * storage.precision.dtype.itemsize)
        for name, rows, columns in matrices
    )
    return sum(sizes)


def _grouped_bytes(config: ModelConfig, source: WeightSource | None, *, has_4_bits: bool) -> int:
    """Matrices that are one in memory have the bits of the widest among them, if the file has groups for all of them."""
    total = 0
    for name, shape in _matrices(config).items():
        layer, _, part = name.rpartition(".")
        joined = next((parts for parts in _JOINED if part in parts), (part,))
        bits = [source.bits_of(f"{layer}.{one}" if layer else one) if source else 0 for one in joined]
        total += _bytes_of(*shape, max(bits) if all(bits) else _made_bits(part) if has_4_bits else 8)
    return total


def _made_bits(part: str) -> int:
    """Of each number where int4 makes groups."""
    return 4 if part in ("out", "gate", "up", "shared_gate", "shared_up") else 8


def _bytes_of(rows: int, columns: int, bits: int) -> int:
    """Groups of 32 numbers have two float16 each, rows of int8 a float32."""
    return rows * (columns + 4) if columns % GROUP else rows * columns // GROUP * (bits * GROUP // 8 + 4)


def quantised_bytes(name: str, rows: int, columns: int, *, has_groups: bool) -> int:
    """Of a matrix that was rotated and quantised."""
    return _bytes_of(rows, columns, _made_bits(name.rpartition(".")[2])) if has_groups else rows * (columns + 4)


def footprint(config: ModelConfig, storage: Storage, memory_bytes: int, source: WeightSource | None = None) -> Footprint:
    """memory_bytes: for weights and K/V; 0 takes what the loader would on a CPU now. Sizes may be 0 where nothing fits."""
    weights = weight_bytes(config, storage, source)
    if memory_bytes:
        kv_bytes = max(memory_bytes - weights, 0)
    else:
        kv_bytes = min(max(available_bytes() - weights, 0) // 2, MOST_KV_BYTES_CPU)
    layout = partition_layers(config, storage.local_kv_dtype)
    block_bytes = layout.block_bytes(config, BLOCK_SIZE, storage.kv_dtype)
    num_blocks = kv_bytes // block_bytes
    return Footprint(
        weight_bytes=weights,
        kv_token_bytes=block_bytes * len(layout.groups) // BLOCK_SIZE,
        kv_bytes=kv_bytes,
        kv_tokens=num_blocks * BLOCK_SIZE // len(layout.groups),
        num_sequences=num_blocks // blocks_per_sequence(config, layout),
    )


def blocks_per_sequence(config: ModelConfig, layout: KVLayout) -> int:
    """That a sequence of max_context tokens holds at its end, in all groups; behind a window only the sink is kept."""
    whole = -(-config.max_context // BLOCK_SIZE)
    total = 0
    for group in layout.groups:
        # A window that does not begin at a block's edge reaches into one more.
        kept = whole if group.window is None else -(-group.window // BLOCK_SIZE) + 1 + -(-group.sink // BLOCK_SIZE)
        total += min(kept, whole)
    return total


def window_saving(config: ModelConfig) -> str:
    """What windows save of a full context's K/V, for people; "" for a model whose layers all see everything."""
    layout = partition_layers(config)
    if all(group.window is None for group in layout.groups):
        return ""
    kept, whole = blocks_per_sequence(config, layout), -(-config.max_context // BLOCK_SIZE) * len(layout.groups)
    return f"a sequence of {config.max_context} tokens holds {kept} blocks of K/V and not {whole} ({1 - kept / whole:.0%} less)"


def print_plan(model: Resolved, memory_bytes: int, max_context: int) -> None:
    """A table of every precision. max_context 0: the model's own. Raises: WeightsError; StartupError when no precision fits."""
    console = Console()
    if (encoder := read_encoder_config(model.path)) is not None:
        _print_encoder(console, model.name, encoder.within(max_context), memory_bytes)
        return
    config = read_config(model.path)
    if max_context:
        config = config.with_max_context(max_context)
    active = f" ({config.num_active_parameters / 1e6:.1f} M for a token)" if config.experts is not None else ""
    console.print(
        f"{model.name}: {config.num_parameters / 1e6:.1f} M parameters{active}, {len(config.layers)} layers of width {config.width}, "
        f"context {config.max_context}",
        highlight=False,
    )
    table = Table("dtype", "weights", "K/V per token", "K/V memory", "K/V tokens", f"sequences of {config.max_context}")
    most, source = 0, open_weights(model.path, config)
    for name, storage in _storages().items():
        size = footprint(config, storage, memory_bytes, source)
        most = max(most, size.kv_tokens)
        numbers = (format_bytes(size.weight_bytes), format_bytes(size.kv_token_bytes), format_bytes(size.kv_bytes))
        table.add_row(name, *numbers, f"{size.kv_tokens}", f"{size.num_sequences}")
    console.print(table)
    if saving := window_saving(config):
        console.print(f"local layers give back what lies behind their windows: {saving}", highlight=False)
    if not most:
        raise StartupError("nothing is left for K/V beside the weights; give more --memory")


def _storages() -> dict[str, Storage]:
    """By the name of their row: each precision of a CPU with its own K/V, and what a GPU has beside them."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    return {
        "int4": choose_storage("int4", cpu),
        "int8": choose_storage("int8", cpu),
        "GPU, fp8": choose_storage("fp8", gpu),
        "bfloat16": choose_storage("bfloat16", cpu),
        "GPU, fp8 K/V": choose_storage("bfloat16", gpu, "fp8"),
        "float32": choose_storage("float32", cpu),
    }


def _print_encoder(console: Console, name: str, config: EncoderConfig, memory_bytes: int) -> None:
    """An encoder keeps no K/V: its weights are all. Raises: StartupError when memory_bytes (0: no limit) does not hold them."""
    console.print(
        f"{name}: {config.num_parameters / 1e6:.1f} M parameters, {config.num_layers} layers of width {config.width}, an encoder for texts "
        f"of up to {config.max_context} tokens; it needs no K/V",
        highlight=False,
    )
    table = Table("dtype", "weights")
    sizes = {}
    for dtype in ("bfloat16", "float32"):
        storage = choose_encoder_storage(dtype)
        sizes[storage.name] = config.num_parameters * storage.precision.dtype.itemsize
        table.add_row(storage.name, format_bytes(sizes[storage.name]))
    console.print(table)
    if 0 < memory_bytes < min(sizes.values()):
        raise StartupError("the weights don't fit; give more --memory")
