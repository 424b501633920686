"""What stands in `verified.json`, and that a variant of attention is used where it stands and nowhere else."""

from __future__ import annotations

import json

import pytest
import torch

from kernels import verified
from kernels.attention import cases, mixed_triton, triton, variants
from kernels.attention.variants import VARIANTS


def test_the_file_names_variants_that_there_are() -> None:
    for kernels in json.loads(verified.PATH.read_text()).values():
        assert {name for name in kernels if name.startswith("attention/")} <= set(VARIANTS)


def test_no_variant_without_a_gpu() -> None:
    assert verified.verified(torch.device("cpu")) == frozenset()


@pytest.mark.parametrize("chosen", [frozenset(), frozenset({"linear/other"}), frozenset({variants.MIXED})], ids=str)
def test_a_variant_is_used_where_it_is_listed(chosen: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = cases.build(cases.AttentionCase("", "", ((1, 5), (3, 3))), torch.float32)
    calls: list[str] = []
    monkeypatch.setattr(variants, "verified", lambda device: chosen)
    monkeypatch.setattr(triton, "attend", lambda *args: calls.append("two launches"))
    monkeypatch.setattr(mixed_triton, "attend_mixed", lambda *args: calls.append("one launch"))
    variants.attend(q, kv, cases.AttentionCase("", "", ()).spec)
    assert calls == (["one launch"] if variants.MIXED in chosen else ["two launches"])


def test_the_hopper_prefill_leaves_what_it_cannot_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_decode", "_prefill"):
        monkeypatch.setattr(triton, name, lambda *args, name=name: calls.append(name))
    monkeypatch.setattr(variants._hopper(), "prefill", lambda *args: calls.append("hopper"))
    for softcap in (0.0, 5.0):
        case = cases.AttentionCase("", "", ((1, 5), (3, 3)), softcap=softcap)
        q, kv = cases.build(case, torch.bfloat16)
        variants.attend_by(frozenset(VARIANTS[:1]), q, kv, case.spec)
    assert calls == ["_decode", "hopper", "_decode", "_prefill"]
