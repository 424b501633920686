"""The kernels compiled ahead of time, as the wrappers would launch them, for GPUs that need not be there.

Asked of each: it compiles, its shared memory fits the chip, and it takes what `resources.json` says: no register spills to memory, save
where that table says why. sm_90 is in the ordinary run; sm_80 and sm_100 in the long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import triton as attention
from kernels.attention.cases import AttentionCase
from kernels.attention.tiling import ONE_SPLIT_BYTES
from kernels.gated import cases as gated_cases
from kernels.gated import triton as gated
from kernels.kv_write import cases as kv_write_cases
from kernels.kv_write import triton as kv_write
from kernels.linear import cases as linear_cases
from kernels.linear import triton as linear
from kernels.norm import cases as norm_cases
from kernels.norm import triton as norm
from kernels.ops import Activation, Neighbourhood
from kernels.sample import cases as sample_cases
from kernels.sample import triton as sample
from tests.kernels.launches import CHIPS, NEVER_SPILL, SHARED_BYTES, Launch, assert_fits, compile_launch, record

STEP = ((1, 600), (3, 20))
ATTENTION = (
    AttentionCase("64", "a small model", STEP, 3, 1, 64),
    AttentionCase("64_window", "with local layers", STEP, 3, 1, 64, window=512, sink=4),
    AttentionCase(
        "64_near", "and pictures", STEP, 3, 1, 64, window=512, sink=4, near=Neighbourhood(8, 2, 2), pictures=(((1, 19),), ((1, 19),))
    ),
    AttentionCase("128", "a large model, group of eight", STEP, 8, 1, 128),
    AttentionCase("128_window", "with local layers", STEP, 4, 1, 128, window=1024, sink=4),
    AttentionCase("128_near", "a neighbourhood alone", STEP, 4, 1, 128, near=Neighbourhood(16, 4, 3), pictures=(((1, 19),), ((1, 19),))),
    AttentionCase("256", "the widest heads", STEP, 4, 1, 256),
    AttentionCase("256_window", "with local layers", STEP, 4, 1, 256, window=512),
    AttentionCase("256_softcap", "with capped scores", STEP, 2, 1, 256, softcap=50.0),
)
FAST = ("64", "64_near", "128", "128_window", "256")
"""In the ordinary run: compiling takes seconds each."""


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] * (case.name not in FAST)) for case in ATTENTION]
)
def test_attention(case: AttentionCase, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = attention_cases.build(case, dtype)
    launches = record(monkeypatch, attention, lambda: attention.attend(q, kv, case.spec))
    # A window that is not too large is read by one program, which needs no reduction.
    is_split = case.window is None or 2 * case.window * case.head_width * dtype.itemsize > ONE_SPLIT_BYTES
    assert [launch.name for launch in launches] == ["decode_kernel", *["reduce_kernel"] * is_split, "prefill_kernel"]
    for launch in launches:
        assert_fits(launch, capability, f"{case.name} {dtype}".replace("torch.", ""))


@pytest.mark.parametrize("width", [pytest.param(64, marks=pytest.mark.long), 128, pytest.param(256, marks=pytest.mark.long)])
def test_a_decode_of_few_sequences_fits_99_kb(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the most tiles in flight: 103 KB of them where there is room."""
    case = AttentionCase("", "", ((1, 600),), 4, 1, width)
    q, kv = attention_cases.build(case, torch.bfloat16)
    monkeypatch.setattr(attention, "shared_bytes", lambda device: SHARED_BYTES[89])
    decode, _ = record(monkeypatch, attention, lambda: attention.attend(q, kv, case.spec))
    assert compile_launch(decode, 89).shared_bytes <= SHARED_BYTES[89]


def small_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Every other kernel, in the shapes that a small and a large model give it."""
    for heads, kv_heads, width in ((9, 3, 64), (32, 8, 128), (4, 1, 256)):
        case = kv_write_cases.KVWriteCase("", "", 8, heads, kv_heads, width, has_norms=width > 64)
        inputs = kv_write_cases.build(case, torch.bfloat16)
        yield from record(monkeypatch, kv_write, lambda inputs=inputs: kv_write.kv_write(*inputs))  # type: ignore[misc]
    for width in (576, 4096, 16384):
        x, residual, weight, eps = norm_cases.build(norm_cases.NormCase("", "", 2, width), torch.bfloat16)
        yield from record(monkeypatch, norm, lambda args=(x, residual, weight, eps): norm.rms_norm(*args))  # type: ignore[misc]
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for activation in activations:
        gate_up, _ = gated_cases.build(gated_cases.GatedCase("", "", 2, 1536), torch.bfloat16)
        yield from record(monkeypatch, gated, lambda args=(gate_up, activation): gated.gated(*args))  # type: ignore[misc]
    for num_rows in (1, 64):
        product = linear_cases.build(linear_cases.LinearCase("", "", num_rows, 576, 1536), torch.bfloat16)
        yield from record(monkeypatch, linear, lambda product=product: linear.linear(*product))  # type: ignore[misc]
    for is_full in (False, True):
        case_of_rows = sample_cases.SampleCase("", "", 2, 49_152, top_k=50, has_penalties=is_full, masked=0.5 if is_full else None)
        logits, rows = sample_cases.build(case_of_rows)
        rows = replace(rows, logprobs=False)
        yield from record(monkeypatch, sample, lambda args=(logits, rows): sample.sample(*args))  # type: ignore[misc]


@pytest.mark.parametrize("capability", CHIPS)
def test_everything_else(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for launch in small_launches(monkeypatch):
        assert_fits(launch, capability)
        names.add(launch.name)
        monkeypatch.undo()  # the next launches are recorded through the kernels themselves
    assert NEVER_SPILL - {"decode_kernel", "reduce_kernel"} <= names
