"""What the head's fused kernel must do, case by case and on any device: right scores, the reference's ids, no row that knows another.

Shared by the run on the interpreter and the run on a GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.reference import linear
from kernels.ops import SampleRows, Weight
from kernels.sample import cases, reference
from kernels.sample.noise import gumbel, noise_words
from tests.kernels.rule import assert_earned, guard_module


def check_draw(case: cases.SampleCase, width: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.sample import head_triton, triton

    x, head, rows = cases.build_head(case, width, dtype, device)
    before = x.clone()
    guards = [guard_module(monkeypatch, module) for module in (head_triton, triton)]
    got = head_triton.draw(x, head, rows)
    is_fused = head_triton.can_fuse(x, head, rows)
    for guard in guards if is_fused else guards[1:]:  # a composed draw allocates nothing in the first
        guard.check()
    assert torch.equal(x, before)
    logits = linear(x.float(), wide(head)) if is_fused else linear(x, head).float()
    assert_drawn(got.ids, logits, rows)
    if not is_fused:
        return
    last = only(rows, slice(case.num_rows - 1, None))
    if case.num_rows <= 16:
        assert head_triton.draw(x[-1:], head, last).ids.tolist() == got.ids[-1:].tolist()
    if not rows.is_filtered:  # the same draw through written scores
        assert head_triton.draw(x, head, replace(rows, is_filtered=True)).ids.tolist() == got.ids.tolist()


def check_scores(num_rows: int, vocab_size: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Logits as they leave the kernel, with nothing done to them: earned tolerance, and a row's bits alone are those in a crowd."""
    from kernels.sample import head_triton

    x, head, rows = cases.build_head(cases.SampleCase("", "", num_rows, vocab_size), width, dtype, device)
    scores = torch.empty((num_rows, vocab_size), device=device)
    peaks, sums = head_triton._launch(x, head, rows, scores)
    if isinstance(head, Tensor):
        assert_earned(scores, F.linear(x.float(), head.float()), F.linear(x.double(), head.double()).cpu())
    else:  # whole numbers are summed exactly
        assert torch.equal(scores, linear(x.float(), head))
    tiles = F.pad(scores, (0, -vocab_size % 128), value=float("-inf")).view(num_rows, -1, 128)
    assert torch.equal(peaks, tiles.amax(-1))
    torch.testing.assert_close(sums, (tiles - peaks[..., None]).exp().sum(-1))
    alone = torch.empty((1, vocab_size), device=device)
    head_triton._launch(x[-1:].contiguous(), head, only(rows, slice(num_rows - 1, None)), alone)
    assert torch.equal(alone[0], scores[-1])


def wide(head: Weight) -> Weight:
    """In float32, the same numbers."""
    return head.float() if isinstance(head, Tensor) else head


def assert_drawn(ids: Tensor, logits: Tensor, rows: SampleRows) -> None:
    """The reference's ids, or where sums in another order may decide, ids whose noisy score is as good to the last few bits."""
    expected = reference.sample(logits, rows).ids
    if ids.tolist() == expected.tolist():
        return
    noise = gumbel(noise_words(rows.seeds, rows.positions, logits.shape[1]))
    is_greedy = rows.temperature < reference.GREEDY_BELOW
    scores = reference.penalised(logits, rows) / torch.where(is_greedy, 1.0, rows.temperature)[:, None]
    noisy = torch.where(is_greedy[:, None], scores, scores + noise)
    gap = (noisy.gather(1, ids[:, None]) - noisy.gather(1, expected[:, None])).abs()
    assert float(gap.max()) < 1e-4 * float(scores[scores > float("-inf")].abs().max()), (ids.tolist(), expected.tolist())


def only(rows: SampleRows, part: slice) -> SampleRows:
    """Some of the rows, each with memory of its own."""
    tensors: dict[str, Any] = {
        field.name: value[part].clone() for field in fields(rows) if isinstance(value := getattr(rows, field.name), Tensor)
    }
    return replace(rows, **tensors)
