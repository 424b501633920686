"""The one launch for decodes and prefills, on the interpreter: its bits are those of the two launches, whatever the list looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import mixed_triton
from kernels.attention.cases import AttentionCase
from tests.kernels import checks_attention
from tests.kernels.checks_attention import MIXED_CASES


@pytest.mark.parametrize("case", MIXED_CASES, ids=lambda case: case.name)
def test_one_launch_gives_the_bits_of_two(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = (torch.float32, torch.bfloat16)[MIXED_CASES.index(case) % 2]
    checks_attention.check_mixed(case, dtype, "cpu", monkeypatch)


def test_more_programs_than_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_triton, "num_programs_of", lambda device: 1000)
    checks_attention.check_mixed(MIXED_CASES[1], torch.float32, "cpu", monkeypatch)


def test_what_it_does_not_take() -> None:
    near = next(case for case in attention_cases.CASES if case.near is not None)
    q, kv = attention_cases.build(near, torch.float32)
    assert not mixed_triton.can_run(q, kv, near.spec)
    assert mixed_triton.can_run(q, kv, replace(near.spec, neighbourhood=None))
    assert not mixed_triton.can_run(q.bfloat16(), kv, replace(near.spec, neighbourhood=None))
