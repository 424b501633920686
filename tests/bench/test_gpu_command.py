"""The one GPU command never dies half way: a case that fails, hangs or takes its process along is a row that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu_table import table

RUN = gpu.Run("cuda", is_tiny=False, rates={})
# What cannot be asked of a CPU, with the reason that its row gives.
NEEDS_DEVICE = {
    "tests marked for a GPU": "skipped",
    "dependent launch": "launches that depend on one another",
    **{
        f"graph equals eager, {name}, {count} sequences": "no graphs"
        for name in ("tiny", "tiny-experts", "smollm2-135m")
        for count in (1, 3, 16)
    },
    "G18 qwen3-0.6b, 256": "its own host",
}
# Baselines that a CPU has too, by the line they belong to.
BASELINES = {
    "G1": {"sdpa best", "flex paged"},
    "G3": {"sdpa best", "flex"},
    "G4": {"sdpa best, two calls"},
    "G5": {"eager"},
    "G6": {"cuBLAS"},
    "G9": {"torch, sorting"},
    **{line: {"transformers generate_batch"} for line in ("G10", "G11", "G12", "G13", "G14", "G16")},
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ, **environment))


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device nothing fails")
def test_without_a_device_every_row_says_why(tmp_path: Path) -> None:
    done = run("--budget", "60", "--out", str(tmp_path), "--only", "probe_before", "--only", "graphs")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["probe_before", "graphs"]
    for part in report["parts"]:
        assert len(part["rows"]) >= 6
        assert all("no CUDA device" in row["failed"] for row in part["rows"])
    assert report["void"]
    assert "VOID" in done.stdout
    assert json.loads((tmp_path / "verified.json").read_text()) == {}


def test_a_cpu_is_for_tiny_runs_alone(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--tiny" in done.stderr


def stand_in(path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """For the interpreter that runs a part: a shell in which $out is the file for rows and $first the number of its first step."""
    path.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in --first) first=$2;; --out) out=$2;; esac; shift; done\n' + body + "\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_part_that_hangs_is_cut_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "slow", monkeypatch, 'echo \'[{"case": "first"}]\' > "$out"\nexec sleep 60')
    result = gpu.run_in_processes("kernels", 1.0, tmp_path, RUN)
    assert result["status"] == "cut after 1 s"
    assert result["rows"] == [{"case": "first"}]


def test_what_stands_behind_a_case_that_kills_its_process_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"case": "a"}, {"case": "b", "not_reached": True}, {"case": "c", "not_reached": True}]
    last = [{"case": "a"}, {"case": "b", "failed": "as marked"}, {"case": "c", "passes": True}]
    body = f"""if [ "$first" = 0 ]; then echo '{json.dumps(rows)}' > "$out"; exit 9; fi
[ "$first" = 2 ] || exit 1
grep -q "its process ended: exit status 9" "$out" || exit 1
echo '{json.dumps(last)}' > "$out\""""
    stand_in(tmp_path / "dies", monkeypatch, body)
    result = gpu.run_in_processes("kernels", 30.0, tmp_path, RUN)
    assert result["status"] == "ok"
    assert result["rows"] == last


def test_a_poisoned_process_is_followed_by_a_fresh_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"case": "a", "failed": "illegal access"}, {"case": "b", "not_reached": True}]
    body = f"""[ "$first" = 1 ] && {{ echo '[{{"case": "a"}}, {{"case": "b"}}]' > "$out"; exit 0; }}
echo '{json.dumps(rows)}' > "$out"; exit {gpu.POISONED}"""
    stand_in(tmp_path / "poisoned", monkeypatch, body)
    assert gpu.run_in_processes("kernels", 30.0, tmp_path, RUN)["rows"] == [{"case": "a"}, {"case": "b"}]


def test_a_process_that_gives_no_row_for_long_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STALL_S", 0.3)
    rows = [{"case": "a", "not_reached": True}]
    stand_in(tmp_path / "stuck", monkeypatch, f"echo '{json.dumps(rows)}' > \"$out\"\nexec sleep 60")
    result = gpu.run_in_processes("kernels", 30.0, tmp_path, RUN)
    assert result["status"] == "stuck"
    assert "stuck" in result["rows"][0]["failed"]


def probe(part: str, read: float) -> dict[str, Any]:
    found = {"read_bytes_per_s": read, "bf16_flops_per_s": 6e14, "kernel_in_graph_s": 1e-6}
    return {"part": part, "rows": [{"case": "machine", "gpu": "H", "commit": "c0"}, {"case": "all", **found}]}


