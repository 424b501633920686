"""The kernels that prepare a step, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import pytest

from kernels.step import cases
from kernels.step import triton as step
from tests.kernels.launches import CHIPS, assert_fits, record


@pytest.mark.parametrize("capability", CHIPS)
def test_step(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation serves all batch sizes: no number of the launch is special."""
    case = next(case for case in cases.CASES if case.name == "bench")
    numbers, state, rows = cases.build(case)
    tables, updates = cases.build_updates(case)

    def call() -> None:
        step.prepare(numbers, state, rows, case.block_size)
        step.apply(tables, updates)

    launches = record(monkeypatch, step, call)
    assert [launch.name for launch in launches] == ["prepare_kernel", "apply_kernel"]
    for launch in launches:
        assert_fits(launch, capability)
