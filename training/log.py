"""What a run leaves behind beside its weights: a progress bar, CSV files, TensorBoard events and the loss curves as a picture.

Called by the loop; knows no model.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LOG_EVERY = 10
"""Steps between two lines of train.csv; figures between are averaged."""


class RunLog:
    """Writes train.csv, held_out.csv, events and curves.png into a folder; rows beyond the step a run resumes from are dropped."""

    def __init__(self, folder: Path, name: str, steps: int, begin: int, *, is_silent: bool = False) -> None:
        self.folder, self.name, self.is_silent = folder, name, is_silent
        self.sums: dict[str, float] = {}
        self.count = 0
        self.bar = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), disable=is_silent
        )
        self.task = self.bar.add_task("", total=steps, completed=begin)
        if not is_silent:
            for file in ("train.csv", "held_out.csv"):
                _cut(folder / file, begin)
            self.events: Any = SummaryWriter(folder / "events", purge_step=begin)

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if not self.is_silent:
            self.events.close()
            plot_curves(self.folder, self.name)

    def step(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """step: how many are done. Mutates: the running means."""
        self.bar.update(self.task, completed=step)
        if self.is_silent:
            return
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        if step % LOG_EVERY == 0:
            means = {key: value / self.count for key, value in self.sums.items()}
            self._write("train.csv", step, seconds, means)
            self.bar.update(self.task, description=" ".join(f"{key} {value:.3f}" for key, value in list(means.items())[:3]))
            self.sums, self.count = {}, 0

    def evaluation(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        if self.is_silent:
            return
        self._write("held_out.csv", step, seconds, figures)
        self.bar.console.print(f"{self.name} {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        plot_curves(self.folder, self.name)

    def _write(self, file: str, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        path = self.folder / file
        row = {"step": step, "seconds": round(seconds, 1), **{key: f"{value:.6g}" for key, value in figures.items()}}
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        for key, value in figures.items():
            self.events.add_scalar(f"{path.stem}/{key}", value, step)


def _cut(path: Path, step: int) -> None:
    """Drops what a run wrote after its last checkpoint: the resumed run writes it again."""
    if path.exists():
        head, *rows = path.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
        if kept:
            path.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
        else:
            path.unlink()


def read_csv(path: Path) -> dict[str, list[float]]:
    """The columns of a log, empty when there is none."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in (rows[0] if rows else {})}


def plot_curves(folder: Path, name: str) -> None:
    """curves.png: every figure of both logs over the steps."""
    from matplotlib.figure import Figure  # takes a second to import, which a command that trains nothing should not wait for

    train, held_out = read_csv(folder / "train.csv"), read_csv(folder / "held_out.csv")
    keys = [key for key in dict.fromkeys([*train, *held_out]) if key not in ("step", "seconds")]
    if not keys:
        return
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, log in (("train", train), ("held out", held_out)):
            if key in log:
                axes.plot(log["step"], log[key], label=label, marker="." if label == "held out" else "")
        axes.set_title(key, fontsize=9)
        axes.grid(alpha=0.3)
    figure.suptitle(name)
    figure.savefig(folder / "curves.png", dpi=80)
