"""Recipes: those that come with the package make sense, and a mistake in one is named by its key."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import StartupError, WeightsError
from service.model.vq import VQTokenizer
from training.recipe import RECIPES, SOURCES, parse_recipe, read_recipe, recipe_names


def smoke() -> dict[str, Any]:
    return tomllib.loads((RECIPES / "smoke.toml").read_text())


def with_value(key: str, value: object) -> dict[str, Any]:
    """The smoke recipe with one key, written with dots, changed; None takes it out."""
    values = smoke()
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return values


def num_parameters(name: str) -> float:
    """Of decoder and image tokenizer together, in millions."""
    recipe = read_recipe(name)
    with torch.device("meta"):
        vq = VQTokenizer(recipe.tokenizer.model)
    return (recipe.model_config().num_parameters + sum(each.numel() for each in vq.parameters())) / 1e6


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_under_its_own_name(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # ranks get it so
    assert "fluent3d" not in recipe.data.styles  # the style that no tokenizer is trained on
    for stage in (recipe.tokenizer.reconstruction, recipe.pretrain.schedule, recipe.multitask.schedule):
        assert 0 < stage.warmup_steps < stage.steps


def test_sizes_are_what_the_names_promise() -> None:
    assert 5 <= num_parameters("nano") <= 10
    assert 33 <= num_parameters("small") <= 40


def test_the_decoder_has_local_and_global_layers() -> None:
    config = read_recipe("nano").model_config()
    assert [layer.window for layer in config.layers] == [96, None] * 3
    assert [layer.radius for layer in config.layers] == [(2, 3), None] * 3
    assert config.vocab_size == 2048 + 1024
    assert config.pictures is not None
    assert (config.pictures.first_code, config.pictures.rows, config.pictures.columns) == (2048, 8, 8)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("surprise", 1, "surprise"),
        ("tokenizer.model.chanels", [8], "tokenizer.model.chanels"),
        ("pretrain.schedule.step", 3, "pretrain.schedule.step"),
        ("multitask.settings.lr", 0.1, "multitask.settings.lr"),
        ("decoder", None, "decoder"),
        ("pretrain.schedule.steps", None, "pretrain.schedule"),
        ("pretrain.schedule.steps", "many", "pretrain.schedule.steps"),
        ("pretrain.mix.world_draw", "much", "pretrain.mix"),
        ("precision", "fp8", "precision"),
        ("multitask.settings.optimizer", "sgd", "multitask.settings.optimizer"),
        ("data.size", 40, "data.size"),
        ("data.memory_styles", ["noto"], "data.memory_styles"),
        ("tokenizer.model.channels", [8] * 8, "data.size"),
        ("decoder.global_every", 3, "decoder.num_layers"),
        ("decoder.head_width", 15, "head_width"),
        ("decoder.num_kv_heads", 3, "key/value heads"),
        ("multitask.mix.world_fly", 0.1, "world_fly"),
        ("multitask.mix.world_draw", -1.0, "multitask.mix"),
        ("multitask.mix.text", 0.1, "data.texts"),
        ("multitask.mix.emoji_draw", 0.1, "data.memory_count"),
        ("pretrain.mix", {}, "pretrain.mix"),
        ("decoder.max_context", 325, "decoder.max_context"),
        ("multitask.later", [{"step": 2, "mix": {"text": 1.0}}], "data.texts"),
        ("multitask.later", [{"step": 2, "mix": {"world_ask": 1.0}, "stop": 3}], "multitask.later.stop"),
        ("multitask.later", [{"step": each, "mix": {"world_ask": 1.0}} for each in (4, 2)], "multitask.later has the steps [4, 2]"),
        ("multitask.later", [{"step": 6, "mix": {"world_ask": 1.0}}], "within the 6 of its schedule"),
    ],
)
def test_a_mistake_is_named(key: str, value: object, wanted: str) -> None:
    with pytest.raises((ValueError, WeightsError)) as caught:
        parse_recipe(with_value(key, value))
    assert wanted in (getattr(caught.value, "message", "") or str(caught.value))


def test_what_was_changed_right_is_taken() -> None:
    """The control of the test above."""
    assert parse_recipe(with_value("decoder.num_layers", 4)).decoder.num_layers == 4
    assert set(parse_recipe(with_value("pretrain.mix", {"world_ask": 1.0})).pretrain.mix) <= set(SOURCES)
    later = [{"step": each, "mix": {name: 1.0}} for each, name in ((2, "world_ask"), (4, "world_draw"))]
    assert parse_recipe(with_value("multitask.later", later)).multitask.sources == (
        "world_draw",
        "world_describe",
        "world_edit",
        "world_ask",
    )


def test_precision_holds_for_stages_that_name_none() -> None:
    values = with_value("pretrain.settings.precision", "auto")
    values["precision"] = "bf16"
    recipe = parse_recipe(values)
    assert [stage.settings.precision for stage in (recipe.tokenizer, recipe.pretrain, recipe.multitask)] == ["bf16", "auto", "bf16"]


def test_a_file_is_a_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text((RECIPES / "smoke.toml").read_text().replace("seed = 0", "").replace('name = "smoke"', 'name = "own"\nseed = 5'))
    recipe = read_recipe(str(path))
    assert (recipe.name, recipe.seed) == ("own", 5)
    path.write_text("name = ")
    with pytest.raises(StartupError, match=r"own\.toml is no TOML"):
        read_recipe(str(path))
    path.write_text('name = "own"\nwrong = 1')
    with pytest.raises(StartupError, match=r"own\.toml: nothing is called wrong"):
        read_recipe(str(path))


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(StartupError, match="nano, nano-gpu, small, smoke"):
        read_recipe("huge")
