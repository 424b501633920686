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
from safetensors.torch import save_file
from torch import Tensor

from kernels.ops import select_ops
from service.model.config import Experts, LayerAttention, ModelConfig
from service.model.families import HF_NAMES, HF_POST_NORM_NAMES, read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import WeightSource, open_weights
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
    "gemma3": replace(
        LLAMA, has_qk_norm=True, has_post_norms=True, has_tied_head=True, embedding_scale=8.0, norm_offset=1.0, activation="gelu_tanh"
    ),
    "braid": replace(braid.CONFIG, num_heads=8),
    "experts": replace(LLAMA, experts=Experts(6, 2, 32, True, (True, False))),
    "shared_expert": replace(LLAMA, has_qkv_bias=True, experts=Experts(4, 3, 64, False, (True, True), shared_width=96)),
}
TOKENS = [(7 * i * i + 3 * i + 1) % 131 for i in range(53)]
STREAMS = {name: braid.STREAM if name == "braid" else TOKENS for name in CONFIGS}
# What the config.json of a family says beside the sizes.
FILES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 16, "sliding_window": 9, "sliding_window_pattern": 2},
}
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write_folder(folder: Path, family: str) -> Path:
    """A random model of a family of `FILES`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | FILES[family]))
    (folder / "model.safetensors").touch()
    write_weights(folder, read_config(folder))
    return folder


def write_weights(folder: Path, config: ModelConfig) -> None:
    names = HF_NAMES | (HF_POST_NORM_NAMES if config.has_post_norms else {})

    def file_name(name: str) -> str:
        layer, _, part = name.rpartition(".")
        return names[f"layers.{{}}.{part}"].format(layer.removeprefix("layers.")) if layer else names[name]

    save_file({file_name(name): tensor for name, tensor in braid.random_weights(config).items()}, folder / "model.safetensors")


def source_of(config: ModelConfig, folder: Path) -> WeightSource:
    """Random weights for a config, from a file."""
    (folder / "config.json").write_text("{}")
    write_weights(folder, config)
    return open_weights(folder, config)


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
