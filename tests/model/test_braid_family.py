"""The family "braid": its config reads back what was written, refuses what makes no sense, and its folder holds the grid's vectors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import WeightsError
from service.model.config import LayerAttention, ModelConfig, RopeScaling
from service.model.families import braid_config, read_config
from service.model.weights import open_weights
from tests.parity.braid import CONFIG, LOCAL, random_weights, write_folder

GLOBAL = LayerAttention(rope_base=LOCAL.rope_base)
OF_THE_FAMILY = {
    "hybrid": CONFIG,
    "text": replace(CONFIG, pictures=None, layers=(GLOBAL, replace(LOCAL, radius=None))),
    "all_global": replace(CONFIG, layers=(GLOBAL,) * 2),
    "all_local": replace(CONFIG, layers=(LOCAL,) * 2),
    "no_window": replace(CONFIG, layers=(replace(LOCAL, window=None, sink=0), GLOBAL)),
    "no_qk_norm": replace(CONFIG, has_qk_norm=False),
    "no_radius": replace(CONFIG, layers=(replace(LOCAL, radius=None), GLOBAL)),
    "other_numbers": replace(CONFIG, has_tied_head=False, activation="gelu_tanh", eos_ids=(2, 5), bos_id=None, norm_eps=1e-6),
}


def written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("config", OF_THE_FAMILY.values(), ids=OF_THE_FAMILY.keys())
def test_what_is_written_is_read_back(tmp_path: Path, config: ModelConfig) -> None:
    assert read_config(written(tmp_path, braid_config(config))) == config


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, has_qkv_bias=True),
        replace(CONFIG, scale=0.5),
        replace(CONFIG, layers=(LOCAL, replace(LOCAL, window=9), GLOBAL)),
        replace(CONFIG, layers=(LOCAL, replace(GLOBAL, rope_base=5.0))),
        replace(CONFIG, layers=(replace(LOCAL, softcap=3.0), GLOBAL)),
        replace(CONFIG, layers=(replace(GLOBAL, rope_scaling=RopeScaling("linear", 2.0)),)),
    ],
)
def test_other_models_have_no_words_in_it(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no words"):
        braid_config(config)


def image(**values: Any) -> dict[str, Any]:
    return {"image": {**braid_config(CONFIG)["image"], **values}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": None}, "head_dim = None"),
        ({"hidden_size": 2.5}, "hidden_size = 2.5"),
        ({"hidden_act": "relu"}, "activation is 'relu'"),
        ({"layer_types": None}, "layer_types"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "full_attention", ["full_attention"]]}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": 2**31}, "sliding_window = 2147483648"),
        ({"sliding_window": "8"}, "sliding_window = '8'"),
        ({"attention_sink": -1}, "attention_sink = -1"),
        ({"neighbourhood_radius": 2}, "neighbourhood_radius = 2"),
        ({"neighbourhood_radius": [1]}, "neighbourhood_radius = [1]"),
        ({"neighbourhood_radius": [1, -1]}, "neighbourhood_radius = [1, -1]"),
        ({"neighbourhood_radius": [1, True]}, "neighbourhood_radius = [1, True]"),
        ({"neighbourhood_radius": [1, 2**40]}, "neighbourhood_radius"),
        ({"image": None}, "a neighbourhood_radius and no image"),
        ({"image": [1]}, "an image that is not an object"),
        (image(rows=None), "rows = None"),
        (image(rows=0), "0 x 5 codes"),
        (image(columns=-5, rows=-4), "-4 x -5 codes"),
        (image(rows=40), "40 x 5 codes does not fit into a context of 160"),
        (image(num_codes=0), "image codes 60"),
        (image(num_codes=37), "image codes 60 ... lie outside the vocabulary of 96"),
        (image(first_code=-1), "image codes -1"),
        (image(begin_id=61), "three ids"),
        (image(end_id=96), "three ids"),
        (image(frame_id=51), "three ids"),
        ({"model_type": "other"}, "architecture is None"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_config(written(tmp_path, {**braid_config(CONFIG), **values}))


def test_a_folder_with_the_vectors_of_its_grid(tmp_path: Path) -> None:
    weights = random_weights()
    folder = write_folder(tmp_path, weights)
    written(folder / "image_tokenizer", {"not": "read"})
    source = open_weights(folder, read_config(folder))
    for name, tensor in weights.items():
        assert torch.equal(source.get(name), tensor)
    write_folder(folder, {name: tensor for name, tensor in weights.items() if name != "grid_rows"})
    with pytest.raises(WeightsError, match=re.escape("lacks model.grid_rows.weight")):
        open_weights(folder, read_config(folder))
    write_folder(folder, {**weights, "grid_columns": weights["grid_columns"][:4]})
    with pytest.raises(WeightsError, match=re.escape("model.grid_columns.weight has shape [4, 48]")):
        open_weights(folder, read_config(folder))
