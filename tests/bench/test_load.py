"""What the load generator makes of the answers it gets."""

from __future__ import annotations

import pytest

from bench.load import Answer, Load, summarise

LOAD = Load(users=2, requests_per_user=1, prompt_tokens=8, output_tokens=4, shared_prefix=0, seed=1)


def test_figures_by_hand() -> None:
    answers = [
        Answer(sent=10.0, chunk_times=[10.5, 11.0, 12.0], prompt_tokens=8, cached_tokens=4, output_tokens=4),
        Answer(sent=20.0, chunk_times=[20.1, 20.4], prompt_tokens=8, output_tokens=4),
        Answer(sent=1.0, error="refused"),
    ]
    row = summarise(answers, 4.0, LOAD)
    assert (row["completed"], row["failed"], row["errors"]) == (2, 1, ["refused"])
    assert row["output_throughput"] == 2.0
    assert row["ttft_ms"]["p50"] == pytest.approx(300)
    assert row["tpot_ms"]["mean"] == pytest.approx((500 + 100) / 2)
    assert row["cached_tokens_per_request"] == 2


def test_nothing_but_failures_is_no_crash() -> None:
    row = summarise([Answer(sent=0.0, error="gone")], 1.0, LOAD)
    assert (row["completed"], row["output_throughput"], row["ttft_ms"]) == (0, 0, {})
