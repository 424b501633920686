"""The GPU back end: Triton kernels, cuBLAS for dense products, plain PyTorch for a table's rows.

No formula here. Called through `kernels.ops.select_ops("triton")`. `verified.json` beside this file records which kernels passed
`tests/kernels/test_gpu.py`: {GPU name: {kernel folder: commit}}; it is empty until a GPU has run them.
"""

from __future__ import annotations

from kernels.attention.variants import attend
from kernels.compose import FineOps, compose
from kernels.gated.triton import gated
from kernels.kv_write.triton import kv_write
from kernels.linear.reference import embed, pack
from kernels.linear.triton import linear
from kernels.norm.triton import rms_norm
from kernels.ops import Ops
from kernels.sample.triton import sample

TRITON_FINE_OPS = FineOps(attend, linear, embed, rms_norm, kv_write, gated, sample, pack)


def triton_ops() -> Ops:
    return compose("triton", TRITON_FINE_OPS)
