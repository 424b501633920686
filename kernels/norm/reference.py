"""RMSNorm with the residual addition in front of it, in plain PyTorch: what the fused kernels must agree with.

No Triton here and no model. Called by `reference_ops`, by back ends without a kernel of their own, and by tests.
Shape suffixes: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed [T, D], residual [T, D]), both in x's dtype; the new residual is residual + x, or x itself when there is none.

    The sum is rounded to x's dtype first, so the norm sees what the next layer will see; the norm itself is float32 or wider.
    Source: Zhang and Sennrich 2019, equation 4.
    """
    residual = x_TD if residual_TD is None else residual_TD + x_TD
    wide = residual.to(torch.promote_types(x_TD.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide.dtype)
    return normed.to(x_TD.dtype), residual
