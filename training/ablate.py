"""`python -m training.ablate`: what single choices are worth, each as a recipe with one thing changed, trained and measured the same way.

Arms run through the stages of any recipe, on the world alone, each in a folder of its own: interrupted (`timeout 10m`), the same command
goes on where it was. Figures go to one JSON file, a record an arm and seed.
"""

from __future__ import annotations

import hashlib
import json
import operator
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from random import Random
from typing import Any, cast

import click
import torch
from filelock import FileLock, Timeout

from service.errors import BraidError
from service.model.config import ModelConfig
from service.model.vq import VQTokenizer
from training.arms import ABLATIONS, Budget, arms_of, base_changes, changed
from training.evaluate.apart import told_apart
from training.evaluate.nearest import mean_distance
from training.evaluate.shares import circumstances, digest_of
from training.evaluate.subject import open_subject
from training.evaluate.world import attempt, figures_of, losses_of, tasks_of
from training.export import load_image_tokenizer, write_json
from training.log import read_csv
from training.materials import Materials, load_materials
from training.picture.measures import decode, encode, gradient_energy_ratio, psnr
from training.recipe import Recipe, read_recipe
from training.stages import SECTIONS, Course, run_stage
from training.world.scene import is_trained
from training.world.tasks import TASK_NAMES

ARM_NAMES = list(dict.fromkeys(arm for arms in ABLATIONS.values() for arm in arms))
KV_TOKENS, KV_BYTES = 512, 2
"""A sequence of so many ids, kept in bfloat16."""
SCENES = 6
"""That a tokenizer arm is measured on, for every task of another."""
MEASURE_SEED = 1_000_003
"""Of tasks and scenes that arms are measured on: the same for all arms and seeds."""


@dataclass(frozen=True)
class Bench:
    """Where arms are trained and measured. shared: a folder whose data stage, and tokenizer for the language arms, all of them use."""

    recipe: Recipe
    folder: Path
    shared: Path
    results: Path
    budget: Budget
    num_ranks: int = 1

    def base(self) -> Recipe:
        return changed(self.recipe, base_changes(self.budget))

    def setting(self, name: str) -> str:
        """Everything that an arm has in common with those it is compared with, in a few letters."""
        stages = arms_of(self.budget)[name].stages
        recipe = asdict(self.base())
        parts = {key: reduce(operator.getitem, key.split("."), recipe) for stage in stages for key in SECTIONS[stage]}
        tokenizer = "" if "tokenizer" in stages else digest_of(self.shared / "tokenizer" / "artefact")
        values = json.dumps([parts, recipe["precision"], self.budget.count, self.num_ranks, tokenizer], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def course(self, name: str, seed: int) -> Course:
        recipe = changed(self.base(), arms_of(self.budget)[name].changes)
        folder = self.folder / self.setting(name) / name.replace(" ", "-") / str(seed)
        return Course(replace(recipe, seed=seed), folder, self.num_ranks)

    def prepare(self, names: Sequence[str]) -> None:
        """The stages that these arms share, unless they have ended. Another process that is at it is waited for.

        Mutates: the shared folder.
        """
        course = Course(self.base(), self.shared, self.num_ranks)
        own = [arms_of(self.budget)[name].stages for name in names]
        self.shared.mkdir(parents=True, exist_ok=True)
        with FileLock(self.shared / "lock"):
            for stage in ("data", "tokenizer"):
                if not course.artefact(stage).is_dir() and any(stage not in stages for stages in own):
                    run_stage(course, stage, say=click.echo)

    def train(self, name: str, seed: int) -> Course:
        """An arm to its end, from where it was. Mutates: its folder."""
        arm, course = arms_of(self.budget)[name], self.course(name, seed)
        for stage in ("data", "tokenizer"):
            if stage not in arm.stages:
                _copy(self.shared / stage / "artefact", course.artefact(stage))
        if arm.like:
            other = self.course(arm.like, seed)
            if other.artefact("tokenizer").is_dir():
                first = Path("tokenizer") / "reconstruction"
                _copy(other.folder / first, course.folder / first)
        for stage in arm.stages:
            run_stage(course, stage, say=click.echo)
        return course

    def run(self, name: str, seed: int) -> dict[str, Any] | None:
        """Trains and measures an arm unless that was done, and writes it down; None while another process is at it.

        Mutates: the arm's folder and the results.
        """
        known = find_result(read_results(self.results), name, seed)
        if known is not None and known["setting"] == self.setting(name):
            return known
        folder = self.course(name, seed).folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=0):
                record = self._measured(name, seed)
        except Timeout:
            return None
        write_result(self.results, record)
        return record

    def _measured(self, name: str, seed: int) -> dict[str, Any]:
        """An arm, trained to its end, as the record of it. Mutates: its folder."""
        course = self.train(name, seed)
        materials = load_materials(course.recipe.data)
        is_tokenizer = arms_of(self.budget)[name].stages == ("tokenizer",)
        measure, count = (measure_tokenizer, SCENES * self.budget.count) if is_tokenizer else (measure_decoder, self.budget.count)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "arm": name,
            "seed": seed,
            "n": count,
            "setting": self.setting(name),
            "budget": asdict(self.budget),
            "recipe": self.recipe.name,
            "ranks": self.num_ranks,
            **trained(course.folder),
            **circumstances(device),
            "figures": measure(course, materials, count, device),
        }


