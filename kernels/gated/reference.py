"""The gated activation between a feed-forward block's two products, in plain PyTorch.

No Triton here and no model. Called by `reference_ops`, by back ends without a kernel of their own, and by tests.
Shape suffixes: T tokens, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Activation


def gated(gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, [T, F] in the input's dtype, computed in float32 or wider. Raises: ValueError for another activation.

    Source: Shazeer 2020, equation 6 (SwiGLU, GeGLU); the tanh form of GELU is Hendrycks and Gimpel 2016, section 2.
    """
    gate, up = gate_up_T2F.to(torch.promote_types(gate_up_T2F.dtype, torch.float32)).chunk(2, dim=-1)
    if activation == "silu":
        active = F.silu(gate)
    elif activation == "gelu_tanh":
        active = F.gelu(gate, approximate="tanh")
    else:
        raise ValueError(f"unknown activation {activation!r}; there are silu and gelu_tanh")
    return (active * up).to(gate_up_T2F.dtype)
