"""The GPU back end: Triton kernels, cuBLAS for dense products of many rows, plain PyTorch for a table's rows.

No formula here. Called through `kernels.ops.select_ops("triton")`. `verified.json` beside this file records which kernels passed
`tests/kernels/test_gpu.py`: {GPU name: {kernel folder: commit}}; it is empty until a GPU has run them.
"""

from __future__ import annotations

from dataclasses import replace

from kernels.attention.triton import attend
from kernels.compose import FineOps, compose
from kernels.experts.triton import deterministic_experts, experts
from kernels.gated.triton import gated
from kernels.kv_write.triton import kv_write
from kernels.linear.fused_triton import fused
from kernels.linear.triton import deterministic_linear, embed, linear, pack
from kernels.norm.triton import rms_norm
from kernels.ops import Ops, StepOps
from kernels.sample.head_triton import draw
from kernels.sample.triton import sample
from kernels.step.triton import apply, prepare

TRITON_FINE_OPS = FineOps(attend, linear, embed, rms_norm, kv_write, gated, experts, sample, pack)


def triton_ops(deterministic: bool = False) -> Ops:
    """deterministic: the rows of a result depend on no other row, bit by bit; products are then own kernels at every number of rows, and
    no coarse op is fused for few of them."""
    if deterministic:
        own = replace(TRITON_FINE_OPS, linear=deterministic_linear, experts=deterministic_experts(deterministic_linear))
        ops = compose("triton", own)
    else:
        ops = fused(replace(compose("triton", TRITON_FINE_OPS), draw=draw))
    return replace(ops, step=StepOps(apply, prepare))
