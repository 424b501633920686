"""Part of `bench.gpu`: the tests marked for a GPU, each a row, so that whatever has such tests is checked here without being named here.

Left out are those that `gpu_correctness` runs case by case. A file `test_gpu_NAME.py` whose tests all pass enters NAME into verified.json.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_clock import Clock, NeedsDeviceError
from bench.gpu_correctness import CHECKS
from bench.gpu_score import Step

TESTS = Path(__file__).parents[1] / "tests"
# Without the project's own settings and fixtures: a machine that is lent for an hour has not all of what they need.
OPTIONS = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "--noconftest", "-c", os.devnull, "--rootdir", str(TESTS.parent)]


class _Collector:
    """Notes what pytest collects and how it went."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.outcomes: list[str] = []
        self.words = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cased = {("test_gpu.py", f"test_{name}") for name in CHECKS}
        self.found = [item.nodeid for item in items if (item.path.name, getattr(item, "originalname", item.name)) not in cased]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.append(report.outcome)
            self.words += str(report.longrepr or "")[-500:]


def steps(clock: Clock) -> list[Step]:
    if not clock.is_gpu:
        return [({"case": "tests marked for a GPU"}, partial(run, clock, ""))]
    collector = _Collector()
    files = sorted(map(str, TESTS.rglob("test_gpu*.py")))
    pytest.main([*OPTIONS, "--collect-only", *(file for file in files if "bench" not in Path(file).parts)], plugins=[collector])
    return [({"case": name} | kernel_of(name), partial(run, clock, name)) for name in collector.found]


def kernel_of(name: str) -> dict[str, str]:
    """Of tests/kernels/test_gpu_NAME.py NAME; other files are of no kernel."""
    file = Path(name.split("::")[0])
    is_kernel = file.parent.name == "kernels" and file.stem.startswith("test_gpu_")
    return {"kernel": file.stem.removeprefix("test_gpu_")} if is_kernel else {}


def run(clock: Clock, name: str) -> dict[str, Any]:
    if not clock.is_gpu:
        raise NeedsDeviceError("they are skipped without one")
    collector = _Collector()
    pytest.main([*OPTIONS, str(TESTS.parent / name)], plugins=[collector])
    if collector.outcomes != ["passed"]:
        raise AssertionError(f"{collector.outcomes}: {collector.words[-500:]}")
    return {"passes": True}
