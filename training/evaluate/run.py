"""Measures a trained model: every part in turn, into one JSON file with all that the figures depend on, and contact sheets beside it.

The parts know what they measure; this only gives them the model and the amounts. Called by the command and by `python -m
training.evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from service.errors import StartupError
from training.evaluate.memory import memory_figures
from training.evaluate.reconstruction import code_stability, first_stage, picture_sets, reader, reconstruction, write_reconstructions
from training.evaluate.shares import MACHINE, circumstances, digest_of
from training.evaluate.subject import Subject, open_subject
from training.evaluate.text import text_figures
from training.evaluate.world import world_figures
from training.export import write_json
from training.log import read_csv
from training.materials import load_materials
from training.recipe import DataRecipe

FIGURES = "model.json"
STAGES = {
    "tokenizer, reconstruction": "tokenizer/reconstruction",
    "tokenizer, adversary": "tokenizer/adversarial",
    "pre-training": "pretrain",
    "multi-task": "multitask",
}
"""Where in a run's folder each stage's log lies."""
FINAL = Path("multitask", "artefact")
"""Where in it the model lies that it was for."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """tasks: of the world, for each task and kind of combination. scenes: for reconstruction and its reader. The others are at most so
    many, evenly chosen; None for all there are."""

    tasks: int
    scenes: int
    emoji: int | None = None
    pictures: int | None = None
    texts: int | None = None


FULL = Amounts(tasks=300, scenes=1000)
QUICK = Amounts(tasks=50, scenes=200, emoji=100, pictures=200, texts=50)


def evaluate(
    artefact: Path,
    out: Path,
    quick: bool,
    *,
    data: DataRecipe | None = None,
    run: Path | None = None,
    amounts: Amounts | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the model in `artefact` and returns the headline figures; all of them go to model.json in `out`.

    data: what it was trained on; None to read it from recipe.json beside the artefact. run: the folder that it was trained in, None for
    the one that the artefact lies in. amounts: instead of what `quick` says.
    Mutates: the folder `out`. Raises: StartupError when no recipe is known or a package can't be had; WeightsError.
    """
    materials = load_materials(data or _recipe_beside(artefact))
    subject = open_subject(artefact, materials, torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed)
    out.mkdir(parents=True, exist_ok=True)
    model = _model(subject, artefact)
    run = run or artefact.parent.parent
    is_own = (run / FINAL).is_dir() and digest_of(run / FINAL) == model["digest"]
    figures = {
        "model": model,
        "measured": {"seed": seed, "is_quick": quick, "precision": "float32", **circumstances(subject.device)},
        **measure(subject, out, amounts or (QUICK if quick else FULL), run if is_own else None),
    }
    write_json(out / FIGURES, figures)
    return headlines(figures)


def measure(subject: Subject, out: Path, amounts: Amounts, run: Path | None) -> dict[str, Any]:
    """All parts. run: the folder that this very model was trained in, for what only it can tell; None when it is not at hand."""
    sets = picture_sets(subject.materials, amounts.scenes, subject.seed, amounts.pictures)
    before = first_stage(subject.vq, run) if run is not None else None
    write_reconstructions(out / "reconstruction.png", sets, before, subject.vq)
    return {
        "training": (_training(run) if run is not None else {})
        | ({"before_adversary": reconstruction(before, sets)} if before is not None else {}),
        "reconstruction": reconstruction(subject.vq, sets),
        "stability": code_stability(subject.vq, subject.materials, amounts.scenes, subject.seed),
        "reader": reader(subject.vq, subject.materials, amounts.scenes, subject.seed),
        "memory": memory_figures(subject, out, most=amounts.emoji),
        "world": world_figures(subject, out, count=amounts.tasks),
        "text": text_figures(subject, most=amounts.texts),
    }


def _recipe_beside(artefact: Path) -> DataRecipe:
    path = artefact.parent / "recipe.json"
    try:
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8"))["data"], DataRecipe)
    except OSError:
        raise StartupError(f"{artefact} has no recipe.json beside it; name the recipe that the model was trained with") from None
    except (ValueError, KeyError) as error:
        raise StartupError(f"recipe.json beside {artefact} can't be read: {error}") from error


def _model(subject: Subject, artefact: Path) -> dict[str, Any]:
    config, materials = subject.model.config, subject.materials
    return {
        "digest": digest_of(artefact),
        "decoder_parameters": config.num_parameters,
        "image_tokenizer_parameters": sum(each.numel() for each in subject.vq.parameters()),
        "bytes": sum(path.stat().st_size for path in artefact.rglob("*.safetensors")),
        "layers": len(config.layers),
        "local_layers": sum(1 for layer in config.layers if layer.window is not None),
        "width": config.width,
        "text_vocabulary": subject.pictures.first_code,
        "codes": subject.pictures.num_codes,
        "grid": [subject.pictures.rows, subject.pictures.columns],
        "pixels": materials.recipe.size,
        "styles": list(materials.recipe.styles),
        "texts": list(materials.recipe.texts),
    }


def _training(run: Path) -> dict[str, Any]:
    """Steps and seconds of each stage, and its held-out figures at the end, from the logs of a run."""
    found: dict[str, Any] = {"stages": {}}
    for name, folder in STAGES.items():
        train, held_out = read_csv(run / folder / "train.csv"), read_csv(run / folder / "held_out.csv")
        if not train and not held_out:
            continue
        ends = {key: max(log[key][-1] for log in (train, held_out) if log) for key in ("step", "seconds")}
        where = run / folder.partition("/")[0] / MACHINE
        machine = json.loads(where.read_text(encoding="utf-8")) if where.exists() else {}
        watched = {key: values[-1] for key, values in held_out.items() if key not in ends}
        found["stages"][name] = {**ends, "hardware": machine.get("hardware", "an unknown machine"), "watched": watched}
    paths = [path for path in run.glob("*/recipe.json") if path.is_file()]
    if paths:
        values = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
        source = next((each["decoder"].get("source", "") for each in values if "decoder" in each), "")
        found["recipe"] = {"seed": values[-1].get("seed"), "ranks": values[-1].get("ranks"), "source": source}
    return found


def headlines(figures: Mapping[str, Any]) -> dict[str, str]:
    """What a person wants to see first, as words."""
    found = {f"{name}, PSNR": f"{each['psnr_db']:.2f} dB (n {each['n']})" for name, each in figures["reconstruction"].items()}
    memory = figures["memory"]
    if memory:
        found["emoji drawn right, trained"] = said(memory["trained"]["sampled"]["emoji"])
        found["emoji named right, trained"] = said(memory["named"]["trained"]["en"]["label"])
    for name, kinds in figures["world"].items():
        for kind, each in kinds.items():
            found[f"{name}, {kind}"] = said(each["right"])
    return found | {f"{name}, bits per byte": f"{each['bits_per_byte']:.3f}" for name, each in figures["text"].items()}


def said(share: Mapping[str, float]) -> str:
    """A share with its interval: "97.2 % (96.0-98.1, n 1081)"."""
    return f"{share['share']:.1%} ({100 * share['low']:.1f}-{100 * share['high']:.1f}, n {share['n']:.0f})".replace("%", " %", 1)
