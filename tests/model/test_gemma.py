"""Gemma's three generations from folders and GGUF files: what configs leave out, two rotary bases, softcaps, and how a model with post
norms is held without a rotation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from kernels.ops import GroupedWeight, select_ops
from service.checkpoint import open_gguf
from service.errors import WeightsError
from service.footprint import weight_bytes
from service.model.config import LayerAttention, ModelConfig, RopeScaling, expected_shapes
from service.model.families import HF_NAMES, HF_POST_NORM_NAMES, read_config, read_gguf_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.runner.load import choose_storage
from service.scheduling.sampling import SamplingParams
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.parity.generate import generate
from tests.parity.steps import Steps

LOCAL, WHOLE = LayerAttention(window=9), LayerAttention(rope_base=1e6, rope_scaling=RopeScaling("linear", 8.0))
GEMMA = dataclasses.replace(
    TINY,
    layers=(*(LOCAL,) * 5, WHOLE, LOCAL),
    activation="gelu_tanh",
    has_qk_norm=True,
    has_post_norms=True,
    embedding_scale=8.0,
    scale=0.25,
    norm_offset=1.0,
)
IN_GGUF = dataclasses.replace(GEMMA, norm_offset=0.0)
CONFIG = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": TINY.norm_eps,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "query_pre_attn_scalar": 16,
    "sliding_window": 9,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "eos_token_id": [2],
    "bos_token_id": 1,
}
METADATA = {
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "gemma3.attention.sliding_window": 9,
    "gemma3.attention.key_length": 16,
    "gemma3.attention.value_length": 16,
    "gemma3.attention.scale": 0.25,
}
TENSORS = {name: values * (0.1 if values.ndim > 1 else 0.2) for name, values in random_tensors(GEMMA).items()}
IDS = [(5 * i * i + 11 * i + 2) % 96 for i in range(40)]


def file_name(name: str, has_post_norms: bool) -> str:
    names = HF_NAMES | (HF_POST_NORM_NAMES if has_post_norms else {})
    if not name.startswith("layers."):
        return names[name]
    _, index, part = name.split(".")
    return names["layers.{}." + part].format(index)


def write_folder(
    folder: Path,
    config: dict[str, Any],
    prefix: str = "",
    more: dict[str, torch.Tensor] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    has_post_norms = tensors is None or "layers.0.out_norm" in tensors
    named = {file_name(name, has_post_norms): torch.from_numpy(x) for name, x in (tensors or TENSORS).items()}
    prefixed = {prefix + name.removeprefix("model." * bool(prefix)): x for name, x in named.items()}
    save_file(prefixed | (more or {}), folder / "model.safetensors")
    return folder


def write_file(path: Path, types: dict[str, Type] | None = None, **metadata: Any) -> Path:
    """As llama.cpp's converter does: norm weights with their one."""
    tensors = {name: values + 1 if "norm" in name else values for name, values in TENSORS.items()}
    return write_gguf(path, IN_GGUF, tensors, family="gemma3", types=types, metadata=METADATA | metadata)


def build(path: Path, weights: str = "dense", back_end: str = "cpu") -> Transformer:
    config = read_config(path)
    precision = Precision(torch.float32, weights)  # type: ignore[arg-type]
    return build_transformer(config, open_weights(path, config), select_ops(back_end), precision=precision)  # type: ignore[arg-type]


def logits(model: Transformer, ids: list[int] = IDS) -> torch.Tensor:
    return Steps(model).run([(0, ids)])[0]


def test_a_folder_says_what_a_model_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIG)
    assert read_config(folder) == GEMMA
    source = open_weights(folder, GEMMA)
    assert set(source.tensors) == set(TENSORS)
    for name in TENSORS:
        assert torch.equal(source.get(name), torch.from_numpy(TENSORS[name]) + ("norm" in name)), name


