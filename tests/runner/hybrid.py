"""A tiny model with windows, run step by step over quantised keys and values. Shared by tests of back ends and of dtypes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bench.models import SHAPES, RandomSource
from kernels.ops import select_ops
from service.model.transformer import Precision, Transformer, build_transformer
from tests.parity.steps import Steps

FP8 = torch.float8_e4m3fn
IDS = torch.randint(500, (60,), generator=torch.Generator().manual_seed(1)).tolist()


def hybrid(ops: Literal["reference", "triton"] = "reference", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """Two layers with a window of 24 and a sink of 4, two that see everything; the same weights for every back end and device."""
    config, cpu = SHAPES["tiny"], torch.device("cpu")
    source = RandomSource(config, cpu)
    return build_transformer(config, source, select_ops(ops), precision=Precision(dtype), device=torch.device(device))


def desk_of(model: Transformer, dtype: torch.dtype, local_dtype: torch.dtype | None = torch.bfloat16, device: str = "cpu") -> Steps:
    return Steps(model, dtype=dtype, local_dtype=local_dtype, num_blocks=120, device=device)


def logits(desk: Steps, sequence: int = 0, count: int = 60) -> Tensor:
    """Of `count` of IDS: a prompt in two chunks, then token by token."""
    pieces = [IDS[:37], IDS[37:50], *([token] for token in IDS[50:count])]
    return torch.cat([desk.run([(sequence, piece)])[0] for piece in pieces])


def moved(got: Tensor, exact: Tensor) -> float:
    return float((got.cpu() - exact).norm() / exact.norm())
