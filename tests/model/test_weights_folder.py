"""Folders of safetensors, as transformers writes them: configs of every family, one file and shards, and damaged ones."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from service.errors import WeightsError
from service.model.config import RopeScaling, expected_shapes
from service.model.families import HF_NAMES, read_config
from service.model.weights import open_weights

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500_000.0,
}


def save(model: PreTrainedModel, folder: Path, **more: Any) -> Path:
    """With random biases too, which transformers starts at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, **more)
    return folder


def llama(folder: Path, **more: Any) -> Path:
    return save(LlamaForCausalLM(LlamaConfig(**SIZES, **more)), folder)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def file_name(name: str) -> str:
    if not name.startswith("layers."):
        return HF_NAMES[name]
    _, index, part = name.split(".")
    return HF_NAMES["layers.{}." + part].format(index)


def models() -> dict[str, PreTrainedModel]:
    sliding = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
        "llama_tied": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "mistral": MistralForCausalLM(MistralConfig(**SIZES, sliding_window=48)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **sliding)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 32}, tie_word_embeddings=True)),
    }


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_every_family_comes_back(tmp_path: Path, name: str) -> None:
    model = models()[name]
    folder = save(model, tmp_path / "model")
    config = read_config(folder)
    theirs = model.config
    assert (config.num_heads, config.num_kv_heads, config.feed_forward_width) == (4, 2, 96)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.has_tied_head == theirs.tie_word_embeddings
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    windows = {"mistral": (48, 48, 48), "qwen2": (None, None, 32)}.get(name, (None,) * 3)
    assert tuple(layer.window for layer in config.layers) == windows
    assert config.num_parameters == model.num_parameters()
    state = model.state_dict()
    source = open_weights(folder, config)
    for ours in expected_shapes(config):
        assert torch.equal(source.get(ours), state[file_name(ours)]), ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype), tmp_path / "model")
    assert open_weights(folder, read_config(folder)).get("layers.0.q").dtype == dtype


def test_shards(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    folder = save(model, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = read_config(folder)
    source = open_weights(folder, config)
    for ours in expected_shapes(config):
        assert torch.equal(source.get(ours), model.state_dict()[file_name(ours)]), ours


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "'../outside.safetensors', which is not a .safetensors file of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not a .safetensors file of its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors, which is missing"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_index_is_not_believed(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "model", max_shard_size="40KB")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=re.escape(message)):
        open_weights(folder, read_config(folder))


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "model", max_shard_size="40KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, first)
    with pytest.raises(WeightsError, match="is in two files"):
        open_weights(folder, read_config(folder))


def test_two_files_without_an_index(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    config = read_config(folder)
    assert open_weights(folder, config).get("final_norm").shape == (64,)  # one file may have any name
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"2 \.safetensors files and neither"):
        open_weights(folder, config)


def change(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """None takes a tensor out."""
    path = folder / "model.safetensors"
    now = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in now.items() if tensor is not None}, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NORM: None}, f"lacks {NORM}"),
        ({NORM: torch.ones(63)}, f"{NORM} has shape [63]; the config asks for [64]"),
        ({"lm_head.weight": torch.ones(64, 96)}, "lm_head.weight has shape [64, 96]; the config asks for [96, 64]"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}, "does not have: model.layers.3.mlp.up_proj.weight"),
        ({NORM: torch.ones(64, dtype=torch.float64)}, f"{NORM} is of type F64; supported are F32, F16, BF16"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is of type I8"),
    ],
)
def test_what_does_not_fit_the_config_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str) -> None:
    folder = llama(tmp_path / "model")
    change(folder, tensors)
    with pytest.raises(WeightsError, match=re.escape(message)):
        open_weights(folder, read_config(folder))


def test_tables_that_follow_from_the_config_are_ignored(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", tie_word_embeddings=True)
    change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(96, 64)})
    assert "head" not in open_weights(folder, read_config(folder)).tensors


def test_truncated_anywhere_is_a_clean_error(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    config = read_config(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, 64, 7), *range(64, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
            open_weights(folder, config)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**63]}},
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}},
        {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"a": 1},
        [],
    ],
    ids=["offset_past_end", "huge_shape", "overflowing_shape", "negative", "backwards", "overlap", "unknown_type", "no_object", "a_list"],
)
def test_lying_headers(tmp_path: Path, header: Any) -> None:
    folder = llama(tmp_path / "model")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        open_weights(folder, read_config(folder))


def test_header_length_that_lies(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    for length in (2**63, 2**40, 10**8 + 1, 1000):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
            open_weights(folder, read_config(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture is 'MambaForCausalLM'; supported are LlamaForCausalLM"),
        ({"architectures": None}, "architecture is None"),
        ({"hidden_size": "64"}, "hidden_size = '64'; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"vocab_size": None}, "vocab_size = None"),
        ({"num_attention_heads": 0}, "num_heads = 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05"),
        ({"hidden_act": "relu"}, "activation is 'relu'; supported are silu, gelu_pytorch_tanh"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "kind 'yarn'; supported are linear and llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor = None"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"eos_token_id": "two"}, "token ids 'two'"),
    ],
)
def test_what_is_not_built_or_makes_no_sense_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = llama(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    edit_config(folder, **values)
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_config(folder)


def test_rotary_scaling_in_both_spellings(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    new = read_config(llama(tmp_path / "new", rope_parameters=LLAMA3)).layers[0]
    assert (new.rope_base, new.rope_scaling) == (500_000.0, scaling)
    folder = llama(tmp_path / "old")
    old = {**LLAMA3, "rope_theta": None}
    edit_config(folder, rope_parameters=None, rope_theta=500_000.0, rope_scaling=old)
    assert read_config(folder).layers[0] == new
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2})
    assert read_config(folder).layers[0].rope_scaling == RopeScaling("linear", 2.0)


def test_layer_types_place_the_windows(tmp_path: Path) -> None:
    folder = save(Qwen3ForCausalLM(Qwen3Config(**SIZES)), tmp_path / "model")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    edit_config(folder, use_sliding_window=True, sliding_window=32, layer_types=kinds)
    assert [layer.window for layer in read_config(folder).layers] == [32, None, 32]
    edit_config(folder, layer_types=kinds[:2])
    with pytest.raises(WeightsError, match="layer_types"):
        read_config(folder)


def test_without_layer_types_the_last_layers_have_the_window(tmp_path: Path) -> None:
    folder = save(Qwen3ForCausalLM(Qwen3Config(**SIZES)), tmp_path / "model")
    edit_config(folder, use_sliding_window=True, sliding_window=32, layer_types=None, max_window_layers=1)
    assert [layer.window for layer in read_config(folder).layers] == [None, 32, 32]
    edit_config(folder, use_sliding_window=False)
    assert [layer.window for layer in read_config(folder).layers] == [None, None, None]


def test_ends_come_from_the_generation_config_first(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 7]}')
    assert read_config(folder).eos_ids == (7, 2)
    (folder / "generation_config.json").unlink()
    assert read_config(folder).eos_ids == (2,)


def test_code_that_ships_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (folder / "modeling.py").write_text("raise SystemExit('it ran')")
    config = read_config(folder)
    assert open_weights(folder, config).get("embedding").shape == (96, 64)