def test_newer_configs_name_both_rotations(tmp_path: Path) -> None:
    rotations = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    kinds = ["full_attention" if layer == WHOLE else "sliding_attention" for layer in GEMMA.layers]
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    config = {key: value for key, value in CONFIG.items() if key not in old}
    folder = write_folder(tmp_path / "model", {**config, "rope_parameters": rotations, "layer_types": kinds})
    assert read_config(folder) == GEMMA


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_inside_one_that_reads_pictures(tmp_path: Path, prefix: str) -> None:
    inner = {key: value for key, value in CONFIG.items() if key not in ("architectures", "bos_token_id", "eos_token_id")}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner, "eos_token_id": [2]}
    beside = {"vision_tower.patch.weight": torch.zeros(3), "multi_modal_projector.norm.weight": torch.zeros(3)}
    folder = write_folder(tmp_path / "model", whole, prefix, beside)
    assert read_config(folder) == dataclasses.replace(GEMMA, bos_id=2), "2 is what published configs leave out"
    assert torch.equal(open_weights(folder, GEMMA).get("layers.3.out_norm"), torch.from_numpy(TENSORS["layers.3.out_norm"]) + 1)


def test_what_a_published_config_leaves_out(tmp_path: Path) -> None:
    """Of the 4B: a text_config of six keys."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}))
    (tmp_path / "model.safetensors").touch()
    config = read_config(tmp_path)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_width) == (262_208, 8, 4, 256)
    assert (config.max_context, config.scale, config.eos_ids, config.bos_id) == (131_072, 1 / 16, (1,), 2)
    assert config.embedding_scale == math.sqrt(2560)
    assert config.has_tied_head
    assert [index for index, layer in enumerate(config.layers) if layer.window is None] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_logit_softcapping": -50.0}, "attn_logit_softcapping = -50.0"),
        ({"final_logit_softcapping": "a"}, "final_logit_softcapping = 'a'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention, which is not supported"),
        ({"text_config": 3}, "a text_config that is not an object"),
        ({"rope_scaling": 3}, "rotary parameters that are not an object for each kind of layer"),
        ({"rope_parameters": {"full_attention": [1]}}, "rotary parameters that are not an object for each kind of layer"),
        ({"sliding_window_pattern": 0}, "a pattern of 0 layers"),
        ({"layer_types": ["local"]}, "layer_types that are not one of"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1"),
        ({"hidden_activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | values))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match=message):
        read_config(tmp_path)


def test_a_file_is_the_same_model(tmp_path: Path) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    assert read_config(path) == IN_GGUF
    folder = write_folder(tmp_path / "model", CONFIG)
    found = logits(build(path))
    torch.testing.assert_close(found, logits(build(folder)), atol=1e-4, rtol=1e-4)
    assert float(found.std()) > 0.5, "flat logits would hide a wrong layer"


def test_a_file_may_say_which_layers_are_local(tmp_path: Path) -> None:
    says = {"gemma3.attention.sliding_window_pattern": 2, "gemma3.rope.freq_base_swa": 5e3}
    config = read_config(write_file(tmp_path / "tiny.gguf", **says))
    assert [layer.window for layer in config.layers] == [9, None, 9, None, 9, None, 9]
    assert [layer.rope_base for layer in config.layers[:2]] == [5e3, 1e6]


def test_the_27b_scales_its_queries_by_its_width(tmp_path: Path) -> None:
    many = dataclasses.replace(IN_GGUF, layers=(LOCAL,) * 62)
    path = write_gguf(tmp_path / "many.gguf", many, {}, family="gemma3", metadata={**METADATA, "gemma3.attention.scale": None})
    assert read_config(path).scale == pytest.approx((64 / 4) ** -0.5)


@pytest.mark.parametrize("pattern", [[True, False], 0])
def test_a_pattern_that_no_file_can_have_is_refused(tmp_path: Path, pattern: object) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    gguf = open_gguf(path, with_tokens=False)
    metadata = {**gguf.metadata, "gemma3.attention.sliding_window_pattern": pattern}
    with pytest.raises(WeightsError, match="pattern"):
        read_gguf_config(dataclasses.replace(gguf, metadata=metadata))


# --- the generations before ----------------------------------------------------------------------------------------------------------

SECOND = dataclasses.replace(
    GEMMA,
    layers=tuple(LayerAttention(window, softcap=2.0) for window in (9, None, 9)),
    has_qk_norm=False,
    logit_softcap=3.0,
)
FIRST = dataclasses.replace(GEMMA, layers=(LayerAttention(),) * 3, has_qk_norm=False, has_post_norms=False)
OLDER = {key: value for key, value in CONFIG.items() if not key.startswith("rope")} | {"num_hidden_layers": 3, "hidden_activation": None}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


@pytest.mark.parametrize(
    ("family", "architecture", "config", "more"),
    [("gemma", "GemmaForCausalLM", FIRST, {"sliding_window": None}), ("gemma2", "Gemma2ForCausalLM", SECOND, SOFTCAPS)],
)
def test_an_older_one_is_the_same_from_a_folder_and_a_file(
    tmp_path: Path, family: str, architecture: str, config: ModelConfig, more: dict[str, Any]
) -> None:
    tensors = {name: TENSORS[name] for name in expected_shapes(config)}
    folder = write_folder(tmp_path / "model", {**OLDER, "architectures": [architecture], **more}, tensors=tensors)
    assert read_config(folder) == config
    metadata = {key.replace("gemma3", family): value for key, value in METADATA.items() if "rope" not in key}
    if family == "gemma":
        del metadata["gemma.attention.sliding_window"]
    metadata |= {f"{family}.{key}": value for key, value in more.items() if value}
    whole = {name: values + 1 if "norm" in name else values for name, values in tensors.items()}
    path = write_gguf(tmp_path / "tiny.gguf", config, whole, family=family, metadata=metadata)
    assert read_config(path) == dataclasses.replace(config, norm_offset=0.0)
    torch.testing.assert_close(logits(build(path)), logits(build(folder)), atol=1e-4, rtol=1e-4)
    assert float(logits(build(path)).abs().max()) <= 3 or family == "gemma"
    rotated, exact = build(path, "int8"), logits(build(path))
    assert (rotated.basis is None) == config.has_post_norms, "where only its norms' weights are stored otherwise, it is rotated"
    assert float((logits(rotated) - exact).norm() / exact.norm()) < 0.05


def test_what_files_of_the_second_leave_out(tmp_path: Path) -> None:
    few = {key: METADATA[f"gemma3.{key}"] for key in ("attention.key_length", "attention.value_length")}
    path = write_gguf(tmp_path / "a.gguf", SECOND, {}, family="gemma2", metadata={f"gemma2.{key}": value for key, value in few.items()})
    config = read_config(path)
    assert config.layers == tuple(LayerAttention(window, softcap=50.0) for window in (4096, None, 4096))
    assert (config.logit_softcap, config.attention_scale) == (30.0, 0.25)


@pytest.mark.parametrize("weights", ["dense", "int8"])
def test_ids_are_drawn_from_capped_logits(tmp_path: Path, weights: str) -> None:
    """With a tiny cap all ids are equally likely; as they are, the logits of these weights leave a few."""
    tensors = {name: TENSORS[name] * (10 if name == "final_norm" else 1) for name in expected_shapes(SECOND)}
    config = {**OLDER, "architectures": ["Gemma2ForCausalLM"], **SOFTCAPS}
    distinct = {}
    for cap in (0.01, None):
        folder = write_folder(tmp_path / f"cap {cap}", {**config, "final_logit_softcapping": cap}, tensors=tensors)
        model, ids = build(folder, weights), []
        for seed in range(40):
            ids += generate(model, [IDS[:5]], SamplingParams(max_tokens=1, temperature=1.0, seed=seed), num_blocks=64).ids[0]
        distinct[cap] = len(set(ids))
    assert distinct[0.01] > 25
    assert distinct[None] < 20


def test_embeddings_are_scaled_in_the_dtype_of_the_activations() -> None:
    class Random:
        def get(self, name: str) -> torch.Tensor:
            return torch.from_numpy(np.ones(expected_shapes(config)[name], dtype=np.float32))

    config: ModelConfig = dataclasses.replace(GEMMA, embedding_scale=math.sqrt(640))
    for dtype, factor in ((torch.float32, math.sqrt(640)), (torch.bfloat16, 25.25)):
        model = build_transformer(config, Random(), select_ops("reference"), precision=Precision(dtype))
        assert float(model._embedded(torch.tensor([3]))[0, 0]) == pytest.approx(factor, abs=1e-6)


# --- int8 and int4 ----------------------------------------------------------------------------------------------------------------

MATRICES = ("qkv", "out", "gate_up", "down")


@pytest.mark.parametrize(
    ("weights", "bits", "error"),
    [("int8", {"qkv": 8, "out": 8, "gate_up": 8, "down": 8}, 0.05), ("int4", {"qkv": 8, "out": 4, "gate_up": 4, "down": 8}, 0.3)],
)
def test_nothing_is_rotated_and_all_numbers_are_in_groups(tmp_path: Path, weights: str, bits: dict[str, int], error: float) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    model = build(path, weights)
    assert {name: getattr(model.layers[0].weights, name).bits for name in MATRICES} == bits  # type: ignore[union-attr]
    assert model.embedding is model.head, "a tied table is held once"
    assert model.basis is None
    config = read_config(path)
    assert weight_bytes(config, choose_storage(weights, torch.device("cpu")), open_weights(path, config)) == model.held_bytes
    exact = logits(build(path))
    assert float((logits(model) - exact).norm() / exact.norm()) < error


def test_a_files_groups_are_kept_in_int8_too(tmp_path: Path) -> None:
    types = {f"layers.{index}.{name}": Type.Q8_0 for index in range(7) for name in ("q", "k", "v", "gate")}
    path = write_file(tmp_path / "tiny.gguf", {**types, "layers.0.out": Type.Q4_0, "embedding": Type.Q8_0})
    model, config = build(path, "int8", "reference"), read_config(path)
    first = model.layers[0].weights
    kept = open_weights(path, config).get_grouped("layers.0.q")
    assert isinstance(first.qkv, GroupedWeight)  # type: ignore[union-attr]
    assert torch.equal(first.qkv.values[: len(kept.values)], kept.values)  # type: ignore[union-attr]
    assert [first.out.bits, first.gate_up.bits, first.down.bits] == [4, 8, 8]  # type: ignore[union-attr]
    assert weight_bytes(config, choose_storage("int8", torch.device("cpu")), open_weights(path, config)) == model.held_bytes


def test_numbers_are_in_groups_on_every_device(tmp_path: Path) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    config = read_config(path)
    with torch.device("meta"):
        model = build_transformer(
            config, open_weights(path, config), select_ops("reference"), precision=Precision(torch.bfloat16, "int8"), device="meta"
        )
    assert isinstance(model.head, GroupedWeight)
    assert isinstance(model.layers[0].weights.down, GroupedWeight)  # type: ignore[union-attr]
    assert model.basis is None


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_alone_in_pieces_and_in_a_crowd_to_the_bit(tmp_path: Path, weights: str) -> None:
    model = build(write_file(tmp_path / "tiny.gguf"), weights)
    alone = logits(model)
    steps = Steps(model, num_blocks=400)
    others = [(sequence, [(7 * i + sequence) % 96 for i in range(3 + sequence)]) for sequence in range(1, 5)]
    parts = [steps.run([*others, (0, IDS[:17])])[-1]]
    for at in range(17, len(IDS)):
        parts.append(steps.run([(0, IDS[at : at + 1]), *((sequence, [sequence + at]) for sequence, _ in others)])[0])
    assert torch.equal(torch.cat(parts), alone)
    steps.forget(0)
    assert torch.equal(steps.run([(0, IDS), (1, [5])])[0], alone)
