"""The kernels' benchmark runs on shapes that take no time, and its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.kernels import Case, Limits, figure_of, main
from kernels.cpu.library import load


@pytest.mark.skipif(load() is None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("isa", ["", "generic"])
def test_every_kernel_is_timed(tmp_path: Path, isa: str) -> None:
    done = CliRunner().invoke(
        main,
        [
            "--tiny",
            "--seconds",
            "0",
            "--threads",
            "1",
            "--isa",
            isa,
            "--json",
            str(tmp_path / "out.json"),
            "--plot",
            str(tmp_path / "out.png"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert {row["kernel"] for row in report["figures"]} == {"linear", "attend", "rms_norm", "gated", "kv_write", "embed", "sample", "draw"}
    assert all(row["microseconds"] > 0 and row["gigabytes_per_s"] > 0 and row["share"] > 0 for row in report["figures"])
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert len({(row["kernel"], row["case"]) for row in report["figures"]}) == len(report["figures"])


def test_an_instruction_set_that_is_none_is_refused() -> None:
    done = CliRunner().invoke(main, ["--tiny", "--isa", "mmx"])
    assert done.exit_code == 2
    assert "mmx" in done.output


def test_the_limit_is_the_longer_of_two_times() -> None:
    limits = Limits(read=1e9, float32=1e9, int8=4e9)
    moves = Case("linear", "a", lambda at: None, 1, num_bytes=2_000, num_operations=4_000, arithmetic="int8")
    assert figure_of(moves, 4e-6, limits).limit == "memory"
    assert figure_of(moves, 4e-6, limits).share == pytest.approx(0.5)
    computes = Case("attend", "b", lambda at: None, 1, num_bytes=2_000, num_operations=4_000)
    found = figure_of(computes, 8e-6, limits)
    assert (found.limit, found.microseconds) == ("arithmetic", pytest.approx(8))
    assert found.share == pytest.approx(0.5)
    assert found.gigaoperations_per_s == pytest.approx(0.5)
