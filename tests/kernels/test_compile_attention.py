"""The variants of attention compiled ahead of time: the one launch for decodes and prefills, and the prefill written for Hopper.

Of the latter the machine code is read too: its products have to be those of whole warpgroups, its copies the copy engine's, and a tile's
exponentials have to lie where a product is under way.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention import cases as attention_cases
from kernels.attention import mixed_triton, prefill_hopper
from kernels.attention.cases import AttentionCase
from tests.kernels.launches import CHIPS, CUOBJDUMP, SHARED_BYTES, TYPES, Launch, compile_launch, record

STEP = ((1, 600), (3, 20))
MIXED = (
    pytest.param(AttentionCase("128", "a large model", STEP, 8, 1, 128), id="128"),
    pytest.param(AttentionCase("64", "a small model", STEP, 3, 1, 64), id="64", marks=pytest.mark.long),
    pytest.param(
        AttentionCase("128_window", "local layers", STEP, 4, 1, 128, window=1024, sink=4), id="128_window", marks=pytest.mark.long
    ),
)
SPILLED = {(80, "128"): 24, (80, "64"): 32, (80, "128_window"): 88, (100, "128_window"): 8}
"""Bytes a thread that the one launch for both spills: on these chips products take their rows from registers, and four warps hold 64 rows
that a prefill of its own gives to eight. Where that costs more than it saves, `bench.gpu` does not list the kernel."""
HOPPER = (
    pytest.param(AttentionCase("128", "a large model", STEP, 4, 1, 128), id="128"),
    pytest.param(
        AttentionCase("64_window", "local layers, an odd group", STEP, 3, 1, 64, window=512), id="64_window", marks=pytest.mark.long
    ),
    pytest.param(AttentionCase("128_window", "local layers", STEP, 8, 1, 128, 64, window=1024), id="128_window", marks=pytest.mark.long),
    pytest.param(AttentionCase("64", "a small model", STEP, 3, 1, 64), id="64", marks=pytest.mark.long),
    pytest.param(AttentionCase("256", "the widest heads", STEP, 4, 1, 256), id="256", marks=pytest.mark.long),
)


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("case", MIXED)
def test_mixed(case: AttentionCase, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = attention_cases.build(case, torch.bfloat16)
    launches = record(monkeypatch, mixed_triton, lambda: mixed_triton.attend_mixed(q, kv, case.spec, torch.empty_like(q)))
    assert launches[0].name == "mixed_kernel"
    for launch in launches:
        compiled = compile_launch(launch, capability)
        assert compiled.shared_bytes <= SHARED_BYTES[capability]
        assert compiled.stack_bytes <= SPILLED.get((capability, case.name), 0)


@pytest.mark.parametrize("case", HOPPER)
def test_hopper_prefill(case: AttentionCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    q, kv = attention_cases.build(case, torch.bfloat16)
    assert prefill_hopper.can_run(q, kv, case.spec)
    (launch,) = record(monkeypatch, prefill_hopper, lambda: prefill_hopper.prefill(q, kv, case.spec, torch.empty_like(q)))
    compiled = compile_gluon(launch)
    assert compiled.metadata.shared <= SHARED_BYTES[90]
    code = machine_code(compiled.asm["cubin"], tmp_path)
    tile = prefill_hopper.KEYS[case.head_width]
    assert re.search(rf"HGMMA\.64x{tile}x16\.F32\.BF16", code), "scores"
    assert re.search(rf"HGMMA\.64x{case.head_width}x16\.F32\.BF16", code), "sums of values"
    # Each block of places is fetched by 64 numbers a copy, keys and values.
    assert code.count("UTMALDG.2D") == 2 * (tile // case.block_size) * (case.head_width // 64)
    assert "HMMA" not in code.replace("HGMMA", "")
    # Between the wait for scores and the wait for sums: the whole softmax of a tile, and nothing spilled.
    overlaps = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", code, re.DOTALL)
    assert len(overlaps) == 2 * (3 if case.window else 2)  # of both groups: whole tiles, and those masked at either end
    for overlap in overlaps:
        assert overlap.count("MUFU.EX2") >= tile // 2  # of a row, each of four threads has a quarter; a thread has two rows
    stack = re.search(r"STACK:(\d+)", resources(tmp_path))
    assert stack is not None
    # Row offsets and the numbers of an item, put by from its begin to its end; sums of width 256 take half of all registers.
    assert int(stack[1]) <= (112 if case.head_width == 256 else 80)


def test_what_the_hopper_prefill_takes() -> None:
    case = AttentionCase("128", "", STEP, 4, 1, 128)
    q, kv = attention_cases.build(case, torch.bfloat16)
    assert prefill_hopper.can_run(q, kv, case.spec)
    assert not prefill_hopper.can_run(q.float(), kv, case.spec)
    for other in (
        AttentionCase("", "sink", STEP, 4, 1, 128, window=9, sink=2),
        AttentionCase("", "softcap", STEP, 4, 1, 128, softcap=2.0),
        AttentionCase("", "a width without a tile", STEP, 4, 1, 48),
        AttentionCase("", "blocks that no tile is made of", STEP, 4, 1, 128, 12),
        AttentionCase("", "more query heads than a group of warps has rows", STEP, 128, 1, 64),
    ):
        q, kv = attention_cases.build(other, torch.bfloat16)
        assert not prefill_hopper.can_run(q, kv, other.spec), other.why


def compile_gluon(launch: Launch) -> Any:
    """As `launches.compile_launch`, for a kernel in Gluon with descriptors of the copy engine."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or is_one:
            signature[param.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[param.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
    source = GluonASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.num_warps})


def machine_code(cubin: bytes, folder: Path) -> str:
    (folder / "kernel.cubin").write_bytes(cubin)
    return dump("-sass", folder)


def resources(folder: Path) -> str:
    return dump("--dump-resource-usage", folder)


def dump(option: str, folder: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, str(folder / "kernel.cubin")], check=True, capture_output=True, text=True).stdout
