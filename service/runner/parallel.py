"""Tensor parallelism: which part of a model a rank holds, and how the ranks' partial sums become one.

Every rank has whole heads (query heads, and the K/V heads that they read) and a part of the feed-forward width; the products behind them
are added over all ranks. Embedding, norms and the residual stream are on every rank. Of the head each has some ids; rank 0, which samples,
gathers their logits. No process is started here (`service/ranks.py` does). Called by the loader, and by `follower` for what it is told.
More than 350 lines, because what a rank holds, adds and is told are one agreement.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.compose import FineOps, compose
from kernels.ops import Activation, ExpertWeights, LayerWeights, Ops, Weight
from service.errors import StartupError
from service.model.config import Experts, ModelConfig
from service.model.transformer import Transformer
from service.model.weights import WeightSource
from service.runner.graphs import Recorder
from service.runner.runner import Handle, Runner
from service.runner.warmup import CompileWatch
from service.scheduling.plan import PENDING, Drawn, PromptReading, Slice, StepPlan

log = logging.getLogger("braid.parallel")

# Longer than any step, and than the compilation of kernels in the first: only a rank that hangs for good is given up by it. One that
# ends is noticed at once, by its socket.
TIMEOUT = timedelta(minutes=5)
# In which whoever watches the ranks tells the cause of a failed step, where that is the end of one.
_CAUSE_S = 1.0

Tell = Callable[[int, tuple[Slice, ...], int], None]
"""Has the other ranks `follow`: for the model of this index these slices, or, without any, so many rows of logits."""


class Peers(Protocol):
    """The ranks as one of them sees them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def port(self) -> int:
        """Of this machine, where they meet."""

    @property
    def listen_fd(self) -> int | None:
        """Rank 0's: the socket that listens there."""

    @property
    def tell(self) -> Tell | None:
        """Rank 0's."""

    def least(self, value: int) -> int:
        """Of what all ranks say."""

    def give_up(self, message: str) -> None:
        """This rank can't go on, and so none can."""


def join(peers: Peers, device: torch.device) -> torch.device:
    """Waits for all ranks, then sums can be made: by NCCL on GPUs, by gloo on the CPU. Returns this rank's own device.

    Raises: StartupError where there are too few GPUs.
    """
    if device.type == "cuda":
        if torch.cuda.device_count() < peers.size:
            raise StartupError(f"--tensor-parallel {peers.size} needs as many GPUs, and torch finds {torch.cuda.device_count()}")
        device = torch.device("cuda", peers.rank)
        torch.cuda.set_device(device)  # Triton launches on the current one
    # All ranks are on this machine; a host name that leads elsewhere must not matter.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", peers.port, peers.size, peers.rank == 0, TIMEOUT, wait_for_workers=False, master_listen_fd=peers.listen_fd
    )
    is_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=store,
        rank=peers.rank,
        world_size=peers.size,
        timeout=TIMEOUT,
        device_id=device if is_gpu else None,
    )
    atexit.register(dist.destroy_process_group)
    if is_gpu and peers.rank == 0:
        log.warning("CUDA graphs are off with --tensor-parallel")
    return device


def add_up(x: Tensor) -> Tensor:
    """The sum of all ranks' x, the same on each. Mutates: x. On the CPU in float32, so that a narrower sum is rounded once.

    With more than two ranks the order of a sum may depend on the shape of x, and so a row's last bits on its company.
    """
    if x.device.type == "cpu" and x.dtype is not torch.float32:
        return add_up(x.float()).to(x.dtype)
    dist.all_reduce(x)
    return x


