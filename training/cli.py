"""The console script `braid-train`: a command a stage. Reads what a person typed, calls one function, prints what came back.

Each command imports what it needs, so that help is quick. Installed by pyproject as `training.cli:main`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.errors import StartupError

if TYPE_CHECKING:
    from training.stages import Course

CONTEXT: dict[str, Any] = {"auto_envvar_prefix": "BRAID_TRAIN", "help_option_names": ["-h", "--help"], "max_content_width": 120}
EXTRA = ("PIL", "matplotlib", "resvg_py", "tensorboard")
FINAL = "multitask"
"""The stage whose artefact is evaluated and shipped."""

recipe_options = (
    click.option("--recipe", default="nano", show_default=True, help="A recipe that comes with the package, or a TOML file."),
    click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where everything goes.  [default: runs/RECIPE]"),
    click.option("--ranks", type=click.IntRange(1), help="Processes.  [default: 2 on a CPU, one for every GPU]"),
    click.option("--seed", type=click.IntRange(0), help="Instead of the recipe's own."),
)
restart_option = click.option("--restart", "is_anew", is_flag=True, help="Forget what was done before.")


class Commands(click.Group):
    """Shows our own errors as one line and ends with status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StartupError as error:
            raise click.ClickException(error.message) from error
        except ModuleNotFoundError as error:
            if error.name not in EXTRA:
                raise
            raise click.ClickException(f"training needs {error.name}: pip install 'braid[train]'") from error


def with_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that every stage has."""
    for option in reversed(recipe_options):
        command = option(command)
    return command


@click.group(cls=Commands, context_settings=CONTEXT)
def main() -> None:
    """Train braid's own models: one transformer over text and pictures.

    The stages are data, tokenizer, pretrain and multitask. Each starts from the artefact of the one before; after an interruption the same
    command goes on where it was.
    """


def open_course(recipe: str, out: Path | None, ranks: int | None, seed: int | None) -> Course:
    """Raises: StartupError."""
    from training.recipe import read_recipe
    from training.stages import Course, default_ranks

    found = read_recipe(recipe)
    found = found if seed is None else replace(found, seed=seed)
    return Course(found, out or Path("runs") / found.name, ranks or found.ranks or default_ranks())


def _run(stage: str, is_anew: bool, **values: Any) -> None:
    from training.stages import run_stage

    run_stage(open_course(**values), stage, is_anew=is_anew, say=click.echo)


@main.command(short_help="Fetch and pack what is learned from; learn the vocabulary.")
@with_recipe
@restart_option
def data(**values: Any) -> None:
    """Fetch emoji and texts, pack them in the cache, and learn the text's vocabulary."""
    _run("data", **values)


@main.command(short_help="Train the image tokenizer.")
@with_recipe
@restart_option
def tokenizer(**values: Any) -> None:
    """Train the image tokenizer: reconstruction, then its decoder against an adversary."""
    _run("tokenizer", **values)


@main.command(short_help="Pre-train the decoder on text and codes.")
@with_recipe
@restart_option
def pretrain(**values: Any) -> None:
    """Pre-train the decoder on plain text and on pictures without words."""
    _run("pretrain", **values)


@main.command(short_help="Train the decoder on all tasks at once.")
@with_recipe
@restart_option
def multitask(**values: Any) -> None:
    """Train the pre-trained decoder on all tasks in one mix."""
    _run("multitask", **values)


@main.command(short_help="Measure the trained model.")
@with_recipe
@click.option("--quick", is_flag=True, help="Fewer examples of everything.")
def evaluate(quick: bool, **values: Any) -> None:
    """Measure the trained model; figures and contact sheets go to OUT/evaluate."""
    _evaluate(open_course(**values), quick)


@main.command(short_help="Copy the trained model to where it is shipped from.")
@with_recipe
@click.option("--to", "target", type=click.Path(path_type=Path, file_okay=False), help="[default: weights/braid-RECIPE]")
def export(target: Path | None, **values: Any) -> None:
    """Copy the trained model to where it is shipped from."""
    _export(open_course(**values), target)


@main.command("all", short_help="Every stage, then evaluate and export.")
@with_recipe
@restart_option
@click.option("--quick", is_flag=True, help="Evaluate with fewer examples of everything.")
@click.option("--to", "target", type=click.Path(path_type=Path, file_okay=False), help="[default: weights/braid-RECIPE]")
def everything(is_anew: bool, quick: bool, target: Path | None, **values: Any) -> None:
    """Every stage in its order, then evaluate and export. What has ended before is not done again."""
    from training.stages import SECTIONS, run_stage

    course = open_course(**values)
    for stage in SECTIONS:
        run_stage(course, stage, is_anew=is_anew, say=click.echo)
    _evaluate(course, quick)
    _export(course, target)


@main.command(
    short_help="Train a model further, with another head or on other examples.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def finetune(arguments: tuple[str, ...]) -> None:
    """Train a model further; `braid-train finetune --help` tells how."""
    command: click.Command = importlib.import_module("training.finetune.cli").main
    command.main(list(arguments), prog_name="braid-train finetune", standalone_mode=False)


def _final(course: Course) -> Path:
    """Raises: StartupError when the model has not been trained."""
    artefact = course.artefact(FINAL)
    if not artefact.is_dir():
        raise StartupError(f"there is no trained model in {course.folder}: run `braid-train {FINAL}` first")
    return artefact


def _evaluate(course: Course, quick: bool) -> None:
    """Prints the figures."""
    artefact = _final(course)
    measure = importlib.import_module("training.evaluate.run").evaluate
    for name, value in measure(artefact, course.folder / "evaluate", quick).items():
        click.echo(f"{name}: {value}")


def _export(course: Course, target: Path | None) -> None:
    from training.export import publish

    shipped = Path("weights") / f"braid-{course.recipe.name}"
    files = publish(_final(course), shipped) if target is None else publish(_final(course), target, most_bytes=None)
    target = target or shipped
    click.echo(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
