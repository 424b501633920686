"""A rotated model is the same function, and its activations have lost their outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.models import SHAPES, RandomSource
from kernels.ops import select_ops
from service.model.config import ModelConfig
from service.model.rotation import RotatedSource, random_rotation
from service.model.transformer import Precision, build_transformer
from tests.parity.steps import Steps

IDS = [(11 * i * i + 5) % 509 for i in range(33)]


@pytest.mark.parametrize("options", [{}, {"has_qk_norm": True, "has_tied_head": False}, {"has_qkv_bias": True}])
def test_same_function(options: dict[str, bool]) -> None:
    config: ModelConfig = replace(SHAPES["tiny"], **options)  # type: ignore[arg-type]
    source = RandomSource(config, torch.device("cpu"))
    tensors = {name: source.get(name) for name in source.shapes}

    class Fixed:
        def get(self, name: str) -> torch.Tensor:
            return tensors[name]

    plain = build_transformer(config, Fixed(), select_ops("reference"), precision=Precision(torch.float32))
    rotated = RotatedSource(Fixed(), config)
    turned = build_transformer(replace(config, has_tied_head=False), rotated, select_ops("reference"), precision=Precision(torch.float32))
    want, got = Steps(plain).run([(0, IDS)])[0], Steps(turned).run([(0, IDS)])[0]
    assert float(want.std()) > 0.5, "flat logits would hide a wrong rotation"
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_rotation_is_orthogonal_and_always_the_same() -> None:
    first = random_rotation(96, 7)
    assert torch.equal(first, random_rotation(96, 7))
    torch.testing.assert_close(first @ first.T, torch.eye(96), atol=1e-5, rtol=0)


def test_an_outlier_channel_is_spread() -> None:
    row = torch.randn(576, generator=torch.Generator().manual_seed(1))
    row[17] = 300.0
    turned = row @ random_rotation(576, 1)
    assert float(row.abs().max() / row.square().mean().sqrt()) > 20
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 6
