"""The plain PyTorch back end: every op from its folder's `reference.py`. Runs on any device and under autograd.

No formula here. Called through `kernels.ops.select_ops("reference")`, and by other back ends for what they don't speed up.
"""

from __future__ import annotations

from dataclasses import replace

from kernels.attention.reference import attend
from kernels.compose import FineOps, compose
from kernels.experts.reference import experts
from kernels.gated.reference import gated
from kernels.kv_write.reference import kv_write
from kernels.linear.reference import embed, linear, pack
from kernels.norm.reference import rms_norm
from kernels.ops import Ops, StepOps
from kernels.sample.reference import sample
from kernels.step.reference import apply, prepare

REFERENCE_FINE_OPS = FineOps(attend, linear, embed, rms_norm, kv_write, gated, experts, sample, pack)


def reference_ops() -> Ops:
    return replace(compose("reference", REFERENCE_FINE_OPS), step=StepOps(apply, prepare))
