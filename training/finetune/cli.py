"""The command `braid-train finetune`: a sub-command a task, and one that measures what was exported. Reads options, calls one function.

Called by `training.cli`, which imports it late.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from service.settings import DEFAULT_MODEL
from training.finetune.learner import Adaptation
from training.finetune.run import Plan, finetune, measure
from training.finetune.stage import Settings
from training.finetune.tasks import Figures, Kind

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")

_OPTIONS = (
    click.option("--train", type=_FILE, required=True, help="What is learned from."),
    click.option("--dev", type=_FILE, required=True, help="What early stopping watches."),
    click.option("--test", type=_FILE, help="What the report is about.  [default: the dev file]"),
    click.option(
        "--model", default=DEFAULT_MODEL, show_default=True, help="A name of the catalog, a folder, a .gguf file, or hf:organisation/name."
    ),
    click.option("--out", type=_FOLDER, required=True, help="Where the run, the report and the model go."),
    click.option("--full", is_flag=True, help="Train all weights instead of adapters (LoRA)."),
    click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of the adapters."),
    click.option("--alpha", type=click.FloatRange(0, min_open=True), help="Scales the adapters' product.  [default: twice the rank]"),
    click.option("--frozen-layers", type=click.IntRange(0), default=0, show_default=True, help="Lowest layers that stay as they are."),
    click.option("--epochs", type=click.IntRange(1), default=3, show_default=True),
    click.option(
        "--patience", type=click.IntRange(0), default=2, show_default=True, help="Epochs without improvement before the end; 0: all epochs."
    ),
    click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Examples of a step."),
    click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: 5e-4 with adapters, 5e-5 with --full]"),
    click.option("--max-len", type=click.IntRange(2), default=256, show_default=True, help="Ids of an example."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True, help="Of products."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--restart", "is_anew", is_flag=True, help="Forget an interrupted run instead of going on with it."),
    _DEVICE,
)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_MASK = click.option(
    "--causal/--bidirectional", "is_causal", default=False, show_default=True, help="Does a word see only what is before it?"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """Train a model further: the same loop with another head or on other examples.

    The decoder is exported in the kind of file it came in and can be served; a head of classes lies in its folder task/.
    """


@main.command()
@_with_options
@_MASK
def tokens(**values: Any) -> None:
    """Classify words: CoNLL-format files, a line a word, its first column the word, its last the tag."""
    _finetune("tokens", **values)


@main.command()
@_with_options
@click.option("--causal/--bidirectional", "is_causal", default=True, show_default=True, help="Does a place see only what is before it?")
def sequences(**values: Any) -> None:
    """Classify texts: .jsonl or .csv files with text and label."""
    _finetune("sequences", **values)


@main.command()
@_with_options
def instructions(**values: Any) -> None:
    """Learn answers: .jsonl files with prompt and completion, or with messages."""
    _finetune("instructions", is_causal=True, **values)


@main.command("measure")
@click.argument("exported", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("file", type=_FILE)
@click.option("--out", type=_FOLDER, required=True, help="Where the report goes.")
@_DEVICE
def measure_command(exported: Path, file: Path, out: Path, device: str) -> None:
    """Measure an exported model on another file."""
    _show(measure(exported, file, out, _device(device)), out)


def _finetune(kind: Kind, *, out: Path, full: bool, rank: int, alpha: float | None, device: str, is_anew: bool, **values: Any) -> None:
    rate = values["learning_rate"] or (5e-5 if full else 5e-4)
    plan = Plan(
        kind,
        values["model"],
        {name: cast(Path, values[name]) for name in ("train", "dev", "test") if values[name] is not None},
        Adaptation(0 if full else rank, alpha or 2.0 * rank, values["frozen_layers"], values["is_causal"]),
        Settings(values["batch"], rate, precision=values["precision"]),
        values["epochs"],
        values["patience"],
        values["max_len"],
        values["seed"],
    )
    _show(finetune(plan, out, _device(device), click.echo, is_anew=is_anew), out)


def _show(figures: Figures, out: Path) -> None:
    for name, value in figures.summary.items():
        click.echo(f"{name}: {value:.4f}")
    click.echo(f"the report is {out / 'report.md'}")


def _device(name: str) -> str:
    """Raises: UsageError where there is no CUDA."""
    import torch  # after the options are checked

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"--device {name}: this installation of torch finds no CUDA device")
    return name
