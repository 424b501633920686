"""Models of known shapes with random weights, for timing: what a step costs depends on the shape and not on what was learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import Ops
from service.model.config import Experts, LayerAttention, ModelConfig, expected_shapes
from service.model.transformer import Precision, Transformer, build_transformer
from service.runner.kv_cache import QUANTISED, KVCache, partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams


def shape(layers: int, width: int, feed_forward_width: int, heads: tuple[int, int, int], vocab_size: int, **options: object) -> ModelConfig:
    """heads: query heads, key/value heads, head width."""
    attention = options.pop("attention", (LayerAttention(rope_base=1e5),) * layers)
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        feed_forward_width=feed_forward_width,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_width=heads[2],
        layers=attention,  # type: ignore[arg-type]
        max_context=8192,
        has_tied_head=True,
        **options,  # type: ignore[arg-type]
    )


def gemma(
    layers: int, width: int, feed_forward_width: int, heads: tuple[int, int, int], vocab_size: int, local: tuple[int, int] = (512, 5)
) -> ModelConfig:
    """As Gemma 3: local layers and a global one in turn, post norms, scaled embeddings. local: the window, and how many in a row."""
    window, count = local
    attention = tuple(LayerAttention(rope_base=1e6) if at % (count + 1) == count else LayerAttention(window=window) for at in range(layers))
    own = {"has_qk_norm": True, "has_post_norms": True, "activation": "gelu_tanh", "embedding_scale": width**0.5, "norm_offset": 1.0}
    return shape(layers, width, feed_forward_width, heads, vocab_size, attention=attention, **own)


HYBRID = tuple(LayerAttention(window=None if at % 6 == 5 else 512) for at in range(18))
SHAPES = {
    "smollm2-135m": shape(30, 576, 1536, (9, 3, 64), 49_152),
    "qwen3-0.6b": shape(28, 1024, 3072, (16, 8, 128), 151_936, has_qk_norm=True),
    "llama-1b": shape(16, 2048, 8192, (32, 8, 64), 128_256),
    "llama-8b": shape(32, 4096, 14_336, (32, 8, 128), 128_256),
    "hybrid-270m": shape(18, 640, 2048, (4, 1, 256), 262_144, attention=HYBRID, has_qk_norm=True),
    "gemma3-1b": gemma(26, 1152, 6912, (4, 1, 256), 262_144),
    "gemma3-270m": gemma(18, 640, 2048, (4, 1, 256), 262_144),
    "llamagen-111m": shape(12, 768, 2048, (12, 12, 64), 16_384),
    "llamagen-1.4b": shape(48, 1536, 4096, (24, 24, 64), 16_384),
    "tiny-dense": shape(2, 64, 96, (4, 2, 16), 211),
    "tiny-gemma": gemma(3, 64, 96, (4, 1, 16), 211, (24, 2)),
    "qwen3-30b-a3b": shape(
        48, 2048, 6144, (32, 4, 128), 151_936, has_qk_norm=True, experts=Experts(128, 8, 768, is_normalised=True, is_sparse=(True,) * 48)
    ),
    "tiny-experts": shape(3, 128, 256, (4, 2, 32), 509, experts=Experts(8, 2, 64, True, (True, False, True), shared_width=96)),
    "tiny": shape(4, 128, 256, (6, 2, 32), 509, attention=(LayerAttention(window=24, sink=4), LayerAttention()) * 2),
}


class RandomSource:
    """Weights of the right shapes, small enough that activations stay finite; the same for the same seed and device."""

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        self.shapes = expected_shapes(config)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def get(self, name: str) -> Tensor:
        size = self.shapes[name]
        if len(size) == 1:
            return 1 + 0.1 * torch.randn(size, device=self.device, generator=self.generator)
        return torch.randn(size, device=self.device, generator=self.generator) * size[1] ** -0.5


def build_runner(
    config: ModelConfig,
    ops: Ops,
    *,
    device: torch.device,
    dtype: torch.dtype | Precision,
    num_blocks: int,
    block_size: int = 16,
    kv_dtype: torch.dtype | None = None,
) -> Runner:
    """dtype: of activations, K/V and dense weights, or a precision that says more of the weights. kv_dtype: of keys and values where it is
    not the activations'; of a quantised one, layers with a window keep the activations'."""
    precision = dtype if isinstance(dtype, Precision) else Precision(dtype)
    with torch.inference_mode():
        model: Transformer = build_transformer(config, RandomSource(config, device), ops, precision=precision, device=device)
    layout = partition_layers(config, precision.dtype if kv_dtype in QUANTISED else None)
    cache = KVCache(config, layout, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype or precision.dtype, device=device)
    return Runner(model, cache, num_groups=len(layout.groups), device=device)


def step_of(runner: Runner, pieces: list[tuple[int, list[int]]], max_context: int) -> StepPlan:
    """A greedy step: sequence s appends pieces[s] = (position, tokens); each owns max_context worth of blocks per group."""
    per_table = -(-max_context // runner.cache.block_size)
    slices, samples = [], []
    for sequence, (start, tokens) in enumerate(pieces):
        first = sequence * per_table * runner.num_groups
        tables = tuple(tuple(range(first + g * per_table, first + (g + 1) * per_table)) for g in range(runner.num_groups))
        used = -(-(start + len(tokens)) // runner.cache.block_size)
        slices.append(Slice(sequence, start, tuple(tokens), tuple(table[:used] for table in tables)))
        params = SamplingParams(max_tokens=1, temperature=0)
        samples.append(Sample(sequence, (sequence,), params, start + len(tokens), 0))
    return StepPlan(0, tuple(slices), tuple(samples))
