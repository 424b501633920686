"""The scorecard of `bench.gpu` in docs/performance.md, between two marks:

    python -m bench.gpu_page FOLDER/gpu.json      what a run measured
    python -m bench.gpu_page                      the lines alone, each "not measured"

No figure stands there that is not in the file of a run.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- scorecard: written by python -m bench.gpu_page -->", "<!-- scorecard end -->"
MODULES = ("gpu_attention", "gpu_products", "gpu_sampling", "gpu_steps", "gpu_offline", "gpu_serving")


def lines() -> list[dict[str, Any]]:
    """All lines without figures."""
    found = [line for module in MODULES for line in importlib.import_module(f"bench.{module}").LINES]
    texts = (
        {"line": line.name, "workload": line.workload, "limit": line.limit, "floor": line.floor, "target": line.target} for line in found
    )
    return sorted(texts, key=lambda line: int(line["line"][1:]))


def card(rows: Iterable[dict[str, Any]]) -> str:
    """rows: of a scorecard, in the order of its lines. A table in Markdown with a row for each line."""
    text = ["| | workload | limit | least, aim | limit / measured | beside |", "|---|---|---|---|---|---|"]
    for name, group in groupby(rows, key=lambda row: row["line"]):
        cases = [row for row in group if "baseline" not in row]
        about = cases[0]
        shares = f"{about['floor']:.2g}, {about['target']:.2g}"
        shown = "<br>".join(filter(None, map(_score, cases))) or "not measured"
        beside = "<br>".join(dict.fromkeys(filter(None, map(_beside, cases))))
        text.append(f"| {name} | {about['workload']} | {about['limit']} | {shares} | {shown} | {beside} |")
    return "\n".join(text)


def _score(row: dict[str, Any]) -> str:
    case = row.get("case", "").removeprefix(row["line"]).strip()
    if "score" in row:
        return f"{case}: {row['score']:.2f}"
    for key, words in (("not_built", "not built"), ("left_out", "not measured"), ("not_reached", "not measured"), ("failed", "failed")):
        if key in row:
            return f"{case}: {words}"
    return ""


def _beside(row: dict[str, Any]) -> str:
    """By how much the fastest of each case's baselines is slower (above 1) or faster than Braid."""
    times = {name: value for name, value in row.get("baselines", {}).items() if isinstance(value, float)}
    if not times:
        return ""
    name = min(times, key=lambda one: times[one])
    return f"{name}: {times[name] / row['measured_s']:.2f} x our time"


def block(report: dict[str, Any] | None) -> str:
    if report is None:
        head = "Nothing of this has been measured yet."
        return "\n".join((BEGIN, head, "", card(lines()), END))
    machine = next(row for part in report["parts"] for row in part["rows"] if row.get("case") == "machine")
    head = f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}."
    if report["void"]:
        head += " **The probes before and after differ by more than 5 %, so these figures do not count.**"
    return "\n".join((BEGIN, head, "", card(report["scorecard"]), END))


def with_block(page: str, new: str) -> str:
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: new, page, flags=re.DOTALL)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else None
    PAGE.write_text(with_block(PAGE.read_text(), block(given)))
