"""From a `Load` message to runners: back end, config, weights, memory budget, K/V pool, warm-up, as one straight line per model.

Called once by `service/worker.py`. Numbers derived here (blocks, dtype) are returned in `ModelInfo`, never written back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from kernels.ops import Int8Weight, LayerWeights, Ops, Weight, select_ops
from service.engine.messages import Load, ModelInfo, ModelSource
from service.errors import StartupError
from service.memory import available_bytes
from service.model.config import ModelConfig
from service.model.families import read_config
from service.model.layers import DecoderLayer
from service.model.transformer import Transformer, build_transformer
from service.model.weights import open_weights
from service.runner.kv_cache import KVCache, KVLayout, partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import KVGroup, Slice, StepPlan

BLOCK_SIZE = 16
# Without --memory: half of what is free once the weights are in, and no more than this, is K/V. On a CPU untouched pages cost nothing.
MOST_KV_BYTES_CPU = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can run: what the engine makes a lane of."""

    info: ModelInfo
    runner: Runner
    groups: tuple[KVGroup, ...]


@dataclass(frozen=True, slots=True)
class Precision:
    """dtype of activations and dense weights, dtype of K/V, and whether matrices are int8."""

    name: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    is_int8: bool


def choose_precision(dtype: str, device: torch.device) -> Precision:
    """auto is int8 on a CPU (activations float32, K/V bfloat16) and bfloat16 on a GPU."""
    if dtype == "auto":
        dtype = "int8" if device.type == "cpu" else "bfloat16"
    if dtype == "float32":
        return Precision(dtype, torch.float32, torch.float32, is_int8=False)
    if dtype == "int8":
        activations = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Precision(dtype, activations, torch.bfloat16, is_int8=True)
    return Precision(dtype, torch.bfloat16, torch.bfloat16, is_int8=False)


def choose_device(device: str) -> torch.device:
    """Raises: StartupError when CUDA is asked for and there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(f"--device {device}: this installation of torch finds no CUDA device; use --device cpu, or install a CUDA build")
    return torch.device(device)


def load_models(load: Load, progress: Callable[[str, float], None]) -> list[Loaded]:
    """Raises: StartupError or WeightsError with a message fit for people."""
    if load.threads:
        torch.set_num_threads(load.threads)
    device = choose_device(load.device)
    precision = choose_precision(load.dtype, device)
    ops = select_ops("cpu" if device.type == "cpu" else "triton")
    models: list[tuple[ModelSource, Transformer]] = []
    for source in load.models:
        before = len(models)

        def report(fraction: float, before: int = before) -> None:
            progress("weights", (before + fraction) / len(load.models))

        models.append((source, _load_model(source, load, ops, precision, device, report)))
    weight_bytes = [model_bytes(model) for _, model in models]
    kv_bytes = _kv_budget(load, device, sum(weight_bytes)) // len(models)
    loaded: list[Loaded] = []
    for (source, model), size in zip(models, weight_bytes, strict=True):
        progress("kv_cache", len(loaded) / len(models))
        loaded.append(_equip(source.name, model, load, precision, device, (size, kv_bytes)))
    for number, one in enumerate(loaded):
        progress("warm_up", number / len(loaded))
        _warm_up(one, load, device)
    progress("warm_up", 1.0)
    return loaded


def _load_model(
    source: ModelSource, load: Load, ops: Ops, precision: Precision, device: torch.device, progress: Callable[[float], None]
) -> Transformer:
    path = Path(source.path)
    config = read_config(path)
    if load.max_context:
        config = config.with_max_context(load.max_context)
    weights = open_weights(path, config)
    with torch.inference_mode():
        return build_transformer(
            config, weights, ops, dtype=precision.dtype, device=device, is_int8=precision.is_int8, progress=progress
        ).eval()


def model_bytes(model: Transformer) -> int:
    """Bytes of weights that a decode step reads: every matrix once; of the embedding only some rows, unless it is the head too."""
    weights: list[LayerWeights] = [cast(DecoderLayer, layer).weights for layer in model.layers]
    matrices = [matrix for layer in weights for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return sum(map(_bytes_of, [*matrices, model.head]))


def _bytes_of(weight: Weight) -> int:
    if isinstance(weight, Int8Weight):
        return weight.out_features * (weight.in_features + 4)  # and a float32 scale per row
    return weight.numel() * weight.element_size()


def _kv_budget(load: Load, device: torch.device, weight_bytes: int) -> int:
    if load.memory_bytes:
        left = load.memory_bytes - weight_bytes
        if left <= 0:
            raise StartupError(
                f"--memory of {load.memory_bytes / 2**20:.0f} MiB does not hold the weights ({weight_bytes / 2**20:.0f} MiB); give more"
            )
        return left
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.85)
    return min(available_bytes() // 2, MOST_KV_BYTES_CPU)


def _equip(name: str, model: Transformer, load: Load, precision: Precision, device: torch.device, sizes: tuple[int, int]) -> Loaded:
    """Sizes and allocates the K/V pool. sizes: bytes of the weights, bytes for K/V."""
    config = model.config
    weight_bytes, kv_bytes = sizes
    layout = partition_layers(config)
    num_blocks = _num_blocks(config, layout, load, precision.kv_dtype, kv_bytes)
    cache = KVCache(config, layout, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=precision.kv_dtype, device=device)
    info = ModelInfo(
        name=name,
        max_context=config.max_context,
        vocab_size=config.vocab_size,
        dtype=precision.name,
        weight_bytes=weight_bytes,
        kv_tokens=num_blocks * BLOCK_SIZE // len(layout.groups),
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
    )
    return Loaded(info, Runner(model, cache, num_groups=len(layout.groups), device=device), layout.groups)


def _num_blocks(config: ModelConfig, layout: KVLayout, load: Load, dtype: torch.dtype, kv_bytes: int) -> int:
    """As many as the budget holds, but no more than max_sequences full contexts need. Raises: StartupError for too little."""
    per_sequence = -(-config.max_context // BLOCK_SIZE) * len(layout.groups)
    fits = kv_bytes // layout.block_bytes(config, BLOCK_SIZE, dtype)
    if fits < 4 * len(layout.groups):
        raise StartupError(
            f"the memory left for K/V ({kv_bytes / 2**20:.1f} MiB) holds {fits} blocks of {BLOCK_SIZE} tokens; give more --memory"
        )
    return int(min(fits, per_sequence * load.max_sequences))


def _warm_up(loaded: Loaded, load: Load, device: torch.device) -> None:
    """One prefill and one decode step, so that the first request meets warm code; on a GPU also the graphs.

    Writes block 0, which no sequence owns yet: what it holds is never read before it is written again.
    """
    tables = tuple((0,) for _ in loaded.groups)
    for step, count in enumerate((min(BLOCK_SIZE, load.max_batch_tokens), 1)):
        piece = Slice(sequence_id=-1, start=0, tokens=tuple([0] * count), tables=tables)
        loaded.runner.forward(StepPlan(step_id=-1 - step, slices=(piece,), samples=()))
    if device.type == "cuda":
        loaded.runner.capture_graphs(load.max_sequences)