def split_ops(ops: Ops, add_up: Callable[[Tensor], Tensor]) -> Ops:
    """The same back end over a layer's share: what `out` and `down`, or its experts, give is added over all ranks.

    `out_mlp` is the composition of the back end's fine ops, for a fused one has no place for a sum.
    """

    @cache
    def composed(weights: LayerWeights) -> Callable[[Tensor, Tensor, LayerWeights], tuple[Tensor, Tensor]]:
        def linear(x: Tensor, weight: Weight) -> Tensor:
            product = ops.linear(x, weight)
            return product if weight is weights.gate_up else add_up(product)

        def experts(x: Tensor, of: ExpertWeights, activation: Activation) -> Tensor:
            return add_up(ops.experts(x, of, activation))

        return compose(ops.name, replace(_fine(ops), linear=linear, experts=experts)).out_mlp

    def out_mlp(y: Tensor, residual: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        return composed(weights)(y, residual, weights)

    return replace(ops, out_mlp=out_mlp)


def _fine(ops: Ops) -> FineOps:
    return FineOps(**{field.name: getattr(ops, field.name) for field in fields(FineOps)})


# --- shares ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a model of this config. Where there are fewer K/V heads than ranks, several ranks hold the same one."""

    whole: ModelConfig
    rank: int
    size: int

    def config(self, name: str) -> ModelConfig:
        """Of the share, as if it were a model, but with every id. Its head is not tied, for it has a part of the embedding's rows.

        Raises: StartupError where the model of this name can't be split so.
        """
        whole, size = self.whole, self.size
        if not _can_split(whole, size):
            allowed = ", ".join(str(each) for each in range(1, whole.num_heads + 1) if _can_split(whole, each))
            raise StartupError(
                f"--tensor-parallel {size} can't split {name}, which has {whole.num_heads} query heads, {whole.num_kv_heads} K/V heads and "
                f"a feed-forward width of {_told_widths(whole)}; it allows {allowed}"
            )
        experts = whole.experts
        if experts is not None:
            experts = replace(experts, width=experts.width // size, shared_width=experts.shared_width // size)
        return replace(
            whole,
            num_heads=whole.num_heads // size,
            num_kv_heads=max(whole.num_kv_heads // size, 1),
            feed_forward_width=whole.feed_forward_width // size,
            has_tied_head=False,
            experts=experts,
        )

    def experts_in(self, name: str) -> Experts | None:
        """Those that a tensor holds one below the other; None for a tensor without any."""
        layer, _, part = name.rpartition(".")
        return self.whole.experts_of(int(layer.removeprefix("layers."))) if part in ("gate", "up", "down") else None

    def span(self, name: str) -> tuple[int, int, int] | None:
        """(dimension, start, end) of the part of a tensor, or of each expert in it; None where every rank has the whole."""
        part, whole, size = name.rpartition(".")[2], self.whole, self.size
        heads = (self.rank * whole.num_heads // size, whole.num_heads // size)
        keys = (self.rank * whole.num_kv_heads // size, max(whole.num_kv_heads // size, 1))
        experts = whole.experts if part.startswith("shared_") else self.experts_in(name)
        width = whole.feed_forward_width if experts is None else experts.shared_width if part.startswith("shared_") else experts.width
        wide = width // size
        match part:
            case "q" | "q_bias":
                return _rows(*heads, whole.head_width)
            case "k" | "v" | "k_bias" | "v_bias":
                return _rows(*keys, whole.head_width)
            case "out":
                return 1, *_rows(*heads, whole.head_width)[1:]
            case "gate" | "up" | "shared_gate" | "shared_up":
                return 0, self.rank * wide, (self.rank + 1) * wide
            case "down" | "shared_down":
                return 1, self.rank * wide, (self.rank + 1) * wide
            case "head":
                count = _ids_of_a_rank(whole.vocab_size, size)
                return 0, min(self.rank * count, whole.vocab_size), min((self.rank + 1) * count, whole.vocab_size)
        return None


@dataclass(frozen=True, slots=True)
class ShareSource:
    """A `TensorSource` of a rank's part of every tensor. Of safetensors no more is read than that; another file's matrix is whole in
    memory for a moment, and so are the experts of a layer."""

    source: WeightSource
    share: Share

    def get(self, name: str) -> Tensor:
        span = self.share.span(name)
        if name == "head" and self.share.whole.has_tied_head:
            name = "embedding"
        if span is None:
            return self.source.get(name)
        experts = self.share.experts_in(name)
        if experts is None:
            return self.source.get_part(name, *span)
        dim, start, end = span
        rows = self.source.get(name)
        each = rows.view(experts.count, -1, rows.shape[1])
        return each.narrow(dim + 1, start, end - start).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _rows(first: int, count: int, width: int) -> tuple[int, int, int]:
    return 0, first * width, (first + count) * width


def _can_split(config: ModelConfig, size: int) -> bool:
    has_whole_groups = config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0
    widths = [config.feed_forward_width]
    if config.experts is not None:
        widths += [config.experts.width, config.experts.shared_width]
    return config.num_heads % size == 0 and has_whole_groups and all(width % size == 0 for width in widths)


def _told_widths(config: ModelConfig) -> str:
    told = str(config.feed_forward_width)
    return (
        told
        if config.experts is None
        else f"{told}, of {config.experts.width} in each expert and {config.experts.shared_width} in a shared one"
    )


# --- what rank 0 does, and what the others do with it ---------------------------------------------------------------------------------


class Leader:
    """Rank 0's runner: has the others compute what its own does. `gather_head` has done so for what it samples and reads."""

    def __init__(self, runner: Runner, tell: Callable[[tuple[Slice, ...]], None], give_up: Callable[[str], None]) -> None:
        self.runner = runner
        self._tell = tell
        self._give_up = give_up

    def forward(self, plan: StepPlan) -> Handle:
        """As `Runner.forward`. Raises: ValueError for a pending id: the other ranks are told ids, and draw none."""
        if any(piece.tokens[-1] == PENDING for piece in plan.slices):
            raise ValueError("the slices of a split model must hold ids, and one waits for an id that was drawn")
        with _together(self._give_up):
            if plan.slices:
                self._tell(plan.slices)
            return self.runner.forward(plan)

    def sample(self, handle: Handle, masks: NDArray[np.int32] | None = None) -> list[Drawn]:
        return self.runner.sample(handle, masks)

    def read(self, handle: Handle) -> list[PromptReading]:
        return self.runner.read(handle)

    def watch_compiles(self, watch: CompileWatch) -> None:
        """As `Runner.watch_compiles`, of this rank alone."""
        self.runner.watch_compiles(watch)

    def capture_graphs(
        self, max_sequences: int, recorder: Recorder | None = None, progress: Callable[[float], None] = lambda fraction: None
    ) -> None:
        """None: a graph that holds sums over GPUs has not been tried yet. `join` has said so."""


def lead(runner: Runner, model_index: int, peers: Peers) -> Runner | Leader:
    """The runner as its rank uses it."""
    tell = peers.tell
    return runner if tell is None else Leader(runner, lambda slices: tell(model_index, slices, 0), peers.give_up)


def gather_head(model: Transformer, model_index: int, peers: Peers) -> None:
    """Mutates: rank 0's model, whose logits are from now on those of all ranks' heads."""
    tell = peers.tell
    if tell is None:
        return
    ops, head, vocab_size = model.ops, model.head, model.config.vocab_size

    def linear(x: Tensor, weight: Weight) -> Tensor:
        if weight is not head:
            return ops.linear(x, weight)
        with _together(peers.give_up):
            tell(model_index, (), len(x))
            dist.broadcast(_as_sent(x), 0)
            part = _as_sent(_filled(ops.linear(x, head), vocab_size, peers.size))
            parts = [torch.empty_like(part) for _ in range(peers.size)]
            dist.gather(part, parts, 0)
            return torch.cat(parts, dim=1)[:, :vocab_size].contiguous()

    model.ops = replace(ops, linear=linear, draw=compose(ops.name, replace(_fine(ops), linear=linear)).draw)


def follow(runner: Runner, slices: tuple[Slice, ...], num_rows: int) -> None:
    """What rank 0 has told this one: slices to compute, or a number of rows of its hidden states, whose logits it gathers.

    Mutates: the K/V pool, at the slices' slots.
    """
    if slices:
        runner.forward(StepPlan(0, slices, samples=()))
        return
    model = runner.model
    with torch.inference_mode():
        x = torch.empty((num_rows, model.config.width), dtype=model.dtype, device=runner.device)
        sent = _as_sent(x)
        dist.broadcast(sent, 0)
        part = _filled(model.ops.linear(sent.to(x.dtype), model.head), model.config.vocab_size, dist.get_world_size())
        dist.gather(_as_sent(part), None, 0)


def _ids_of_a_rank(vocab_size: int, size: int) -> int:
    """At most: the last ranks may have fewer, or none."""
    return -(-vocab_size // size)


def _filled(logits_RV: Tensor, vocab_size: int, size: int) -> Tensor:
    """Of a rank's ids, with zeros behind them where it has fewer than the others."""
    return F.pad(logits_RV, (0, _ids_of_a_rank(vocab_size, size) - logits_RV.shape[1]))


def _as_sent(x: Tensor) -> Tensor:
    """gloo sends float32; all that a model computes fits into it exactly."""
    return (x.float() if x.device.type == "cpu" else x).contiguous()


@contextmanager
def _together(give_up: Callable[[str], None]) -> Iterator[None]:
    """Around what all ranks do at once: a failure leaves them waiting for different things, so it is the end of all of them."""
    try:
        yield
    except Exception:
        log.exception("a step failed on rank 0")
        time.sleep(_CAUSE_S)
        give_up("a step failed, and the ranks of a split model can't go on after that")
        raise
