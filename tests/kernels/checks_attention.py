"""What the variants of attention must do, case by case and on any device that runs them. Shared by the interpreter, GPU tests and bench."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import reference
from kernels.attention.cases import AttentionCase
from kernels.ops import PagedKV
from tests.kernels.rule import assert_earned, assert_guards_whole, guard_module, guarded

Check = Callable[[AttentionCase, torch.dtype, str, pytest.MonkeyPatch], None]


def check_mixed(case: AttentionCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the two launches to the last bit, and nothing written outside of the output."""
    from kernels.attention import mixed_triton, triton

    q, kv = attention_cases.build(case, dtype, device)
    assert mixed_triton.can_run(q, kv, case.spec)
    expected = triton.attend(q, kv, case.spec).view_as(q)
    out, memory = guarded(tuple(q.shape), dtype, device)
    guards = guard_module(monkeypatch, mixed_triton)
    mixed_triton.attend_mixed(q, kv, case.spec, out)
    assert_guards_whole(memory)
    if guards.memories:
        guards.check()
    assert torch.equal(out, expected)
    exact = reference.attend(q.double(), PagedKV(kv.keys.double(), kv.values.double(), kv.batch), case.spec).view_as(q)
    assert_earned(out, reference.attend(q, kv, case.spec).view_as(q), exact)


def check_hopper(case: AttentionCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefills of a case by `prefill_hopper`, its decodes by the decode kernel: the rule, and no write outside of the output."""
    from kernels.attention import variants

    q, kv = attention_cases.build(case, dtype, device)
    guards = guard_module(monkeypatch, variants)
    got = variants.attend_by(frozenset({variants.HOPPER_PREFILL}), q, kv, case.spec)
    guards.check()
    exact = reference.attend(q.double(), PagedKV(kv.keys.double(), kv.values.double(), kv.batch), case.spec)
    assert_earned(got, reference.attend(q, kv, case.spec), exact)


def check_two_streams(case: AttentionCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to one stream to the last bit."""
    from kernels.attention import triton, variants

    q, kv = attention_cases.build(case, dtype, device)
    expected = triton.attend(q, kv, case.spec)
    guards = guard_module(monkeypatch, variants)
    got = variants.attend_by(frozenset({variants.TWO_STREAMS}), q, kv, case.spec)
    guards.check()
    assert torch.equal(got, expected)


MIXED_CASES = (
    AttentionCase("mixed", "several blocks of queries a prefill, two heads", ((1, 17), (1, 40), (40, 60), (3, 20)), 4, 2),
    AttentionCase("window_sink", "the sink of a decode and of a prefill", ((1, 130), (1, 12), (9, 100)), window=50, sink=4),
    AttentionCase("window", "full tiles between two edges", ((1, 40), (30, 200)), window=100),
    AttentionCase("splits", "decodes of two splits beside padding and a short prompt", ((1, 5), (1, 0), (1, 530), (2, 2))),
    AttentionCase("softcap", "capped scores", ((1, 40), (20, 60)), softcap=2.0),
    AttentionCase("odd", "an odd group, head width and block", ((1, 29), (60, 64)), 5, 1, 48, 12),
)
"""Steps with decodes and prefills: several items a program, sinks, splits, padding."""
HOPPER_CASES = (
    AttentionCase("prompt", "whole tiles, and a last one of a few keys", ((300, 300),), 4, 1, 128),
    AttentionCase("one_tile", "prompts of less than a tile; a decode in front", ((1, 90), (2, 2), (33, 33), (5, 5)), 3, 1, 64),
    AttentionCase("chunk", "queries start past many whole tiles, in the middle of one", ((200, 820), (65, 513)), 4, 2, 128),
    AttentionCase("odd_group", "two rows of each tile of queries are idle", ((130, 130), (60, 300)), 9, 3, 64),
    AttentionCase("window", "whole tiles between two edges; keys before the window are NaN", ((200, 900), (3, 400)), 4, 2, 128, window=300),
    AttentionCase(
        "small_window", "a window smaller than a tile, which lower rows see nothing of at first", ((200, 500),), 4, 1, 64, window=37
    ),
    AttentionCase("window_unused", "a window larger than every context", ((90, 140),), 4, 1, 64, window=1024),
    AttentionCase("large_blocks", "a copy brings half a tile", ((70, 300), (64, 64)), 4, 1, 128, 64),
    AttentionCase("small_blocks", "sixteen copies a tile", ((70, 300),), 4, 1, 64, 8),
    AttentionCase("wide_heads", "tiles of 64 keys", ((1, 40), (150, 290)), 4, 1, 256),
)
"""What `prefill_hopper` takes, and what may go wrong in it: tile edges, idle rows, hidden keys, the turn of its ring of tiles."""
VARIANT_CHECKS: dict[str, tuple[tuple[AttentionCase, ...], Check, tuple[torch.dtype, ...]]] = {
    "attention/hopper_prefill": (HOPPER_CASES, check_hopper, (torch.bfloat16, torch.float16)),
    "attention/mixed": (MIXED_CASES, check_mixed, (torch.bfloat16, torch.float32)),
    "attention/two_streams": (MIXED_CASES, check_two_streams, (torch.bfloat16, torch.float32)),
}
"""By the names that `verified.json` has: what a variant is to pass on a GPU before it stands there."""
