"""Attention by the best kernels that are known to be right on the GPU at hand: the choice among the variants, in one place, as data.

Without an entry in `verified.json` it is `triton.attend`: a decode kernel and a prefill kernel, one after the other. Called by
`triton_ops`. No kernel here.
Shape suffixes: T tokens, N query heads, H head width.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kernels.attention import mixed_triton, triton
from kernels.ops import AttentionSpec, PagedKV
from kernels.verified import verified

HOPPER_PREFILL = "attention/hopper_prefill"
"""Prefills by `prefill_hopper.py`, where it takes the layer."""
MIXED = "attention/mixed"
"""Decodes and prefills of a step by one launch, `mixed_triton.py`."""
TWO_STREAMS = "attention/two_streams"
"""The decodes of a step with both beside its prefills, on a stream of their own."""
VARIANTS = (HOPPER_PREFILL, MIXED, TWO_STREAMS)


def attend(q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
    """y [T, N * H], as `triton.attend`. Raises: what that raises."""
    chosen = verified(q_TNH.device)
    return attend_by(chosen, q_TNH, kv, spec) if chosen.intersection(VARIANTS) else triton.attend(q_TNH, kv, spec)


def attend_by(chosen: frozenset[str], q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
    """y [T, N * H] by the named variants, each where it takes the layer and the step has work for it. Raises: what `triton.attend` does."""
    if kv.keys.stride() != kv.values.stride():
        return triton.attend(q_TNH, kv, spec)  # which says what it wants
    q = q_TNH.contiguous()
    out, batch = torch.empty_like(q), kv.batch
    has_decodes = batch.num_decodes > 0
    has_prefills = batch.num_decodes < batch.context_len.shape[0] and q.shape[0] > batch.num_decodes
    is_hopper = has_prefills and HOPPER_PREFILL in chosen and _hopper().can_run(q, kv, spec)
    if has_decodes and has_prefills and MIXED in chosen and not is_hopper and mixed_triton.can_run(q, kv, spec):
        mixed_triton.attend_mixed(q, kv, spec, out)
        return out.flatten(1)
    side = _side_stream(q.device) if has_decodes and has_prefills and TWO_STREAMS in chosen else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(q.device))
    if has_decodes:
        with torch.cuda.stream(side):  # None: the current one
            triton._decode(q, kv, spec, out)
    if is_hopper:
        _hopper().prefill(q, kv, spec, out)
    elif has_prefills:
        triton._prefill(q, kv, spec, out)
    if side is not None:  # whatever comes later, the reuse of q's memory too, is behind the decodes
        torch.cuda.current_stream(q.device).wait_stream(side)
    return out.flatten(1)


@cache
def _hopper() -> ModuleType:
    """Late, because Gluon is experimental: a Triton without it has all the others."""
    return importlib.import_module("kernels.attention.prefill_hopper")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
