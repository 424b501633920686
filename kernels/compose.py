"""The coarse ops of a layer, defined once as compositions of the fine ones; a back end starts from here and overrides what it fuses.

No formula and no device here. Called by every back end's `*_ops()`.
Shape suffixes: T tokens, D model width, N query heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.ops import Activation, AttentionSpec, ExpertWeights, LayerWeights, Ops, PagedKV, Sampled, SampleRows, Weight


@dataclass(frozen=True, slots=True)
class FineOps:
    """What a back end must bring; each callable is described in `kernels.ops.Ops`."""

    attend: Callable[[Tensor, PagedKV, AttentionSpec], Tensor]
    linear: Callable[[Tensor, Weight], Tensor]
    embed: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    kv_write: Callable[[Tensor, LayerWeights, Tensor, PagedKV], Tensor]
    gated: Callable[[Tensor, Activation], Tensor]
    experts: Callable[[Tensor, ExpertWeights, Activation], Tensor]
    sample: Callable[[Tensor, SampleRows], Sampled]
    pack: Callable[[Weight], Weight]


def compose(name: str, fine: FineOps) -> Ops:
    """A whole back end from fine ops. To put a fused coarse op in, use `dataclasses.replace` on the result."""

    def qkv(x_TD: Tensor, residual_TD: Tensor | None, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor]:
        normed, residual = fine.rms_norm(x_TD, residual_TD, weights.attention_norm, weights.spec.norm_eps)
        product = fine.linear(normed, weights.qkv)
        if weights.qkv_bias is not None:
            product = product + weights.qkv_bias
        return fine.kv_write(product, weights, positions_T, kv), residual

    def out_mlp(y: Tensor, residual_TD: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        spec = weights.spec
        total = after(fine.linear(y, weights.out), weights.out_norm, spec.norm_eps)
        normed, residual = fine.rms_norm(total, residual_TD, weights.mlp_norm, spec.norm_eps)
        if weights.experts is not None:
            x = fine.experts(normed, weights.experts, spec.activation)
        else:
            x = fine.linear(fine.gated(fine.linear(normed, weights.gate_up), spec.activation), weights.down)
        return after(x, weights.down_norm, spec.norm_eps), residual

    def after(x_TD: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        return x_TD if norm is None else fine.rms_norm(x_TD, None, norm, eps)[0]

    def draw(x_RD: Tensor, head: Weight, rows: SampleRows) -> Sampled:
        return fine.sample(fine.linear(x_RD, head).float(), rows)

    return Ops(
        name=name,
        qkv=qkv,
        attend=fine.attend,
        out_mlp=out_mlp,
        linear=fine.linear,
        embed=fine.embed,
        rms_norm=fine.rms_norm,
        kv_write=fine.kv_write,
        gated=fine.gated,
        experts=fine.experts,
        sample=fine.sample,
        draw=draw,
        pack=fine.pack,
    )
