"""One fine-tuning run from files to report: task, learner, loop, then measured and exported. And the measuring of an export.

Called by the command and by the proof; prints nothing but through `say`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from service.catalog import resolve
from service.codec.prompt import load_codec
from service.errors import StartupError
from training.finetune.export import export, load_exported
from training.finetune.learner import Adaptation, Learner
from training.finetune.report import write_report
from training.finetune.stage import Settings, TaskStage, answer_all
from training.finetune.tasks import Figures, Kind, figures_of, read_task
from training.loop import Precision, Schedule, run
from training.ranks import Rank

RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """model: as the catalog resolves it. files: train and dev, and test if the report shall be about another split than the one that
    stopped the training. patience: epochs without improvement on dev, 0 never stops early."""

    kind: Kind
    model: str
    files: dict[str, Path]
    adaptation: Adaptation = field(default_factory=Adaptation)
    settings: Settings = field(default_factory=Settings)
    epochs: int = 3
    patience: int = 2
    max_len: int = 256
    seed: int = 0


def finetune(plan: Plan, out: Path, device: str, say: Callable[[str], None], *, is_anew: bool = False) -> Figures:
    """Trains from where an interrupted run of the same plan stopped. Returns the test split's figures, or dev's without one.

    Mutates: out, with the run's log in out/run, the export in out/model and the reports beside them. Raises: StartupError, WeightsError;
    StartupError too when out holds a run of another plan.
    """
    path = resolve(plan.model).path
    codec = load_codec(path)
    task = read_task(plan.kind, plan.files, codec, min(plan.max_len, codec.max_context))
    _claim(plan, out, is_anew)
    learner = Learner(path, plan.adaptation, None if task.classes is None else len(task.classes), plan.seed, device)
    stage = TaskStage(learner, task, plan.settings, plan.seed)
    held_out = "test" if "test" in task.splits else "dev"
    say(f"{sum(each.numel() for each in learner.learned):,} parameters learn from {len(stage.train):,} examples")
    before = stage.measure(task.splits[held_out]) if task.classes is None else None
    steps = plan.epochs * stage.epoch_steps
    schedule = Schedule(
        steps, warmup_steps=max(1, steps // 10), evaluate_every=stage.epoch_steps, save_every=stage.epoch_steps, patience=plan.patience
    )
    seconds = run(stage, schedule, out / "run", Rank(), plan.seed)
    learner.settle()
    figures = stage.measure(task.splits[held_out])
    about = {**_about(plan), "measured on": plan.files[held_out].name, "seconds of training": round(seconds, 1)}
    write_report(out, "report", figures, {**about, **({"nats before training": round(before.watched, 4)} if before else {})})
    export(learner, task, min(plan.max_len, codec.max_context), out / "model")
    return figures


def measure(exported: Path, file: Path, out: Path, device: str, *, batch: int = 16, precision: Precision = "auto") -> Figures:
    """An exported model on another file; the report goes to out. Raises: StartupError, WeightsError."""
    learner, card, classes = load_exported(exported, device)
    task = read_task(card.kind, {"test": file}, load_codec(exported), card.max_len, classes)
    split = task.splits["test"]
    figures = figures_of(task, split, *answer_all(learner, split.examples, batch, precision))
    write_report(out, "report", figures, {"task": card.kind, "model": exported.name, "measured on": file.name})
    return figures


def _claim(plan: Plan, out: Path, is_anew: bool) -> None:
    """Notes the plan in out, or forgets what is there. Raises: StartupError when another plan's run is there."""
    if is_anew:
        shutil.rmtree(out / "run", ignore_errors=True)
    (out / "run").mkdir(parents=True, exist_ok=True)
    note, values = out / "run" / RUN, json.dumps(asdict(plan), default=str, sort_keys=True, indent=1)
    if note.exists() and note.read_text(encoding="utf-8") != values:
        raise StartupError(f"{out.name} holds a run with other options or files: name another --out, or give --restart")
    note.write_text(values, encoding="utf-8")


def _about(plan: Plan) -> dict[str, Any]:
    own = plan.adaptation
    how = f"LoRA, rank {own.rank}, alpha {own.alpha:g}" if own.rank else "all weights"
    return {
        "task": plan.kind,
        "model": plan.model if not Path(plan.model).exists() else Path(plan.model).name,
        "trained": how + (f", the lowest {own.frozen_layers} layers frozen" if own.frozen_layers else ""),
        "attention": "causal" if own.is_causal else "both directions",
        "seed": plan.seed,
        "torch": torch.__version__,
        **{name: path.name for name, path in plan.files.items()},
    }
