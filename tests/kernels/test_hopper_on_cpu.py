"""The prefill written for Hopper, run as it stands on a CPU, which no interpreter does. Its layouts and its speed are not tested here."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import prefill_hopper, reference
from kernels.attention.cases import AttentionCase
from kernels.ops import PagedKV
from tests.kernels import gluon_on_cpu
from tests.kernels.checks_attention import HOPPER_CASES
from tests.kernels.launches import record
from tests.kernels.rule import assert_earned, assert_guards_whole, guarded


@pytest.mark.parametrize("case", HOPPER_CASES, ids=lambda case: case.name)
def test_hopper_prefill(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = attention_cases.build(case, torch.bfloat16)
    assert prefill_hopper.can_run(q, kv, case.spec)
    out, memory = guarded(tuple(q.shape), q.dtype)
    num_decodes = kv.batch.num_decodes
    run(q, kv, case, out, monkeypatch)
    assert_guards_whole(memory)
    assert bool((out[:num_decodes] == 77).all()), "a decode is not its business"
    exact = reference.attend(q.double(), PagedKV(kv.keys.double(), kv.values.double(), kv.batch), case.spec)
    plain = reference.attend(q, kv, case.spec)
    assert_earned(out.flatten(1)[num_decodes:], plain[num_decodes:], exact[num_decodes:])


def run(q: torch.Tensor, kv: PagedKV, case: AttentionCase, out: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = prefill_hopper.hopper_prefill_kernel
    (launch,) = record(monkeypatch, prefill_hopper, lambda: prefill_hopper.prefill(q, kv, case.spec, out))
    monkeypatch.setattr(prefill_hopper, "hopper_prefill_kernel", kernel)
    num_items = launch.arguments["num_query_blocks"] * launch.arguments["num_kv_heads"]
    gluon_on_cpu.run_launch(launch, prefill_hopper, (min(num_items, 3), 1))
