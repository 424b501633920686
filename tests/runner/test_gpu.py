"""Decode graphs on a device: what was captured on short contexts is right on long ones, padding included."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("shape", ["tiny", "tiny-experts"])
def test_captured_short_replayed_long_equals_eager(shape: str, batch: int) -> None:
    from bench.gpu_graphs import compare

    row = compare(shape, batch)
    assert row["capture_left_kv_alone"]
    assert row["largest_difference"] == 0
