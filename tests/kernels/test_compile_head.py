"""The head's kernel and the sampling kernels of a large vocabulary compiled ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from kernels.sample import cases, head_triton
from kernels.sample import triton as sampling
from tests.kernels.launches import CHIPS, assert_fits, record


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize(
    ("num_rows", "is_full", "dtype"),
    [(16, True, torch.bfloat16), (64, False, torch.bfloat16), pytest.param(64, False, torch.int8, marks=pytest.mark.long)],
    ids=str,
)
def test_head(num_rows: int, is_full: bool, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spill in any variant: the accumulator is what sampling's noise is added to."""
    case = cases.SampleCase("", "", num_rows, 4096, has_penalties=is_full, masked=0.5)
    x, head, rows = cases.build_head(case, 576, dtype)
    assert head_triton.can_fuse(x, head, rows)
    for scores in (None, torch.empty((num_rows, 4096))):
        *_, launch = record(monkeypatch, head_triton, lambda scores=scores: head_triton._launch(x, head, rows, scores))  # type: ignore[misc]
        assert launch.name == "head_kernel"
        assert_fits(launch, capability, f"{num_rows} rows")
        monkeypatch.undo()


@pytest.mark.parametrize("capability", CHIPS)
def test_sampling_from_a_quarter_million(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = cases.build(cases.SampleCase("", "", 2, 262_144, top_k=50, top_p=0.9))
    launches = record(monkeypatch, sampling, lambda: sampling.sample(logits, rows))
    assert [launch.name for launch in launches] == ["score_kernel", "threshold_kernel", "draw_kernel", "choose_kernel"]
    for launch in launches:
        assert_fits(launch, capability)
