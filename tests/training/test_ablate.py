"""Ablations: arms differ in what they say and in nothing else, go on where they were, and are written down once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock

from service.model.config import LayerAttention
from training import ablate, materials
from training.ablate import Bench, find_result, kv_bytes, read_results, write_result
from training.arms import ABLATIONS, Budget, arms_of, base_changes, changed
from training.evaluate.apart import told_apart
from training.language import LanguageStage
from training.log import read_csv
from training.picture.stage import ReconstructionStage
from training.recipe import Recipe, read_recipe

BUDGET = Budget(steps=4, pretrain_steps=2, reconstruction_steps=3, adversarial_steps=2, count=2)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(one: Recipe, other: Recipe) -> set[str]:
    first, second = flat(asdict(one)), flat(asdict(other))
    return {key for key in first | second if first.get(key) != second.get(key)}


@pytest.mark.parametrize("recipe", ["nano", "smoke"])
def test_an_arm_changes_what_it_says_and_nothing_else(recipe: str) -> None:
    base = changed(read_recipe(recipe), base_changes(BUDGET))
    for name, arm in arms_of(BUDGET).items():
        found = differences(base, changed(base, arm.changes))
        keys, said = {key.partition(".mix.")[0] for key in found}, {key.removesuffix(".mix") for key in arm.changes}
        assert keys <= said, name
        assert bool(keys) == bool(said), name


def test_all_global_has_no_local_layer_and_keeps_more() -> None:
    base = changed(read_recipe("nano"), base_changes(BUDGET))
    everything = changed(base, arms_of(BUDGET)["all-global"].changes).model_config()
    assert set(everything.layers) == {LayerAttention()}
    token = 2 * 2 * 64 * 2  # keys and values, two heads, width, bfloat16
    assert kv_bytes(everything, 512) == 6 * 512 * token
    assert kv_bytes(base.model_config(), 512) == (3 * 512 + 3 * 128) * token
    assert kv_bytes(base.model_config(), 20) == 6 * 20 * token


def test_every_ablation_names_arms_and_every_arm_is_named() -> None:
    assert {arm for arms in ABLATIONS.values() for arm in arms} == set(arms_of(BUDGET))


def test_a_key_that_no_recipe_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder\.depth"):
        changed(read_recipe("smoke"), {"decoder.depth": 3})


def test_results_are_replaced_and_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ablations.json"
    assert read_results(path) == []
    for arm, seed, value in (("b", 0, 1), ("a", 1, 2), ("b", 0, 3)):
        write_result(path, {"arm": arm, "seed": seed, "figures": {"x": value}})
    assert [(each["arm"], each["seed"], each["figures"]["x"]) for each in read_results(path)] == [("a", 1, 2), ("b", 0, 3)]
    assert find_result(read_results(path), "a", 0) is None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary and an image tokenizer, trained for a moment."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materials, "NUM_SENTENCES", 2000)
        Bench(read_recipe("smoke"), folder / "arms", folder / "shared", folder / "results.json", BUDGET).prepare(["base"])
    return folder / "shared"


@pytest.fixture
def bench(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    small = {"data.num_watched": 2, "multitask.schedule.save_every": 1}
    monkeypatch.setattr(ablate, "base_changes", lambda budget: base_changes(budget) | small)
    return Bench(read_recipe("smoke"), tmp_path / "arms", shared, tmp_path / "results.json", BUDGET)


def test_an_interrupted_arm_goes_on_and_ends_as_if_it_had_not_been(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(bench, folder=tmp_path / "whole", results=tmp_path / "whole.json").run("pre-trained", 1)
    step, steps = LanguageStage.step, []

    def breaks_once(self: LanguageStage, number: int) -> Mapping[str, float]:
        steps.append((self.name, number))
        if steps.count(("multitask", 2)) == 1 and number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(LanguageStage, "step", breaks_once)
    with pytest.raises(KeyboardInterrupt):
        bench.run("pre-trained", 1)
    assert read_results(bench.results) == []
    found = bench.run("pre-trained", 1)
    assert found["figures"] == whole["figures"]
    assert [number for name, number in steps if name == "multitask"] == [0, 1, 2, 2, 3]
    assert found["steps"] == BUDGET.steps + BUDGET.pretrain_steps


def test_a_finished_arm_is_not_trained_again_unless_something_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run("describe only", 0)
    assert set(first["figures"]) == {"describe, right", "describe, nats", "K/V of 512 ids in KiB"}

    def never(self: Bench, name: str, seed: int) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "train", never)
        assert bench.run("describe only", 0) == json.loads(json.dumps(first))
    for other in (replace(bench, budget=replace(BUDGET, steps=5)), replace(bench, recipe=changed(bench.recipe, {"decoder.sink": 3}))):
        found = other.run("describe only", 0)
        assert found is not None
        assert found["setting"] != first["setting"]
        assert found["steps"] == other.budget.steps
    assert len(read_results(bench.results)) == 1


def test_an_arm_that_another_process_is_at_is_left_to_it(bench: Bench) -> None:
    folder = bench.course("base", 0).folder
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert bench.run("base", 0) is None
    assert read_results(bench.results) == []


@pytest.mark.long
def test_the_tokenizer_arms_share_their_first_stage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "told_apart", partial(told_apart, steps=2))
    at_once = changed(bench.recipe, {"tokenizer.settings.alone_steps": 0, "tokenizer.settings.ramp_steps": 1})
    bench = replace(bench, recipe=at_once)
    step, steps = ReconstructionStage.step, []

    def counted(self: ReconstructionStage, number: int) -> Mapping[str, float]:
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(ReconstructionStage, "step", counted)
    found = {name: bench.run(name, 0) for name in ABLATIONS["adversary"]}
    folders = [bench.course(name, 0).folder / "tokenizer" / "reconstruction" for name in found]
    logs = [read_csv(folder / "held_out.csv") for folder in folders]
    assert logs[0] == logs[1]
    assert steps == list(range(BUDGET.reconstruction_steps))
    assert found["adversary"]["figures"] != found["no adversary"]["figures"]
    assert set(found["adversary"]["figures"]) == {"PSNR in dB", "gradient energy", "told from real", "feature distance"}
    assert 0.0 <= found["adversary"]["figures"]["told from real"] <= 1.0


def test_the_command_names_arms_and_keeps_a_finished_one(shared: Path, tmp_path: Path) -> None:
    numbers = {f"--{key.replace('_', '-')}": str(value) for key, value in asdict(BUDGET).items()}
    folders = {"--shared": str(shared), "--out": str(tmp_path / "arms"), "--results": str(tmp_path / "results.json")}
    options = [each for pair in (numbers | folders | {"--recipe": "smoke", "--arm": "draw only", "--seeds": "1"}).items() for each in pair]
    said = [CliRunner().invoke(ablate.main, ["tasks", *options], catch_exceptions=False) for _ in range(2)]
    assert [each["arm"] for each in read_results(tmp_path / "results.json")] == ["draw only"]
    assert "multitask: has ended" in said[0].output
    assert said[1].output.startswith("draw only, seed 0: draw, right ")
    assert CliRunner().invoke(ablate.main, ["--arm", "nothing"]).exit_code == 2