@pytest.mark.parametrize(("after", "is_void"), [(3.05e12, False), (2.8e12, True)])
def test_probes_that_differ_make_a_run_void(after: float, is_void: bool) -> None:
    options = {"tiny": False}
    assert gpu.report_of([probe("probe_before", 3e12), probe("probe_after", after)], options)["void"] == is_void
    assert gpu.report_of([probe("probe_before", 3e12)], options)["void"]


def test_only_kernels_that_passed_whole_are_verified() -> None:
    rows = [("norm", True), ("norm", True), ("gated", True), ("gated", None), ("sample", False)]
    checked = {"part": "correctness", "rows": [{"kernel": kernel} | ({} if ok is None else {"passes": ok}) for kernel, ok in rows]}
    assert gpu.verified_of([probe("probe_before", 1.0), checked]) == {"H": {"norm": "c0"}}


@pytest.mark.parametrize(("times", "is_in"), [((1.0, 0.9), True), ((1.0, 0.99), False), ((1.0, 1.1), False), (None, False)])
def test_a_variant_must_have_been_faster_too(times: tuple[float, float] | None, is_in: bool) -> None:
    checked = {"part": "correctness", "rows": [{"kernel": "attention/mixed", "passes": True}]}
    row = {} if times is None else {"variants": {"none": times[0], "attention/mixed": times[1]}}
    found = gpu.verified_of([probe("probe_before", 1.0), checked, {"part": "attention", "rows": [{"case": "G4"} | row]}])
    assert found == ({"H": {"attention/mixed": "c0"}} if is_in else {})


def test_a_baseline_of_whole_models_joins_the_first_measured_row_of_its_line() -> None:
    about = [{"line": "G10", "case": "ours", "limit_s": 1.0, "measured_s": 2.0, "score": 0.5, "baselines": {}}]
    rows = [*about, {"line": "G10", "case": "theirs", "baseline": "them", "baseline_s": 8.0}, {"line": "G2", "case": "x", "not_built": "y"}]
    card = gpu.scorecard([{"rows": rows}])
    assert [row["line"] for row in card] == ["G2", "G10", "G10"]
    assert card[1]["baselines"] == {"them": 8.0}
    assert "them 4.00" in table(card)[2]


@pytest.mark.long
def test_tests_marked_for_a_gpu_are_found_and_cases_not_twice() -> None:
    """In a process of its own, because it runs pytest itself."""
    code = (
        "import json, sys, torch; from bench import gpu_clock, gpu_tests; "
        "steps = gpu_tests.steps(gpu_clock.Clock(torch.device('cuda'))); print(json.dumps([about for about, _ in steps]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = [about["case"] for about in json.loads(done.stderr.splitlines()[-1])]
    assert any("test_gpu.py::test_a_graph_captured_on_short_contexts" in name for name in found)
    assert any(name.startswith("tests/runner/") for name in found)
    assert not [name for name in found if "kernels/test_gpu.py::test_attention" in name]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_whole_command_runs_on_the_interpreter(tmp_path: Path) -> None:
    """Every part and every line of the scorecard has its rows, and none fails but what by its nature needs a device."""
    done = run("--device", "cpu", "--tiny", "--budget", "1200", "--out", str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["part"], part["status"]) for part in report["parts"]] == [(name, "ok") for name in gpu.PARTS]
    rows = [row for part in report["parts"] for row in part["rows"]]
    assert [(row["case"], row["failed"]) for row in rows if "failed" in row] == []
    assert not [row["case"] for row in rows if "not_reached" in row or "left_out" in row]
    lacking = {row["case"]: row["needs_device"] for row in rows if "needs_device" in row}
    assert lacking.keys() == NEEDS_DEVICE.keys()
    assert all(reason in lacking[case] for case, reason in NEEDS_DEVICE.items())
    assert {row["line"] for row in report["scorecard"]} == {f"G{number}" for number in range(1, 24)}
    measured = [row for row in report["scorecard"] if "measured_s" in row]
    assert len(measured) > 30
    assert all(row["score"] == pytest.approx(row["limit_s"] / row["measured_s"]) for row in measured if row["line"] != "G23")
    for line, names in BASELINES.items():
        first = next(row for row in measured if row["line"] == line)
        assert names <= {name for name, value in first["baselines"].items() if isinstance(value, float)}, first
