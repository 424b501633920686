"""docs/scaling.md against the code and the figures that it cites."""

from __future__ import annotations

import json
import re

import click
import pytest

from service.cli import main as braid
from tests.docker.test_image import ROOT

TEXT = (ROOT / "docs/scaling.md").read_text()
RESULTS = json.loads((ROOT / "docs/results/scaling.json").read_text())


def test_every_flag_stands_in_the_table_with_its_default() -> None:
    assert isinstance(braid, click.Group)
    rows = re.findall(r"^\| (`--.+?) \| (.*?) \|", TEXT, re.MULTILINE)
    told = dict(pair for flags, defaults in rows for pair in zip(flags.split(", "), f"{defaults}, ".split(", "), strict=False))
    options = [option for option in braid.commands["deploy"].params if isinstance(option, click.Option)]
    assert set(told) == {f"`{option.opts[0]}`" for option in options}
    for option in options:
        if option.default not in (None, ()) and option.opts[0] not in ("--model", "--write"):
            shown = option.default if isinstance(option.default, str) else f"{option.default:g}"
            assert told[f"`{option.opts[0]}`"] == f"`{shown}`"


@pytest.mark.parametrize("row", RESULTS["routing"], ids=lambda row: f"{row['routing']}-{row['replicas']}-{row['rate']}")
def test_figures_of_routing_are_those_of_the_file(row: dict[str, float]) -> None:
    cell = f"{row['hit_share'] * 100:.0f} %, {row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.1f} s, {row['in_time_share'] * 100:.0f} %"
    assert f"| {cell} |" in TEXT


@pytest.mark.parametrize("row", RESULTS["scaling"], ids=lambda row: row["policy"])
def test_figures_of_scaling_are_those_of_the_file(row: dict[str, float]) -> None:
    told = f"| {row['mean_replicas']:.1f} | {row['most_replicas']} | {row['changes']} | {row['hit_share'] * 100:.0f} % |"
    assert f"{told} {row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.1f} s | {row['in_time_share'] * 100:.0f} % |" in TEXT
