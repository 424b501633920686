"""What `--deterministic` chooses, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.ops import select_ops
from service.engine.messages import Load
from service.errors import StartupError
from service.runner.load import load_models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_products_of_a_cpu_are_not_called_deterministic(dtype: str) -> None:
    load = Load(
        models=(), dtype=dtype, device="cpu", memory_bytes=0, max_context=0, max_batch_tokens=8, max_sequences=1, prefix_cache=True,  # type: ignore[arg-type]
        deterministic=True,
    )  # fmt: skip
    with pytest.raises(StartupError, match=f"--deterministic with --dtype {dtype} needs a GPU; on a CPU int8 and int4 are deterministic"):
        load_models(load, lambda phase, fraction: None)


def test_a_gpu_multiplies_by_other_kernels() -> None:
    pytest.importorskip("triton")
    from kernels.linear.triton import deterministic_linear, linear

    fast, same = select_ops("triton"), select_ops("triton", deterministic=True)
    assert (fast.linear, same.linear) == (linear, deterministic_linear)
    assert fast.attend is same.attend
    assert "fused" not in same.qkv.__module__
    assert "fused" in fast.qkv.__module__
    x, weight = torch.ones(17, 8), torch.ones(4, 8)
    assert torch.equal(select_ops("cpu", deterministic=True).linear(x, weight), select_ops("cpu").linear(x, weight))