def _copy(source: Path, target: Path) -> None:
    """Once; a half copy is not taken for a whole one."""
    if not target.exists():
        scratch = target.with_name(f".{target.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        scratch.replace(target)


def trained(folder: Path) -> dict[str, float]:
    """Steps and seconds of all stages whose logs lie in a folder."""
    logs = [log for path in folder.rglob("held_out.csv") if (log := read_csv(path))]
    return {key: sum(log[name][-1] for log in logs) for key, name in (("steps", "step"), ("seconds", "seconds"))}


def measure_tokenizer(course: Course, materials: Materials, count: int, device: torch.device) -> dict[str, float]:
    """On scenes of combinations that were never trained."""
    random = Random(MEASURE_SEED)
    scenes = [materials.world.scene(random, lambda scene: not is_trained(scene)) for _ in range(count)]
    vq: VQTokenizer = load_image_tokenizer(course.artefact("tokenizer"), device)
    real = materials.draw(scenes)
    drawn = decode(vq, encode(vq, real))
    return {
        "PSNR in dB": float(psnr(drawn, real).mean()),
        "gradient energy": gradient_energy_ratio(drawn, real),
        "told from real": told_apart(real, drawn, MEASURE_SEED)["share"],
        "feature distance": mean_distance(drawn, real),
    }


def measure_decoder(course: Course, materials: Materials, count: int, device: torch.device) -> dict[str, float]:
    """Shares right and losses on both kinds of combination that were never trained, for the tasks of the arm's mix; and bytes of K/V."""
    subject = open_subject(course.artefact("multitask"), materials, device, MEASURE_SEED)
    found: dict[str, float] = {}
    for name in TASK_NAMES:
        if f"world_{name}" not in course.recipe.multitask.mix:
            continue
        both = [*tasks_of(subject, name, "triple", count - count // 2), *tasks_of(subject, name, "pair", count // 2)]
        found[f"{name}, right"] = figures_of(attempt(subject, both))["right"]["share"]
        losses = losses_of(subject, both)
        key = "nats_per_code" if "nats_per_code" in losses else "nats"
        found[f"{name}, {key.replace('_', ' ')}"] = losses[key]
    return found | {f"K/V of {KV_TOKENS} ids in KiB": kv_bytes(subject.model.config, KV_TOKENS) / 1024}


def kv_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Of a sequence: a layer with a window keeps its sink and the window, the others keep everything."""
    kept = [num_tokens if layer.window is None else min(num_tokens, layer.sink + layer.window) for layer in config.layers]
    return sum(kept) * 2 * config.num_kv_heads * config.head_width * KV_BYTES


def read_results(path: Path) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], json.loads(path.read_text(encoding="utf-8"))["arms"]) if path.exists() else []


def find_result(records: Sequence[dict[str, Any]], arm: str, seed: int) -> dict[str, Any] | None:
    return next((each for each in records if (each["arm"], each["seed"]) == (arm, seed)), None)


def write_result(path: Path, record: dict[str, Any]) -> None:
    """In place of an older one of the same arm and seed. Several arms may run side by side. Mutates: the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        others = [each for each in read_results(path) if (each["arm"], each["seed"]) != (record["arm"], record["seed"])]
        scratch = path.with_suffix(".tmp")
        write_json(scratch, {"arms": sorted([*others, record], key=lambda each: (each["arm"], each["seed"]))})
        scratch.replace(path)


@click.command()
@click.argument("ablations", nargs=-1, type=click.Choice(list(ABLATIONS)))
@click.option("--recipe", default="nano", show_default=True, help="The recipe whose choices are weighed.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/ablations"), show_default=True)
@click.option("--shared", type=click.Path(path_type=Path, file_okay=False), help="A run whose vocabulary and image tokenizer are used.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/results/ablations.json"), show_default=True)
@click.option("--arm", "arms", multiple=True, type=click.Choice(ARM_NAMES), help="Only these of the arms.")
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--steps", default=450, show_default=True, help="Of the decoder's last stage.")
@click.option("--pretrain-steps", default=150, show_default=True)
@click.option("--reconstruction-steps", default=1500, show_default=True)
@click.option("--adversarial-steps", default=700, show_default=True)
@click.option(
    "--count",
    default=100,
    show_default=True,
    help=f"Tasks of a kind that an arm is measured on; a tokenizer: {SCENES} times as many scenes.",
)
@click.option("--threads", default=1, show_default=True)
@click.option("--ranks", default=1, show_default=True, help="Processes of an arm; more arms side by side are faster.")
def main(ablations: tuple[str, ...], recipe: str, out: Path, shared: Path | None, results: Path, **values: Any) -> None:
    """Train and measure the arms of ABLATIONS (all, if none is named). What was done before is not done again; started a second time beside
    the first, the command takes the arms that nobody is at."""
    torch.set_num_threads(values["threads"])
    counts = ("steps", "pretrain_steps", "reconstruction_steps", "adversarial_steps", "count")
    budget = Budget(**{key: values[key] for key in counts})
    wanted = [arm for each in ablations or ABLATIONS for arm in ABLATIONS[each]]
    names = [each for each in dict.fromkeys(wanted) if not values["arms"] or each in values["arms"]]
    try:
        bench = Bench(read_recipe(recipe), out, shared or out / "shared", results, budget, values["ranks"])
        bench.prepare(names)
        for seed in range(values["seeds"]):
            for name in names:
                record = bench.run(name, seed)
                said = ", ".join(f"{key} {value:.4g}" for key, value in record["figures"].items()) if record else "another process is at it"
                click.echo(f"{name}, seed {seed}: {said}")
    except BraidError as error:
        raise click.ClickException(error.message) from error


if __name__ == "__main__":
    main()
