"""A feed-forward block of many experts, of which each token passes a few, in plain PyTorch.

No Triton here and no model. `by_expert` is also the CPU back end's, with that back end's own products. Called by `reference_ops`, by back
ends without a kernel of their own, and by tests.
Shape suffixes: T tokens, D model width, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated.reference import gated
from kernels.linear.reference import linear
from kernels.ops import Activation, ExpertWeights, GroupedWeight, Weight

ROUTER_ROWS = 16
"""Rows of one product by the router on a CPU: the order in which PyTorch adds depends on how many there are, so that has to be fixed."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What `by_expert` computes with: the two operations as in `kernels.ops.Ops`, and rows start ... end - 1 of a matrix as a matrix."""

    linear: Callable[[Tensor, Weight], Tensor]
    gated: Callable[[Tensor, Activation], Tensor]
    rows_of: Callable[[Weight, int, int], Weight]


def experts(x_TD: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    """[T, D] in x's dtype: the sum over a token's experts, from the largest share to the smallest, of share * down(gated(gate_up(x))), and
    with a shared expert sigmoid(its logit) * what it gives. A token's result does not depend on the others.

    Source: Shazeer et al. 2017, section 2.1 (the sum over the top k); Jiang et al. 2024 (Mixtral), section 2.1 (normalised shares, gated
    experts); Yang et al. 2024 (Qwen2), section 2.2.2 (the shared expert; its sigmoid is in the released code).
    """
    return by_expert(x_TD, weights, activation, PLAIN)


def by_expert(x_TD: Tensor, weights: ExpertWeights, activation: Activation, parts: Parts) -> Tensor:
    """`experts`, by one product for the tokens of each expert. Groups them on the host, so it can't be captured in a graph."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits = router_logits(x_TD, weights.router)
    chosen_TK, shares_TK = route(logits[:, : weights.num_experts], weights.top_k, is_normalised=weights.is_normalised)
    if not len(x_TD):
        return torch.zeros_like(x_TD)
    tokens_of, order = _grouped(chosen_TK.tolist())
    given = []
    for expert, tokens in tokens_of.items():
        rows = x_TD[tokens[0] : tokens[0] + 1] if len(tokens) == 1 else x_TD[torch.tensor(tokens, device=x_TD.device)]
        given.append(_one_expert(rows, weights, activation, parts, expert))
    by_entry = torch.cat(given)[torch.tensor(order, device=x_TD.device)].view(*chosen_TK.shape, -1).to(wide) * shares_TK[:, :, None]
    total = by_entry[:, 0]
    for rank in range(1, weights.top_k):  # one by one: the order of a sum over a dimension is PyTorch's own affair
        total = total + by_entry[:, rank]
    if weights.shared is not None:
        beside = parts.linear(parts.gated(parts.linear(x_TD, weights.shared.gate_up), activation), weights.shared.down)
        total = total + beside.to(wide) * torch.sigmoid(logits[:, weights.num_experts :])
    return total.to(x_TD.dtype)


def _grouped(chosen: list[list[int]]) -> tuple[dict[int, list[int]], list[int]]:
    """(the tokens of each expert that has some, where each token's experts, in turn, stand among all of these). In plain Python: of the few
    numbers of a step PyTorch's operations would cost more than the products."""
    tokens_of: dict[int, list[int]] = {}
    places = []
    for token, experts_of_token in enumerate(chosen):
        for expert in experts_of_token:
            tokens = tokens_of.setdefault(expert, [])
            places.append((expert, len(tokens)))
            tokens.append(token)
    first = dict(zip(tokens_of, accumulate(map(len, tokens_of.values()), initial=0), strict=False))
    return tokens_of, [first[expert] + place for expert, place in places]


def _one_expert(rows: Tensor, weights: ExpertWeights, activation: Activation, parts: Parts, expert: int) -> Tensor:
    width = _rows(weights.gate_up) // weights.num_experts
    depth = _rows(weights.down) // weights.num_experts
    gate_up = parts.rows_of(weights.gate_up, expert * width, (expert + 1) * width)
    down = parts.rows_of(weights.down, expert * depth, (expert + 1) * depth)
    return parts.linear(parts.gated(parts.linear(rows, gate_up), activation), down)


def _rows(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) else weight.out_features


def router_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """[T, E], float32 or wider."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x, router = x_TD.to(wide), router_ED.to(wide)
    if x.device.type != "cpu":
        return F.linear(x, router)
    padded = F.pad(x, (0, 0, 0, -len(x) % ROUTER_ROWS))
    return torch.cat([F.linear(rows, router) for rows in torch.split(padded, ROUTER_ROWS)])[: len(x)]


def route(logits_TE: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """(experts int64 [T, K], shares [T, K] in the logits' dtype) of the largest logits, largest first; of equal ones the lower expert is
    first. Shares are the softmax over all experts, or over the chosen ones."""
    shares = torch.softmax(logits_TE, dim=-1)
    chosen = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    picked = shares.gather(1, chosen)
    return chosen, picked / picked.sum(-1, keepdim=True) if is_normalised else picked


def rows_of(weight: Weight, start: int, end: int) -> Weight:
    """Rows start ... end - 1 of a matrix that is not packed."""
    if isinstance(weight, Tensor):
        return weight[start:end]
    count, values, scales = end - start, weight.values[start:end], weight.scales[start:end]
    if isinstance(weight, GroupedWeight):
        return replace(weight, out_features=count, values=values, scales=scales, offsets=weight.offsets[start:end])
    return replace(weight, out_features=count, values=values, scales=scales)


PLAIN = Parts(linear, gated, rows_of)
