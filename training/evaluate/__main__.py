"""`python -m training.evaluate`: measures an artefact that may lie anywhere, such as the one that is shipped.

Only reads what was typed. (`braid-train evaluate` measures what a recipe has trained in its own folder.)
"""

from __future__ import annotations

from pathlib import Path

import click

from service.errors import BraidError
from training.evaluate.run import evaluate
from training.recipe import read_recipe


@click.command()
@click.option("--artefact", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="The model's folder.")
@click.option("--recipe", default="nano", show_default=True, help="What the model was trained with: a recipe's name, or a TOML file.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where figures and contact sheets go.")
@click.option("--run", type=click.Path(path_type=Path, file_okay=False), help="Where the model was trained: for logs and the stage before.")
@click.option("--quick", is_flag=True, help="Fewer examples of everything.")
@click.option("--seed", default=0, show_default=True)
def main(artefact: Path, recipe: str, out: Path, run: Path | None, quick: bool, seed: int) -> None:
    """Measure a model on what it was trained on and on what was held out."""
    try:
        found = evaluate(artefact, out, quick, data=read_recipe(recipe).data, run=run, seed=seed)
    except BraidError as error:
        raise click.ClickException(error.message) from error
    for name, value in found.items():
        click.echo(f"{name}: {value}")


if __name__ == "__main__":
    main()
