"""The command and its stages on the smoke recipe: each ends in an artefact that the next starts from, whatever interrupts it.

Long, because every stage can be interrupted, refused and resumed in its own way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kernels.reference_ops import reference_ops
from service.codec.prompt import load_codec
from service.errors import StartupError
from service.model.families import read_config
from service.model.transformer import Precision, build_transformer
from service.model.vq_files import FOLDER, read_image_tokenizer
from service.model.weights import open_weights
from training.cli import main, open_course
from training.decoder import named_tensors
from training.export import MOST_BYTES, load_decoder, publish, whole_folder
from training.language import LanguageStage
from training.log import read_csv
from training.picture.stage import AdversarialStage, ReconstructionStage
from training.recipe import RECIPES, read_recipe
from training.stages import SECTIONS, Course, default_ranks, run_stage

STAGES = tuple(SECTIONS)


@pytest.fixture(scope="module", autouse=True)
def _less_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.log.plot_curves", lambda folder, name: None)
        patch.setattr("training.materials.NUM_SENTENCES", 2000)
        yield


def typed(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe, run by the command stage by stage."""
    folder = tmp_path_factory.mktemp("smoke")
    for stage in STAGES:
        result = typed(stage, "--recipe", "smoke", "--out", folder)
        assert result.exit_code == 0, result.output
    return folder


def weights(artefact: Path) -> dict[str, torch.Tensor]:
    return {
        str(path.relative_to(artefact)) + name: each for path in artefact.rglob("*.safetensors") for name, each in load_file(path).items()
    }


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() != set() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def copied(trained: Path, folder: Path, *stages: str) -> Course:
    """A run in which these stages have ended."""
    for stage in stages:
        shutil.copytree(trained / stage, folder / stage)
    return Course(read_recipe("smoke"), folder, 1)


# --- what lies there at the end ---------------------------------------------------------------------------------------------------


