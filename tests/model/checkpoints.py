"""Tiny random checkpoints as data: GGUF files as llama.cpp's converter would write them, without a converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from service.model.config import LayerAttention, ModelConfig, expected_shapes
from service.model.families import GGUF_NAMES, GGUF_POST_NORM_NAMES

TINY = ModelConfig(
    vocab_size=96,
    width=64,
    feed_forward_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    layers=(LayerAttention(),) * 2,
    max_context=128,
    norm_eps=2.0**-17,
    has_tied_head=True,
    eos_ids=(2,),
    bos_id=1,
)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 by our names, in our row order."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in expected_shapes(config).items()}


def gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return GGUF_NAMES[name]
    _, index, part = name.split(".")
    return (GGUF_NAMES | GGUF_POST_NORM_NAMES)["layers.{}." + part].format(index)


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows of the llama family."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def metadata_of(config: ModelConfig, family: str) -> dict[str, Any]:
    return {
        f"{family}.context_length": config.max_context,
        f"{family}.embedding_length": config.width,
        f"{family}.block_count": len(config.layers),
        f"{family}.feed_forward_length": config.feed_forward_width,
        f"{family}.attention.head_count": config.num_heads,
        f"{family}.attention.head_count_kv": config.num_kv_heads,
        f"{family}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{family}.rope.freq_base": config.layers[0].rope_base,
        f"{family}.rope.dimension_count": config.head_width,
        f"{family}.vocab_size": config.vocab_size,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    family: str = "llama",
    types: Mapping[str, Type] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """tensors: by our names, or by a name of the file's own. types: how to store some of them, F32 otherwise.
    metadata: overrides; None leaves a key out."""
    writer = gguf.GGUFWriter(path, family)
    for key, value in {**metadata_of(config, family), **(metadata or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    for name, values in tensors.items():
        part = name.rpartition(".")[2]
        stored = values
        if family == "llama" and part in ("q", "k", "q_bias", "k_bias"):
            stored = interleave(values, config.num_heads if part.startswith("q") else config.num_kv_heads)
        kind = (types or {}).get(name, Type.F32)
        is_ours = name in expected_shapes(config)
        writer.add_tensor(gguf_name(name) if is_ours else name, quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
