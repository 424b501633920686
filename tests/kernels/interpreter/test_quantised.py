"""Products by numbers in groups and by 8-bit floats on Triton's interpreter, and every number that their codes can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.compose import compose
from kernels.linear import reference, triton
from kernels.linear.cases import FLOAT_CASES, FloatCase, LinearCase, build
from kernels.linear.fp8_triton import quantize_fp8_rows
from kernels.ops import Fp8Weight, GroupedWeight, select_ops
from kernels.reference_ops import REFERENCE_FINE_OPS, reference_ops
from service.model.transformer import Precision, build_transformer
from tests.kernels import checks_quantised as checks
from tests.model.checkpoints import TINY
from tests.model.test_precision import Numbers
from tests.parity.steps import Steps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARKS = {"tiny": (), "small": (pytest.mark.long,)}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=MARKS[case.size]) for case in FLOAT_CASES if case.size in MARKS])
def test_products(case: FloatCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    checks.check_float_product(case, DTYPES[FLOAT_CASES.index(case) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4_one_group", "groups8_ragged", "fp8_ragged"])
def test_rounding(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_float_product(next(case for case in FLOAT_CASES if case.name == name), dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("name", ["int4_ragged", "groups8_ragged"])
def test_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_table(next(case for case in FLOAT_CASES if case.name == name), torch.float32, "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_of_fp8_is_exact(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()]
    assert len(values) == 254
    weight = Fp8Weight(254, 1, values[:, None].contiguous(), torch.ones(254))
    got = triton.linear(torch.ones((1, 1), dtype=dtype), weight)[0]
    assert torch.equal(got.float(), values.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_of_a_group_is_exact(bits: int, dtype: torch.dtype) -> None:
    """One input of a group is 1 and the others 0, so that a product is one number of the weight."""
    count = 2**bits
    values = (torch.arange(count)[:, None] + torch.arange(128)[None, :]).to(torch.uint8) % count if bits == 4 else None
    if values is None:
        values = (torch.arange(count)[:, None] + 3 * torch.arange(128)[None, :]).to(torch.uint8)
    weight = GroupedWeight(count, 128, bits, values, torch.ones(count, 4).half(), torch.zeros(count, 4).half())
    places = torch.tensor([0, 31, 32, 63, 64, 95, 97, 127])
    x = torch.zeros((8, 128), dtype=dtype)
    x[torch.arange(8), places] = 1
    assert torch.equal(triton.linear(x, triton.pack(weight)).T, values[:, places].to(dtype))


def test_rows_become_8_bit_floats_as_plain_pytorch_makes_them() -> None:
    x = torch.randn((3, 300), generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-4], [300.0]])
    x[0, :7] = 0
    values, scales = quantize_fp8_rows(x)
    expected, expected_scales = reference.quantize_rows_fp8(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("num_rows", [1, 8, 9, 20])
def test_few_rows_by_int8_in_splits(num_rows: int) -> None:
    """Packed or not, quantised by the product itself or before it, the sums are whole numbers: equal to the last bit."""
    x, weight = build(LinearCase("splits", "", num_rows, 1100, 65), torch.float32)
    x[0] = 0
    packed = triton.pack(weight)
    expected = reference.linear(x, weight)
    assert torch.equal(triton.linear(x, packed), expected)
    assert torch.equal(triton.linear(x, packed), expected), "arrivals are back at zero"
    assert torch.equal(triton.linear(x, weight), expected)


def test_the_back_end_packs_once_and_drops_what_it_does_not_read() -> None:
    ops = select_ops("triton")
    dense = torch.randn((40, 64), generator=torch.Generator().manual_seed(0))
    packed = ops.pack(reference.quantize_grouped(dense, 4))
    assert isinstance(packed, GroupedWeight)
    assert packed.values.numel() == packed.scales.numel() == 0
    fp8 = ops.pack(reference.quantize_fp8(dense))
    assert isinstance(fp8, Fp8Weight)
    x = torch.ones((2, 64))
    assert torch.equal(ops.linear(x, fp8), ops.linear(x, replace(fp8, packed=None)))
    assert ops.linear(x[:0], packed).shape == ops.linear(x[:0], fp8).shape == (0, 40)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_a_model_with_post_norms_reads_as_its_dense_self(weights: str) -> None:
    """int8 and int4 in groups, the table among them, and fp8: all products and tables from here, the rest in plain PyTorch."""
    config = replace(TINY, layers=TINY.layers[:1], has_post_norms=True)
    source = Numbers(config)
    ours = compose("products", replace(REFERENCE_FINE_OPS, linear=triton.linear, embed=triton.embed, pack=triton.pack))
    logits = {}
    for name, ops in (("dense", reference_ops()), (weights, ours)):
        model = build_transformer(config, source, ops, precision=Precision(torch.float32, name))  # type: ignore[arg-type]
        logits[name] = Steps(model, block_size=16, num_blocks=8).run([(0, [1, 5, 9, 3])])[0]
    error = (logits[weights] - logits["dense"]).norm() / logits["dense"].norm()
    assert error < {"int8": 0.02, "int4": 0.2, "fp8": 0.1}[weights]