def test_every_stage_leaves_its_artefact_and_logs(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == set(STAGES)
    for stage in ("tokenizer/reconstruction", "tokenizer/adversarial", "pretrain", "multitask"):
        log = read_csv(trained / stage / "held_out.csv")
        assert len(log["step"]) == 2
        assert (trained / stage / "checkpoint.pt").exists()
        assert any((trained / stage / "events").iterdir())
    assert read_csv(trained / "tokenizer" / "reconstruction" / "train.csv")["step"] == [10]
    assert (trained / "tokenizer" / "adversarial" / "sheet.png").exists()
    assert not list(trained.rglob("*.partial"))


@pytest.mark.parametrize("stage", ["pretrain", "multitask"])
def test_a_decoders_artefact_is_what_the_server_loads(trained: Path, stage: str) -> None:
    artefact = trained / stage / "artefact"
    config = read_config(artefact)
    assert config == read_recipe("smoke").model_config()
    source = open_weights(artefact, config)
    model = build_transformer(config, source, reference_ops(), precision=Precision(torch.float32), device="cpu")
    assert model.embedding.shape == (352, 32)
    taught = named_tensors(load_decoder(artefact))
    assert all(torch.equal(source.get(name).float(), tensor) for name, tensor in taught.items())
    assert {tensor.dtype for tensor in weights(artefact).values()} == {torch.bfloat16}


def test_what_ships_is_the_checkpoint_rounded(trained: Path) -> None:
    state = torch.load(trained / "multitask" / "checkpoint.pt", weights_only=True)["module"]
    taught = named_tensors(load_decoder(trained / "multitask" / "artefact"))
    assert torch.equal(state["embedding"].bfloat16().float(), taught["embedding"])
    assert not torch.equal(state["embedding"], taught["embedding"])


def test_the_artefact_has_a_tokenizer_and_says_how_to_sample(trained: Path) -> None:
    artefact = trained / "multitask" / "artefact"
    codec = load_codec(artefact)
    text = "Draw a big red star 画一个大红星"
    assert codec.tokenizer.decode(codec.tokenizer.encode(text)) == text
    assert codec.vocab_size == 352
    generation = json.loads((artefact / "generation_config.json").read_text())
    assert (generation["temperature"], generation["min_p"], generation["guidance_scale"]) == (0.9, 0.1, 1.0)
    vq = read_image_tokenizer(artefact / FOLDER)
    assert vq.config == read_recipe("smoke").tokenizer.model
    assert equal(artefact / FOLDER, trained / "tokenizer" / "artefact" / FOLDER)


def test_multitask_starts_from_what_pretraining_left(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = copied(trained, tmp_path, "data", "tokenizer", "pretrain")
    begun: list[torch.Tensor] = []

    def stop(stage: LanguageStage, step: int) -> Mapping[str, float]:
        begun.append(stage.model.embedding.detach().clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageStage, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(course, "multitask", say=lambda line: None)
    assert torch.equal(begun[0], named_tensors(load_decoder(trained / "pretrain" / "artefact"))["embedding"])


# --- interruptions ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "kind", "stop_at"),
    [
        ("tokenizer", ReconstructionStage, 7),
        ("tokenizer", AdversarialStage, 3),
        ("pretrain", LanguageStage, 3),
        ("multitask", LanguageStage, 5),
    ],
)
def test_an_interrupted_stage_ends_in_the_same_artefact(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kind: type[Any], stop_at: int
) -> None:
    course = copied(trained, tmp_path, *STAGES[: STAGES.index(stage)])
    step_of, steps = kind.step, []

    def interrupted(self: Any, step: int) -> Mapping[str, float]:
        if step == stop_at and steps.count(step) == 0:
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(step)
        return dict(step_of(self, step))

    monkeypatch.setattr(kind, "step", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stage(course, stage, say=said.append)
    assert not course.artefact(stage).exists()
    run_stage(course, stage, say=said.append)
    assert "its last checkpoint" in said[1]
    assert steps[stop_at + 1] > 0  # it did go on, and did not begin anew
    assert equal(course.artefact(stage), trained / stage / "artefact")


def test_another_seed_trains_another_model(trained: Path, tmp_path: Path) -> None:
    """The control of the test above."""
    course = copied(trained, tmp_path, "data")
    course = replace(course, recipe=replace(course.recipe, seed=1))
    run_stage(course, "tokenizer", say=lambda line: None)
    assert not equal(course.artefact("tokenizer"), trained / "tokenizer" / "artefact")


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks"), [("tokenizer", 1), ("tokenizer", 2), ("multitask", 2)])
def test_a_killed_command_goes_on_to_the_same_artefact(trained: Path, tmp_path: Path, stage: str, ranks: int) -> None:
    """The real command, in processes of their own, killed without warning when the first checkpoint is there."""
    for out in ("whole", "parts"):
        copied(trained, tmp_path / out, *STAGES[: STAGES.index(stage)])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((RECIPES / "smoke.toml").read_text().replace("steps = 12", "steps = 60").replace("steps = 6", "steps = 60"))

    def command(out: str) -> subprocess.Popen[bytes]:
        code = "from training.cli import main; main()"
        arguments = [stage, "--recipe", str(recipe), "--ranks", str(ranks), "--out", str(tmp_path / out)]
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, start_new_session=True)

    assert command("whole").wait(240) == 0
    killed = command("parts")
    checkpoint = tmp_path / "parts" / stage / ("reconstruction" if stage == "tokenizer" else "") / "checkpoint.pt"
    while not checkpoint.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    assert torch.load(checkpoint, weights_only=True)["progress"][0] < 60
    assert command("parts").wait(240) == 0
    assert equal(tmp_path / "parts" / stage / "artefact", tmp_path / "whole" / stage / "artefact")


# --- the order of things ----------------------------------------------------------------------------------------------------------


def test_a_stage_that_has_ended_does_nothing_again(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    for stage in STAGES:
        result = typed(stage, "--recipe", "smoke", "--out", trained)
        assert result.exit_code == 0
        assert "has ended before" in result.output
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("stage", "before"), list(zip(STAGES[1:], STAGES, strict=False)))
def test_a_stage_says_which_one_must_end_first(tmp_path: Path, stage: str, before: str) -> None:
    result = typed(stage, "--recipe", "smoke", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"run `braid-train {before}` first" in result.output
    assert list(tmp_path.iterdir()) == []


def test_other_numbers_do_not_go_on_with_what_was_begun(trained: Path) -> None:
    result = typed("pretrain", "--recipe", "smoke", "--out", trained, "--seed", "4")
    assert result.exit_code == 1
    assert "pretrain was begun with another seed" in result.output
    recipe = read_recipe("smoke")
    settings = replace(recipe.pretrain.settings, learning_rate=0.5)
    other = Course(replace(recipe, pretrain=replace(recipe.pretrain, settings=settings)), trained, 1)
    with pytest.raises(StartupError, match=r"another pretrain\.settings\.learning_rate; --restart"):
        run_stage(other, "pretrain")
    run_stage(other, "tokenizer")  # which these numbers do not touch
    wider = Course(replace(recipe, decoder=replace(recipe.decoder, width=64)), trained, 1)
    run_stage(wider, "data")
    with pytest.raises(StartupError, match=r"another decoder\.width"):
        run_stage(wider, "pretrain")
    with pytest.raises(StartupError, match=r"data was begun with another decoder\.source"):
        run_stage(Course(replace(recipe, decoder=replace(recipe.decoder, source="smollm2-135m-instruct")), trained, 1), "data")
    larger = Course(replace(recipe, decoder=replace(recipe.decoder, text_vocab_size=400)), trained, 1)
    with pytest.raises(StartupError, match=r"data was begun with another decoder\.text_vocab_size"):
        run_stage(larger, "data")


def test_a_stage_that_has_ended_is_anybodys_with_any_number_of_processes(trained: Path, tmp_path: Path) -> None:
    course = replace(copied(trained, tmp_path, "data", "tokenizer"), num_ranks=2)
    for stage in ("data", "tokenizer"):
        assert run_stage(course, stage) == course.artefact(stage)
    shutil.rmtree(course.artefact("tokenizer"))
    with pytest.raises(StartupError, match="tokenizer was begun with another ranks"):
        run_stage(course, "tokenizer")


def test_restart_begins_anew(trained: Path, tmp_path: Path) -> None:
    course = copied(trained, tmp_path, *STAGES)
    (tmp_path / "pretrain" / "old").write_text("")
    result = typed("pretrain", "--recipe", "smoke", "--out", tmp_path, "--restart")
    assert result.exit_code == 0
    assert "starts from the artefact of tokenizer" in result.output
    assert not (tmp_path / "pretrain" / "old").exists()
    assert equal(course.artefact("pretrain"), trained / "pretrain" / "artefact")


def test_the_defaults_are_the_recipes_and_the_machines() -> None:
    course = open_course("nano", None, None, None)
    assert (course.folder, course.recipe.seed, course.num_ranks) == (Path("runs/nano"), 0, default_ranks())
    course = open_course("smoke", Path("x"), None, 7)
    assert (course.folder, course.recipe.seed, course.num_ranks) == (Path("x"), 7, 1)
    assert open_course("smoke", None, 2, None).num_ranks == 2


def test_two_processes_on_a_cpu_of_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cores, wanted in ((1, 1), (2, 2), (64, 2), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_ranks() == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_ranks() == 4


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    result = typed("data", "--recipe", "nothing", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.output.startswith("Error: there is no recipe 'nothing'")
    for command in ("export", "evaluate"):
        result = typed(command, "--recipe", "smoke", "--out", tmp_path)
        assert result.exit_code == 1
        assert "there is no trained model" in result.output


@pytest.mark.parametrize(("name", "is_told"), [("tensorboard", True), ("training.stages", False)])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_told: bool) -> None:
    def lacking(recipe: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("training.recipe.read_recipe", lacking)
    result = typed("data", "--recipe", "smoke", "--out", tmp_path)
    assert result.exit_code == 1
    assert ("pip install 'braid[train]'" in result.output) == is_told
    assert isinstance(result.exception, ModuleNotFoundError) != is_told


# --- evaluate, export, all --------------------------------------------------------------------------------------------------------


def test_export_copies_the_artefact_and_keeps_the_card(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "braid-smoke"
    target.mkdir()
    (target / "README.md").write_text("card")
    (target / "model-00001-of-00009.safetensors").write_bytes(b"of an older, larger model")
    result = typed("export", "--recipe", "smoke", "--out", trained, "--to", target)
    assert result.exit_code == 0
    assert equal(target, trained / "multitask" / "artefact")
    assert read_config(target) == read_recipe("smoke").model_config()
    assert (target / "README.md").read_text() == "card"


def test_no_file_of_15_mb_is_published(tmp_path: Path) -> None:
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    with (artefact / "model.safetensors").open("wb") as file:
        file.truncate(15_000_000)
    with pytest.raises(StartupError, match=r"model\.safetensors"):
        publish(artefact, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert MOST_BYTES < 15_000_000


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "artefact"

    def fill_half() -> None:
        with whole_folder(place) as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_half()
    assert not place.exists()
    with whole_folder(place) as folder:
        (folder / "all").write_text("")
    assert [path.name for path in place.iterdir()] == ["all"]
    assert list(tmp_path.iterdir()) == [place]


def test_all_goes_through_every_stage(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = copied(trained, tmp_path / "run", *STAGES[:3])
    asked: list[tuple[Path, Path, bool]] = []

    def measure(artefact: Path, out: Path, quick: bool) -> dict[str, float]:
        asked.append((artefact, out, quick))
        return {"psnr": 24.5}

    monkeypatch.setitem(sys.modules, "training.evaluate.run", SimpleNamespace(evaluate=measure))
    result = typed("all", "--recipe", "smoke", "--out", course.folder, "--to", tmp_path / "weights", "--quick")
    assert result.exit_code == 0, result.output
    assert asked == [(course.artefact("multitask"), course.folder / "evaluate", True)]
    assert "psnr: 24.5" in result.output
    assert result.output.count("has ended before") == 3
    assert equal(tmp_path / "weights", trained / "multitask" / "artefact")


def test_finetune_hands_on_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    @click.command()
    @click.option("--steps", type=int)
    def own(steps: int) -> None:
        click.echo(f"fine-tuned for {steps}")

    monkeypatch.setitem(sys.modules, "training.finetune.cli", SimpleNamespace(main=own))
    assert "fine-tuned for 7" in typed("finetune", "--steps", "7").output
    assert "Usage: braid-train finetune" in typed("finetune", "--help").output
