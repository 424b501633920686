"""Checkpoints of mixtures of experts: every form of file gives the same matrices, and how they are held; damaged ones are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from kernels.ops import GroupedWeight, select_ops
from service.errors import WeightsError
from service.footprint import weight_bytes
from service.model import prepared
from service.model.config import Experts, ModelConfig, expected_shapes
from service.model.families import HF_NAMES, read_config
from service.model.prepared import open_shelf
from service.model.rotation import RotatedSource
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.runner.load import choose_storage
from tests.model.checkpoints import TINY, gguf_name, random_tensors, write_gguf
from tests.parity.steps import Steps

EXPERTS = Experts(count=4, top_k=2, width=32, is_normalised=True, is_sparse=(False, True))
QWEN3 = dataclasses.replace(TINY, has_qk_norm=True, experts=EXPERTS)
QWEN2 = dataclasses.replace(
    TINY, has_qkv_bias=True, experts=dataclasses.replace(EXPERTS, is_normalised=False, is_sparse=(True, True), shared_width=64)
)
MIXTRAL = dataclasses.replace(TINY, feed_forward_width=32, experts=dataclasses.replace(EXPERTS, is_sparse=(True, True)))
CONFIGS = {"qwen3moe": QWEN3, "qwen2moe": QWEN2, "llama": MIXTRAL}
IDS = [1, 5, 9, 3, 70, 33, 20, 8]


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Matrices that neither shrink nor blow up what they multiply: else a rounding changes where tokens go."""
    return {name: array / 8 if name.startswith("layers.") and array.ndim == 2 else array for name, array in random_tensors(config).items()}


