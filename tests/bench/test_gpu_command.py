"""The one GPU command never dies half way: a part or a case that fails is a row that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device nothing fails")
def test_without_a_device_every_row_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--budget", "60", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in parts] == list(gpu.PARTS)
    assert parts[0]["status"] == "exit status 1"
    assert parts[0]["log"]
    for part in parts[1:]:
        assert len(part["rows"]) >= 6
        assert all(row["failed"] for row in part["rows"])


def test_a_part_that_hangs_is_cut_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the interpreter writes one row, as a part does after each case, and never ends."""
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\nfor last; do :; done\necho \'[{"case": "first"}]\' > "$last"\nexec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    result = gpu.run_in_process("kernels", 1.0, tmp_path)
    assert result["status"] == "cut after 1 s"
    assert result["rows"] == [{"case": "first"}]
