"""Products by quantised weights on the device: the same cases and rule as on the interpreter, and rows that know no others."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import cases, fp8_triton, grouped_triton, reference, triton
from kernels.linear.cases import FLOAT_CASES, FloatCase, LinearCase
from tests.kernels import checks_quantised as checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FITTING = [pytest.param(case, id=case.name) for case in FLOAT_CASES if case.size != "bench"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FITTING)
def test_products(case: FloatCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_float_product(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4_ragged", "groups8_ragged"])
def test_tables(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_table(next(case for case in FLOAT_CASES if case.name == name), dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("kind", ["int4", "groups8", "fp8"])
def test_a_row_is_the_same_in_tiles_of_every_size(kind: str) -> None:
    most = fp8_triton.MOST_ROWS if kind == "fp8" else grouped_triton.MOST_ROWS
    x, weight = cases.build_float(FloatCase("", "", kind, most, 4096, 1056), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    packed = triton.pack(weight)
    all_rows = triton.linear(x, packed)
    for count in (1, 8, 9, 16, 17, 33):
        assert torch.equal(triton.linear(x[:count], packed), all_rows[:count])


@pytest.mark.parametrize("kind", ["int4", "groups8", "fp8"])
def test_a_graph_is_replayed_over_the_same_arrivals(kind: str) -> None:
    x, weight = cases.build_float(FloatCase("", "", kind, 4, 4096, 256), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    packed = triton.pack(weight)
    expected = triton.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton.linear(x, packed)
    for _ in range(3):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 64, 512])
def test_int8_in_tiles_of_every_size(num_rows: int) -> None:
    x, weight = cases.build(LinearCase("", "", num_rows, 1100, 1056), torch.bfloat16, "cuda")
    assert torch.equal(triton.linear(x, triton.pack(weight)), reference.linear(x, weight))


def test_rows_become_8_bit_floats_as_plain_pytorch_makes_them() -> None:
    if torch.cuda.get_device_capability() < fp8_triton.VENDOR_CAPABILITY:
        pytest.skip("the chip has no such floats")
    x = torch.randn((64, 4100), generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    values, scales = fp8_triton.quantize_fp8_rows(x)
    expected, expected_scales = reference.quantize_rows_fp8(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_a_hopper_has_the_vendors_product() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    assert fp8_triton.vendor_multiplies(0)
