"""The back end that training runs on: the reference's formulas where autograd follows them, and attention over whole documents at once.

Documents are padded to one length, and each is one block of its `PagedKV`: block d holds all places of document d, so a paged view and a
dense one are the same memory. Called through `training_ops` by training alone; serving never loads it.
Shape suffixes: T tokens, U documents, L places of a document, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compose import FineOps, compose
from kernels.gated.reference import gated
from kernels.kv_write.reference import rotate
from kernels.linear.reference import linear, pack
from kernels.norm.reference import rms_norm
from kernels.ops import AttentionSpec, LayerWeights, Neighbourhood, Ops, PagedBatch, PagedKV, Weight
from kernels.sample.reference import sample


def training_ops() -> Ops:
    """Every op under autograd, except sampling. For batches made by `whole_documents` only."""
    return compose("training", FineOps(_Masks().attend, linear, embed, rms_norm, kv_write, gated, sample, pack))


def whole_documents(num_documents: int, length: int, grid_start_T: Tensor | None, device: torch.device | str = "cpu") -> PagedBatch:
    """The batch of documents that are computed whole, all padded at their ends to one length; T = num_documents * length."""
    ends = torch.full((num_documents,), length, dtype=torch.int32, device=device)
    return PagedBatch(
        slots=torch.arange(num_documents * length, device=device),
        block_table=torch.arange(num_documents, dtype=torch.int32, device=device)[:, None],
        query_start=torch.arange(num_documents + 1, dtype=torch.int32, device=device) * length,
        context_len=ends,
        num_decodes=0,
        max_query_len=length,
        max_context_len=length,
        grid_start=grid_start_T,
    )


def empty_kv(batch: PagedBatch, num_kv_heads: int, head_width: int) -> PagedKV:
    """A layer's place for keys and values [U, K, L, H] of `whole_documents`; written as a whole, so nothing is allocated."""
    shape = (batch.block_table.shape[0], num_kv_heads, batch.max_context_len, head_width)
    nothing = torch.empty((), device=batch.slots.device).expand(shape)
    return PagedKV(nothing, nothing, batch)


def embed(ids_T: Tensor, table_VD: Weight, dtype: torch.dtype) -> Tensor:
    """As the reference. Not by indexing, whose gradient several threads add up in any order: a run would not repeat to the bit."""
    assert isinstance(table_VD, Tensor)
    return F.embedding(ids_T, table_VD).to(dtype)


def kv_write(qkv: Tensor, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> Tensor:
    """As the reference, but keys and values become the layer's own tensors, not places in a pool: autograd follows them.

    Mutates: kv.keys, kv.values (replaced).
    """
    spec = weights.spec
    wide = qkv.float().view(len(qkv), -1, spec.head_width)
    q, k, v = torch.split(wide, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    if weights.q_norm is not None:
        q, _ = rms_norm(q, None, weights.q_norm, spec.norm_eps)
    if weights.k_norm is not None:
        k, _ = rms_norm(k, None, weights.k_norm, spec.norm_eps)
    rotary = weights.rotary[positions_T]
    num_documents = kv.batch.block_table.shape[0]
    kv.keys, kv.values = (side.to(qkv.dtype).view(num_documents, -1, *side.shape[1:]).transpose(1, 2) for side in (rotate(k, rotary), v))
    return rotate(q, rotary).to(qkv.dtype)


@dataclass(slots=True)
class _Masks:
    """Attention with the masks of the batch at hand, one per kind of layer, made once for all layers of that kind."""

    batch: PagedBatch | None = None
    hidden: dict[AttentionSpec, Tensor] = field(default_factory=dict)

    def attend(self, q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
        """y [T, N * H]. Source: Vaswani et al. 2017, equation 1."""
        hidden = self._hidden(kv.batch, spec)
        k, v = kv.keys, kv.values  # [U, K, L, H]
        num_documents, num_kv_heads, length, width = k.shape
        q = q_TNH.view(num_documents, length, num_kv_heads, -1, width).permute(0, 2, 3, 1, 4)  # [U, K, G, L, H]
        group = q.shape[2]
        scores = (q.reshape(num_documents * num_kv_heads, group * length, width) * spec.scale) @ k.flatten(0, 1).transpose(1, 2)
        scores = scores.float().view(num_documents, num_kv_heads, group, length, length)
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        shares = torch.softmax(scores + hidden[:, None, None], dim=-1).to(v.dtype)
        y = shares.view(num_documents * num_kv_heads, group * length, length) @ v.flatten(0, 1)
        return y.view(num_documents, num_kv_heads, group, length, width).permute(0, 3, 1, 2, 4).reshape(len(q_TNH), -1)

    def _hidden(self, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
        """float32, 0 where a query sees a key and -inf elsewhere: [U or 1, L, L]."""
        if self.batch is not batch:
            self.batch, self.hidden = batch, {}
        if spec not in self.hidden:
            seen = visible(batch, spec)
            self.hidden[spec] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        return self.hidden[spec]


def visible(batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Which keys (last dimension) each query sees, bool [U, L, L], or [1, L, L] where that is the same for all documents."""
    length, device = batch.max_context_len, batch.slots.device
    at = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)
    seen = key <= at
    if spec.window is not None:
        seen &= (at - key < spec.window) | (key < spec.sink)
    if spec.neighbourhood is None or batch.grid_start is None:
        return seen[None]
    return seen & _near(batch.grid_start.view(-1, length, 1).long(), at, key, spec.neighbourhood)


def _near(start: Tensor, at: Tensor, key: Tensor, near: Neighbourhood) -> Tensor:
    """The part of the mask that is about codes: [U, L, L]. start: the queries' grid_start [U, L, 1]. Rule: `kernels.ops.Neighbourhood`."""
    target, code = at - start + 1, key - start
    rows = torch.div(target, near.columns, rounding_mode="floor") - torch.div(code, near.columns, rounding_mode="floor")
    columns = (target % near.columns - code % near.columns).abs()
    return (start < 0) | (code < 0) | (key == at) | ((rows <= near.row_radius) & (columns <= near.column_radius))
