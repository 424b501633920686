"""Random checkpoints whose heads can be split, and ranks as threads of this process: what tests of tensor parallelism start from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.ops import select_ops
from service.model.config import LayerAttention, ModelConfig
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import WeightSource
from service.runner.parallel import Share, ShareSource, split_ops
from tests.parity import braid
from tests.parity.steps import Steps

LLAMA = ModelConfig(
    vocab_size=131,
    width=64,
    feed_forward_width=96,
    num_heads=8,
    num_kv_heads=2,
    head_width=16,
    layers=(LayerAttention(), LayerAttention(window=9)),
    max_context=128,
    eos_ids=(2,),
    bos_id=1,
)
CONFIGS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, has_qkv_bias=True, has_tied_head=True),
    "qwen3": replace(LLAMA, has_qk_norm=True, num_kv_heads=8),
    "braid": replace(braid.CONFIG, num_heads=8),
}
TOKENS = [(7 * i * i + 3 * i + 1) % 131 for i in range(53)]
STREAMS = {name: braid.STREAM if name == "braid" else TOKENS for name in CONFIGS}
# What an HF config calls a family of these; layers alike, for such a file has one window at most.
FILES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "llama": (replace(LLAMA, layers=(LayerAttention(),) * 2), {"architectures": ["LlamaForCausalLM"]}),
    "qwen2": (
        replace(CONFIGS["qwen2"], layers=(LayerAttention(),) * 2),
        {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    ),
    "qwen3": (replace(CONFIGS["qwen3"], layers=(LayerAttention(),) * 2), {"architectures": ["Qwen3ForCausalLM"]}),
}


def write_folder(folder: Path, family: str) -> Path:
    """A random model of a family of `FILES`."""
    config, values = FILES[family]
    braid.write_folder(folder, braid.random_weights(config), braid.CONFIG)
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.layers[0].rope_base,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(sizes | values))
    return folder


class Sums:
    """Adds what the ranks hand in, each in a thread of its own, in the order of the ranks."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(x: Tensor) -> Tensor:
            self._parts[rank] = x
            self._barrier.wait()
            total = sum(part for part in self._parts if part is not None)
            self._barrier.wait()
            assert isinstance(total, Tensor)
            return total

        return add_up


def build_whole(config: ModelConfig, source: WeightSource, precision: Precision, back_end: Any = "cpu") -> Transformer:
    return build_transformer(config, source, select_ops(back_end), precision=precision)


def build_shares(config: ModelConfig, source: WeightSource, size: int, precision: Precision, back_end: Any = "cpu") -> list[Transformer]:
    """A model for each rank; they run only together."""
    sums = Sums(size)
    shares = [Share(config, rank, size) for rank in range(size)]
    return [
        build_transformer(
            share.config("it"), ShareSource(source, share), split_ops(select_ops(back_end), sums.of(share.rank)), precision=precision
        )
        for share in shares
    ]


def run_together(models: Sequence[Transformer], cuts: Sequence[Sequence[int]]) -> Tensor:
    """Logits float32 [T, V], put together from those of each rank's ids, for one sequence, step by step."""

    def run(model: Transformer) -> Tensor:
        steps = Steps(model)
        return torch.cat([steps.run([(0, cut)])[0] for cut in cuts])

    with ThreadPoolExecutor(len(models)) as pool:
        return torch.cat(list(pool.map(run, models)), dim=1)
