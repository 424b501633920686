"""The gated activation between a feed-forward block's two products, in Triton.

No model here. Called by `triton_ops`.
Shape suffixes: T tokens, F feed-forward width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend
from kernels.ops import Activation

BLOCK = 1024


def gated(gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, [T, F] in the input's dtype, computed in float32. Raises: ValueError for another activation."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"unknown activation {activation!r}; there are silu and gelu_tanh")
    gate_up_T2F = gate_up_T2F.contiguous()
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if num_rows:
        is_dependent = can_depend(gate_up_T2F.device)
        gated_kernel[(num_rows, triton.cdiv(width, BLOCK))](
            gate_up_T2F,
            out,
            F=width,
            IS_GELU=activation == "gelu_tanh",
            BLOCK=BLOCK,
            DEPENDENT=is_dependent,
            num_warps=4,
            launch_pdl=is_dependent,
        )
    return out


@triton.jit
def activated(gate, IS_GELU: tl.constexpr):
    """Both activations are gate * sigmoid(something), since (1 + tanh(u)) / 2 = sigmoid(2u)."""
    inner = gate
    if IS_GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    decay = tl.exp(-tl.abs(inner))  # never overflows
    return gate * tl.where(inner < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def gated_kernel(gate_up_ptr, out_ptr, F: tl.constexpr, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One stretch of one row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=is_column, other=0.0).to(tl.float32)
    y = activated(gate, IS_GELU) * up
    tl.store(out_ptr + row * F + column, y.to(out_ptr.dtype.element_ty), mask=is_column)
