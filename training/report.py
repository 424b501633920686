"""`python -m training.report`: the model's page, its card and its pictures, made of what evaluation and ablations wrote down.

Measures nothing; no figure stands in here. Called by `make model-report`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training import chapters
from training.chapters import Figures
from training.evaluate.run import FIGURES, STAGES
from training.export import write_json

PAGES = Path(__file__).parent / "pages"
PICTURES = {
    "reconstruction.png": "Bands of three rows: original, before the adversary, after it (two rows where the first stage was not at hand).",
    "emoji-trained.png": "Trained prompts. Rows: the picture, its reconstruction, then drawn: sampled, greedy, sampled from Chinese words.",
    "emoji-held-out.png": "Held-out (emoji, style) pairs, rows as above: the decoder was never trained on the picture asked for.",
    "world.png": "Tasks with combinations never trained: prompt, given picture, drawn (green: right, red: wrong), wanted.",
}
"""What lies on each contact sheet."""


def page(
    template: str, figures: Figures, ablations: Sequence[Figures] = (), pictures: Sequence[str] = (), ways: Figures | None = None
) -> str:
    """A page of pages/ with its figures. pictures: names of files in images/model. ways: what `bench.pictures iterate` wrote."""
    stages = figures["training"].get("stages", {})
    values = {
        **figures,
        "minutes": sum(each["seconds"] for each in stages.values()) / 60,
        "machines": " and ".join(dict.fromkeys(each["hardware"] for each in stages.values())),
        "tables": chapters.tables(figures),
        "kinds": chapters.KINDS,
        "ablations": chapters.ablations(ablations),
        "ways": ways,
        "pictures": pictures,
    }
    # Markdown of our own figures: nothing in it is to be escaped.
    environment = Environment(loader=FileSystemLoader(PAGES), undefined=StrictUndefined, autoescape=False)  # noqa: S701
    environment.filters |= {"percent": chapters.percent, "share": chapters.share}
    environment.globals["sheet"] = lambda name: f"\n![{PICTURES[name]}](images/model/{name})\n" if name in pictures else ""
    return environment.get_template(template).render(values) + "\n"


def merged(new: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """With what only the training run's folder could tell, from an earlier measurement of the same weights."""
    if old and not new["training"].get("stages") and old["model"]["digest"] == new["model"]["digest"]:
        return {**new, "training": old["training"]}
    return new


def write_report(evaluation: Path, docs: Path, card_path: Path, run: Path | None, name: str) -> None:
    """Mutates: docs/model.md, docs/results/model.json, docs/images/model, and the card."""
    results, images = docs / "results", docs / "images" / "model"
    images.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    new, old = _read(evaluation / FIGURES), _read(results / FIGURES) if (results / FIGURES).exists() else None
    if old and old["model"]["digest"] != new["model"]["digest"]:
        for path in images.glob("*.png"):  # they show another model
            path.unlink()
    figures = {"name": name, **merged(new, old)}
    write_json(results / FIGURES, figures)
    for sheet in PICTURES:
        if (evaluation / sheet).exists():
            shutil.copyfile(evaluation / sheet, images / sheet)
    for stage in STAGES.values():
        if run is not None and (run / stage / "curves.png").exists():
            shutil.copyfile(run / stage / "curves.png", images / f"curves-{stage.replace('/', '-')}.png")
    known = results / "ablations.json"
    ablations = _read(known)["arms"] if known.exists() else []
    drawn = results / "pictures.json"
    ways = _read(drawn).get("iterate") if drawn.exists() else None
    shown = sorted(path.name for path in images.glob("*.png"))
    (docs / "model.md").write_text(page("model.md.j2", figures, ablations, shown, ways), encoding="utf-8")
    card_path.parent.mkdir(parents=True, exist_ok=True)
    card_path.write_text(page("card.md.j2", figures), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@click.command()
@click.option("--evaluation", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="What was measured.")
@click.option("--docs", type=click.Path(path_type=Path, file_okay=False), default=Path("docs"), show_default=True)
@click.option("--card", "card_path", type=click.Path(path_type=Path, dir_okay=False), default=Path("weights/braid-nano/README.md"))
@click.option("--run", type=click.Path(path_type=Path, file_okay=False), help="Where the model was trained: for its curves.")
@click.option("--name", default="braid-nano", show_default=True)
def main(evaluation: Path, docs: Path, card_path: Path, run: Path | None, name: str) -> None:
    """Write the model's page, its card and their pictures."""
    write_report(evaluation, docs, card_path, run, name)
    click.echo(f"{docs / 'model.md'}, {card_path}")


if __name__ == "__main__":
    main()
