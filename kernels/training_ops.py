"""The back end that training runs on: the reference's formulas where autograd follows them, and attention over whole documents at once.

Rows of one length hold a document each, padded at its end, or several one behind the other. Each row is one block of its `PagedKV`: block u
holds all places of row u, so a paged view and a dense one are the same memory. Called through `training_ops` by training alone; serving
never loads it.
Shape suffixes: T tokens, U rows of documents, L places of a row, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compose import FineOps, compose
from kernels.experts.reference import experts
from kernels.gated.reference import gated
from kernels.kv_write.reference import rotate
from kernels.linear.reference import linear, pack
from kernels.ops import AttentionSpec, LayerWeights, Neighbourhood, Ops, PagedBatch, PagedKV, Weight
from kernels.sample.reference import sample


def training_ops() -> Ops:
    """Every op under autograd, except sampling. For batches made by `whole_documents` only."""
    return compose("training", FineOps(_Masks().attend, linear, embed, norm, kv_write, gated, experts, sample, pack))


@dataclass(eq=False, slots=True)
class Rows(PagedBatch):
    """document_start int64 [U, L]: the place of its row where the document of a place begins, None where every row is one document.
    `grid_start` counts from the document's beginning, as positions do."""

    document_start: Tensor | None = None


def whole_documents(
    num_rows: int, length: int, grid_start_T: Tensor | None, device: torch.device | str = "cpu", document_start_UL: Tensor | None = None
) -> Rows:
    """The batch of documents that are computed whole, in rows of one length; T = num_rows * length."""
    ends = torch.full((num_rows,), length, dtype=torch.int32, device=device)
    return Rows(
        slots=torch.arange(num_rows * length, device=device),
        block_table=torch.arange(num_rows, dtype=torch.int32, device=device)[:, None],
        query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length,
        context_len=ends,
        num_decodes=0,
        max_query_len=length,
        max_context_len=length,
        grid_start=grid_start_T,
        document_start=document_start_UL,
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


def norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference, in PyTorch's own operation, which is one kernel of a GPU and keeps less for the gradient."""
    residual = x_TD if residual_TD is None else residual_TD + x_TD
    return F.rms_norm(residual.float(), weight_D.shape, weight_D, eps).to(x_TD.dtype), residual


def kv_write(qkv: Tensor, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> Tensor:
    """As the reference, but keys and values become the layer's own tensors, not places in a pool: autograd follows them. Queries and keys
    are normed and turned together: half as many kernels to launch.

    Mutates: kv.keys, kv.values (replaced).
    """
    spec = weights.spec
    heads = qkv.view(len(qkv), -1, spec.head_width)
    both, v = torch.split(heads, [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
    wide = both.float()
    if weights.q_norm is not None and weights.k_norm is not None:
        scales = torch.cat([weights.q_norm.expand(spec.num_heads, -1), weights.k_norm.expand(spec.num_kv_heads, -1)])
        wide = F.rms_norm(wide, (spec.head_width,), eps=spec.norm_eps) * scales
    turned = rotate(wide, weights.rotary[positions_T]).to(qkv.dtype)
    q, k = torch.split(turned, [spec.num_heads, spec.num_kv_heads], dim=1)
    num_rows = kv.batch.block_table.shape[0]
    kv.keys, kv.values = (side.view(num_rows, -1, *side.shape[1:]).transpose(1, 2) for side in (k, v))
    return q


@dataclass(slots=True)
class _Masks:
    """Attention with the masks of the batch at hand, one per kind of layer, made once for all layers of that kind."""

    batch: PagedBatch | None = None
    masks: dict[AttentionSpec, Tensor] = field(default_factory=dict)

    def attend(self, q_TNH: Tensor, kv: PagedKV, spec: AttentionSpec) -> Tensor:
        """y [T, N * H]. Source: Vaswani et al. 2017, equation 1."""
        k, v = kv.keys, kv.values  # [U, K, L, H]
        num_rows, num_kv_heads, length, width = k.shape
        q = q_TNH.view(num_rows, length, num_kv_heads, -1, width).permute(0, 2, 3, 1, 4)  # [U, K, G, L, H]
        group = q.shape[2]
        if k.is_cuda and not spec.softcap:  # PyTorch's own kernel keeps no scores, of which a GPU's batch has gigabytes
            shape = (num_rows, num_kv_heads, group, length, width)
            keys, values = (side[:, :, None].expand(shape).flatten(1, 2) for side in (k, v))
            mask = self._mask(kv.batch, spec)[:, None]
            y = F.scaled_dot_product_attention(q.flatten(1, 2), keys, values, attn_mask=mask, scale=spec.scale)
            return y.transpose(1, 2).reshape(len(q_TNH), -1)
        scores = (q.reshape(num_rows * num_kv_heads, group * length, width) * spec.scale) @ k.flatten(0, 1).transpose(1, 2)
        scores = scores.float().view(num_rows, num_kv_heads, group, length, length)
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        shares = torch.softmax(scores + self._mask(kv.batch, spec)[:, None, None], dim=-1).to(v.dtype)
        y = shares.view(num_rows * num_kv_heads, group * length, length) @ v.flatten(0, 1)
        return y.view(num_rows, num_kv_heads, group, length, width).permute(0, 3, 1, 2, 4).reshape(len(q_TNH), -1)

    def _mask(self, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
        """[U or 1, L, L]: bool, may a query see a key? On a CPU float32 instead, 0 where it may and -inf elsewhere, to be added."""
        if self.batch is not batch:
            self.batch, self.masks = batch, {}
        if spec not in self.masks:
            seen = visible(batch, spec)
            is_added = not seen.is_cuda or bool(spec.softcap)
            self.masks[spec] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf")) if is_added else seen
        return self.masks[spec]


def visible(batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Which keys (last dimension) each query sees, bool [U, L, L], or [1, L, L] where that is the same for all rows."""
    length, device = batch.max_context_len, batch.slots.device
    at = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)
    begin = batch.document_start if isinstance(batch, Rows) else None
    seen = key <= at
    if begin is not None:
        seen = seen & (begin[:, :, None] == begin[:, None, :])
    if spec.window is not None:
        is_sink = key < spec.sink if begin is None else (key - begin < spec.sink)[:, None]
        seen = seen & ((at - key < spec.window) | is_sink)
    if spec.neighbourhood is None or batch.grid_start is None:
        return seen if seen.ndim == 3 else seen[None]
    start = batch.grid_start.view(-1, length).long()
    if begin is not None:
        start = torch.where(start < 0, start, start + begin)
    return seen & _near(start[:, :, None], at, key, spec.neighbourhood)


def _near(start: Tensor, at: Tensor, key: Tensor, near: Neighbourhood) -> Tensor:
    """The part of the mask that is about codes: [U, L, L]. start: the queries' grid_start [U, L, 1]. Rule: `kernels.ops.Neighbourhood`."""
    target, code = at - start + 1, key - start
    rows = torch.div(target, near.columns, rounding_mode="floor") - torch.div(code, near.columns, rounding_mode="floor")
    columns = (target % near.columns - code % near.columns).abs()
    return (start < 0) | (code < 0) | (key == at) | ((rows <= near.row_radius) & (columns <= near.column_radius))
