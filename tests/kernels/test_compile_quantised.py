"""Products by quantised weights compiled ahead of time: they fit every chip, spill nothing, and what stands in them as PTX says what the
plain code beside it says."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from kernels.linear import cases, fp8_triton, grouped_triton
from kernels.linear import triton as linear
from kernels.linear.cases import FloatCase, LinearCase
from kernels.linear.split_triton import LEAST_CHUNKS, MOST_SPLITS, split_inputs
from tests.kernels.launches import CHIPS, assert_fits, record
from tests.kernels.ptx import run

FLOATS = [
    pytest.param(kind, num_rows, marks=() if num_rows == 16 and kind != "groups8" else pytest.mark.long)
    for kind in ("int4", "groups8", "fp8")
    for num_rows in (1, 16, 40)
]


MARKS = {"int4": "0x41804180", "groups8": "0fCB000000", "fp8": "0x7B807B80"}
"""Of the assembly that unpacks several numbers at once."""


def _keeping(compile_it: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(compile_it(*args, **kwargs))
        return kept[-1]

    return keep


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize(("kind", "num_rows"), FLOATS)
def test_products(kind: str, num_rows: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are split, as those of a deep matrix are."""
    x, weight = cases.build_float(FloatCase("", "", kind, num_rows, 1024, 256), torch.bfloat16)  # type: ignore[arg-type]
    packed, module = linear.pack(weight), fp8_triton if kind == "fp8" else grouped_triton
    (launch,) = record(monkeypatch, module, lambda: linear.linear(x, packed))
    assert launch.arguments["SPLITS"] > 1
    compiled = []
    monkeypatch.setattr(triton, "compile", _keeping(triton.compile, compiled))
    assert_fits(launch, capability, f"{kind} {num_rows}")
    ptx = compiled[0].asm["ptx"]
    assert MARKS[kind] in ptx, "numbers are unpacked one by one"
    assert "cp.async" in ptx, "nothing is loaded ahead"
    assert "wgmma" not in ptx


@pytest.mark.long
@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("kind", ["int4", "groups8"])
def test_rows_of_tables(kind: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = cases.build_float(FloatCase("", "", kind, 1, 288, 64), torch.bfloat16)  # type: ignore[arg-type]
    packed, ids = linear.pack(weight), torch.zeros(3, dtype=torch.int64)
    x = torch.zeros((grouped_triton.MOST_ROWS + 1, 288), dtype=torch.bfloat16)
    calls = (lambda: linear.embed(ids, packed, torch.bfloat16), lambda: linear.linear(x, packed))
    launches = record(monkeypatch, grouped_triton, lambda: [call() for call in calls])
    assert [launch.arguments["ids_ptr"] is None for launch in launches] == [False, True]
    for launch in launches:
        assert_fits(launch, capability, kind)


@pytest.mark.parametrize("capability", [90, pytest.param(100, marks=pytest.mark.long)])
def test_rows_become_8_bit_floats(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros((2, 4096), dtype=torch.bfloat16)
    (launch,) = record(monkeypatch, fp8_triton, lambda: fp8_triton.quantize_fp8_rows(x))
    assert_fits(launch, capability)


INT8 = (
    (1, 2048, ["fused_int8_kernel"]),
    (16, 1024, ["quantize_kernel", "few_int8_kernel"]),
    (32, 4096, ["quantize_kernel", "few_int8_kernel"]),
    (64, 4096, ["quantize_kernel", "int8_kernel"]),
    (512, 4096, ["quantize_kernel", "int8_kernel"]),
)


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize(
    ("num_rows", "depth", "names"), [pytest.param(*case, marks=pytest.mark.long if case[0] > 16 else ()) for case in INT8]
)
def test_int8(num_rows: int, depth: int, names: list[str], capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = cases.build(LinearCase("", "", num_rows, depth, 256), torch.bfloat16)
    launches = record(monkeypatch, linear, lambda: linear.linear(x, linear.pack(weight)))
    assert [launch.name for launch in launches] == names
    assert_fits(launches[-1], capability, f"{num_rows}")


@pytest.mark.parametrize("num_tiles", [1, 9, 64, 448, 2004])
def test_splits_cover_all_inputs_once(num_tiles: int) -> None:
    for num_chunks in range(1, 130):
        split = split_inputs(num_tiles, num_chunks)
        assert (split.count - 1) * split.chunks < num_chunks <= split.count * split.chunks, "none is empty, none is left out"
        assert split.count <= MOST_SPLITS
        assert split.count == 1 or split.chunks >= LEAST_CHUNKS


# --- what stands in them as PTX -----------------------------------------------------------------------------------------------------


def bfloat16s(register: int) -> list[float]:
    """Of the low half, then of the high one."""
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in (register & 0xFFFF, register >> 16)]


@pytest.mark.parametrize("index", range(4))
def test_pairs_of_4_bits(index: int) -> None:
    asm = grouped_triton.PAIRS_OF_4_BITS.value[index]
    for word in (*range(0, 1 << 16, 257), 0xFFFF, 0x8000, 0x1234):
        (found,) = run(asm, 1, [word | (word ^ 0xA5A5) << 16])
        assert bfloat16s(found) == [16 + (each >> 4 * index & 15) for each in (word, word ^ 0xA5A5)]


@pytest.mark.parametrize("index", range(2))
def test_pairs_of_8_bits(index: int) -> None:
    asm = grouped_triton.PAIRS_OF_8_BITS.value[index]
    for number in range(256):
        low, high = number << 8 * index, (255 - number) << 8 * index
        other = 0x5A << 8 * (1 - index)
        (found,) = run(asm, 1, [low | other | (high | other) << 16])
        assert bfloat16s(found) == [number, 255 - number]


def test_four_8_bit_floats() -> None:
    """All codes, in every place."""
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    for first, second, third, fourth in zip(codes, codes[1:], codes[7:], itertools.cycle(codes[::-1]), strict=False):
        found = run(fp8_triton.FOUR_NUMBERS.value, 2, [first | second << 8 | third << 16 | fourth << 24])
        expected = [float(exact[code]) for code in (first, second, third, fourth)]
        assert bfloat16s(found[0]) + bfloat16s(found[1]) == expected