def as_file(config: ModelConfig, tensors: Mapping[str, np.ndarray], family: str, types: Mapping[str, Type]) -> tuple[Any, Any]:
    """Tensors and types under the names that a GGUF file has for them, experts in three dimensions."""
    given, kinds = {}, {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        target, stored = name, tensor
        if part in ("gate", "up", "down") and config.experts_of(int(layer.split(".")[1])) is not None:
            target = gguf_name(name).replace(".weight", "_exps.weight")
            stored = tensor.reshape(EXPERTS.count, -1, tensor.shape[-1])
        if part == "shared_router":
            target, stored = gguf_name(name), tensor[0]
        given[target], kinds[target] = stored, types.get(name, Type.F32)
    return given, kinds


def write_file(path: Path, family: str, types: Mapping[str, Type] | None = None, **metadata: Any) -> Path:
    config = CONFIGS[family]
    experts = config.experts
    assert experts is not None
    numbers = {"expert_count": experts.count, "expert_used_count": experts.top_k, "expert_feed_forward_length": experts.width}
    numbers |= {"expert_shared_feed_forward_length": experts.shared_width} if experts.shared_width else {}
    given, kinds = as_file(config, tensors_of(config), family, types or {})
    told = {f"{family}.{key}": value for key, value in numbers.items()} | metadata
    return write_gguf(path, config, given, family=family, types=kinds, metadata=told)


def hf_name(name: str) -> str:
    if not name.startswith("layers."):
        return HF_NAMES[name]
    _, index, part = name.split(".")
    return HF_NAMES["layers.{}." + part].format(index)


def write_folder(folder: Path, form: Literal["each", "fused", "mixtral"], edit: Any = None, **values: Any) -> Path:
    """A folder of the first family (or Mixtral), with a tensor for each expert or one for all. edit: changes the tensors in place."""
    config = MIXTRAL if form == "mixtral" else QWEN3
    found: dict[str, torch.Tensor] = {}
    for name, array in tensors_of(config).items():
        layer, _, part = name.rpartition(".")
        tensor, theirs = torch.from_numpy(array), hf_name(name)
        if part not in ("gate", "up", "down", "router") or config.experts_of(int(layer.split(".")[1])) is None:
            found[theirs] = tensor
        elif part == "router":
            found[theirs.replace(".mlp.", ".block_sparse_moe.") if form == "mixtral" else theirs] = tensor
        else:
            stem, projection = theirs.removesuffix(".weight").rsplit(".", 1)
            for expert, rows in enumerate(tensor.chunk(EXPERTS.count)):
                found[f"{stem}.experts.{expert}.{projection}.weight"] = rows.clone()
    if form == "mixtral":
        calls = {"mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for ours, theirs in calls.items():
            found = {name.replace(ours, theirs): tensor for name, tensor in found.items()}
    if form == "fused":
        stem = "model.layers.1.mlp.experts."
        each = {part: [found.pop(f"{stem}{e}.{part}_proj.weight") for e in range(EXPERTS.count)] for part in ("gate", "up", "down")}
        found[stem + "gate_up_proj"] = torch.cat([torch.stack(each["gate"]), torch.stack(each["up"])], dim=1)
        found[stem + "down_proj"] = torch.stack(each["down"])
    if edit is not None:
        edit(found)
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    told = {
        "architectures": ["MixtralForCausalLM" if form == "mixtral" else "Qwen3MoeForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": EXPERTS.top_k,
        "num_local_experts" if form == "mixtral" else "num_experts": EXPERTS.count,
    }
    told |= {} if form == "mixtral" else {"moe_intermediate_size": EXPERTS.width, "norm_topk_prob": True, "mlp_only_layers": [0]}
    (folder / "config.json").write_text(json.dumps(told | values))
    return folder


def build(path: Path, weights: str = "dense", back_end: Literal["cpu", "reference"] = "cpu") -> Transformer:
    config, precision = read_config(path), Precision(torch.float32, weights)  # type: ignore[arg-type]
    return build_transformer(config, open_weights(path, config), select_ops(back_end), precision=precision)


def logits(model: Transformer) -> torch.Tensor:
    return Steps(model, block_size=16, num_blocks=8).run([(0, IDS)])[0]


@pytest.mark.parametrize("form", ["each", "fused", "mixtral"])
def test_every_form_of_folder_gives_the_same(tmp_path: Path, form: Any) -> None:
    path = write_folder(tmp_path / "model", form)
    expected = MIXTRAL if form == "mixtral" else QWEN3
    config = read_config(path)
    assert config == expected
    source = open_weights(path, config)
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(source.get(name), torch.from_numpy(tensor)), name


@pytest.mark.parametrize("family", CONFIGS)
def test_gguf_files_give_the_same(tmp_path: Path, family: str) -> None:
    path = write_file(tmp_path / "tiny.gguf", family)
    config = read_config(path)
    assert config == CONFIGS[family]
    source = open_weights(path, config)
    for name, tensor in tensors_of(config).items():
        assert torch.equal(source.get(name), torch.from_numpy(tensor)), name


@pytest.mark.parametrize("family", ["qwen3moe", "qwen2moe"])
def test_a_files_groups_are_kept(tmp_path: Path, family: str) -> None:
    shapes = expected_shapes(CONFIGS[family])
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and "router" not in name]
    path = write_file(tmp_path / "tiny.gguf", family, dict.fromkeys(matrices, Type.Q8_0))
    kept, dense = build(path, "int4"), build(path)
    assert kept.basis is None, "what is kept is not rotated"
    experts = kept.weights[1].experts
    assert experts is not None
    assert isinstance(experts.gate_up, GroupedWeight)
    assert (experts.gate_up.bits, experts.gate_up.out_features) == (8, EXPERTS.count * 2 * EXPERTS.width)
    assert float((logits(kept) - logits(dense)).norm() / logits(dense).norm()) < 0.05, "only activations are quantised"
    config = read_config(path)
    assert weight_bytes(config, choose_storage("int4", torch.device("cpu")), open_weights(path, config)) == kept.held_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_planned_weights_are_the_loaded_ones(tmp_path: Path, dtype: str, family: str) -> None:
    path = write_file(tmp_path / "tiny.gguf", family)
    config, storage = read_config(path), choose_storage(dtype, torch.device("cpu"))
    loaded = build_transformer(config, open_weights(path, config), select_ops("reference"), precision=storage.precision)
    assert weight_bytes(config, storage) == loaded.held_bytes
    idle = (config.num_parameters - config.num_active_parameters) / (config.num_parameters)
    assert loaded.read_bytes < loaded.held_bytes * (1 - idle / 2), "a step of one token reads only some of the experts"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_rotated_model_is_the_same_function(tmp_path: Path, family: str) -> None:
    path = write_file(tmp_path / "tiny.gguf", family)
    config = read_config(path)
    source = RotatedSource(open_weights(path, config), config)
    untied = dataclasses.replace(config, has_tied_head=False)
    rotated = build_transformer(untied, source, select_ops("cpu"), precision=Precision(torch.float32))
    torch.testing.assert_close(logits(rotated), logits(build(path)), rtol=1e-4, atol=1e-4)


def test_prepared_weights_are_those_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_LEAST_BYTES", 1)
    monkeypatch.setattr(prepared, "_CALM_S", -1.0)
    path = write_file(tmp_path / "tiny.gguf", "qwen2moe")
    found = []
    for is_filled in (False, True):
        shelf = open_shelf(path, read_config(path), "int8", tmp_path / "kept", 2**30)
        assert shelf is not None
        assert shelf.is_filled is is_filled
        model = build_transformer(read_config(path), shelf, select_ops("cpu"), precision=Precision(torch.float32, "int8"))
        shelf.keep()
        found.append(logits(model))
    assert torch.equal(*found)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


ONE = "model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{ONE}2.up_proj.weight"), f"the checkpoint lacks {ONE}2.up_proj.weight; its config says 4 experts"),
        (add(f"{ONE}4.up_proj.weight", 32, 64), f"the checkpoint holds {ONE}4.up_proj.weight; its config says 4 experts"),
        (add(f"{ONE}1.down_proj.weight", 64, 31), f"{ONE}1.down_proj.weight is F32 of shape [64, 31]"),
        (add(f"{ONE}1.down_proj.weight", 64, 32, dtype=torch.float16), f"{ONE}1.down_proj.weight is F16 of shape [64, 32]"),
        (add(f"{ONE}1.mystery.weight", 64, 32), f"lacks {ONE}0.mystery.weight"),
        (drop("model.layers.1.mlp.gate.weight"), "lacks model.layers.1.mlp.gate.weight"),
    ],
)
def test_damaged_experts_are_named(tmp_path: Path, edit: Any, message: str) -> None:
    path = write_folder(tmp_path / "model", "each", edit)
    with pytest.raises(WeightsError, match=re.escape(message)):
        open_weights(path, read_config(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 5}, "4 experts of width 32, 5 for a token"),
        ({"moe_intermediate_size": 0}, "4 experts of width 0"),
        ({"num_experts": None}, "num_experts = None"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"mlp_only_layers": "none"}, "mlp_only_layers = 'none'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_config(write_folder(tmp_path / "model", "each", **values))


def test_a_model_whose_layers_all_have_one_block_has_no_experts(tmp_path: Path) -> None:
    assert read_config(write_folder(tmp_path / "model", "each", mlp_only_layers=[0, 1])).experts is None


def test_widths_that_strips_would_cut_through_are_refused_where_packed(tmp_path: Path) -> None:
    config = dataclasses.replace(QWEN3, experts=dataclasses.replace(EXPERTS, width=20))
    tensors = {name: torch.from_numpy(array) for name, array in tensors_of(config).items()}

    class Source:
        def get(self, name: str) -> torch.Tensor:
            return tensors[name]

    build_transformer(config, Source(), select_ops("cpu"), precision=Precision(torch.float32))
    with pytest.raises(WeightsError, match=r"experts of width 20 .* multiple of 8"):
        build_transformer(config, Source(), select_ops("cpu"), precision=Precision(torch.float32, "int8"))
