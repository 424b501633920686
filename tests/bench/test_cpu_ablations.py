"""The ablations of the CPU back end run on shapes that take no time, and every arm draws what it is supposed to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.cpu_ablations import TINY, WORKLOADS, Arms, main
from kernels.cpu.library import load

pytestmark = pytest.mark.skipif(load() is None, reason="the compiled kernels are missing")


def test_every_arm_is_timed_in_every_workload(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--tiny", "--rounds", "1", "--seconds", "0", "--threads", "2", "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())["workloads"]
    assert set(found) == {work.name for work in WORKLOADS}
    for arms in found.values():
        assert len(arms) == 11
        assert arms["everything"]["ratio"] == 1
        assert all(row["ratio"] > 0 and row["milliseconds"] for row in arms.values())


def test_arms_that_change_no_arithmetic_draw_the_same_ids() -> None:
    """Whoever takes fusion or threads away must not take something else away with them."""
    arms = Arms(TINY, 2)
    weights = arms.models["everything"]
    same = [name for name in arms.models if name.startswith(("layers", "head", "one thread", "threads", "keys as rows"))]
    assert len(same) == 6
    for name in same:
        model = arms.models[name]
        model.layers, model.table, model.norm = weights.layers, weights.table, weights.norm
        for own, other in zip(model.views, weights.views, strict=True):
            own[0].copy_(other[0])
            own[1].copy_(other[1])
    with torch.inference_mode():
        for work in WORKLOADS:
            steps = arms.steps(work)
            want = steps["everything"]()
            assert isinstance(want, torch.Tensor)
            for name in same:
                found = steps[name]()
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found, want), name
