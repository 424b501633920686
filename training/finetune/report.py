"""The report of a fine-tuning run: JSON for programs, Markdown for people. Figures come in; nothing is measured here.

Called by the command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.finetune.measures import Score
from training.finetune.tasks import Figures

_MOST_ROWS = 60
"""Of a table in Markdown; the JSON has all."""


def write_report(folder: Path, name: str, figures: Figures, about: Mapping[str, Any]) -> None:
    """Writes NAME.json and NAME.md. about: what was trained on what, in the order in which it shall be read. Mutates: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {title: {kind: _values(score) for kind, score in table.items()} for title, table in figures.tables.items()}
    whole = {"about": dict(about), "summary": figures.summary, **tables}
    (folder / f"{name}.json").write_text(json.dumps(whole, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(_markdown(name, figures, about), encoding="utf-8")


def _values(score: Score) -> dict[str, float]:
    return {"precision": score.precision, "recall": score.recall, "f1": score.f1, "support": score.support, "predicted": score.said}


def _markdown(name: str, figures: Figures, about: Mapping[str, Any]) -> str:
    lines = [f"# Report: {name}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| figure | value |", "| --- | ---: |", *(f"| {key} | {value:.4f} |" for key, value in figures.summary.items())]
    for title, table in figures.tables.items():
        lines += ["", f"## {title.capitalize()}", "", "| name | precision | recall | F1 | support |", "| --- | ---: | ---: | ---: | ---: |"]
        rows = sorted(table.items(), key=lambda item: -item[1].support)
        lines += [
            f"| {kind} | {each.precision:.4f} | {each.recall:.4f} | {each.f1:.4f} | {each.support} |" for kind, each in rows[:_MOST_ROWS]
        ]
        lines += [f"| … {len(rows) - _MOST_ROWS} more in the JSON | | | | |"] if len(rows) > _MOST_ROWS else []
    return "\n".join(lines) + "\n"
