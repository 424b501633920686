"""What a GPU does before it is ready: steps of every kind that traffic can bring, so that no step has to compile a kernel, and the watch
that counts those that had to.

Kernels are compiled by what their launch is specialised on (docs/operations.md, "No compiling in traffic"); tests/runner/test_warmup.py
holds these steps to all of it. Called by `load` once the K/V pool is there, before graphs are recorded, and with them again.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from service.runner.runner import Handle, Runner
from service.scheduling.plan import Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

log = logging.getLogger("braid.runner")

STEP_TOKENS = (2, 4, 8, 16, 17, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 512, 1024, 2048, 4096, 8192)
"""Of prompts: both sides of every number of rows at which a product may change its tiles, and PyTorch's library its algorithm."""
DECODES = (1, 2, 4, 8, 16, 17, 32, 33, 48, 64, 65, 128, 129, 256)
CONTEXTS = tuple(2**power for power in range(6, 21))
"""Up to which sequences have come: attention may keep more tiles in flight where there is more to read."""
MOST_READ = 2**20
"""Keys that the decodes of one step read here: a quarter of a second in a large model, and more would show no other kernel."""
SAMPLED = (1, 2, 16, 17, 64, 65, 128, 129)
"""Rows: both sides of where the head's kernel changes its blocks, and where it is no longer used."""
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
_PLAIN = SamplingParams(max_tokens=1)
_FILTERED = SamplingParams(max_tokens=1, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
# What keeps logits from being passed over: they are told, or changed, before an id is drawn.
_TOLD = (replace(_FILTERED, logprobs=0), replace(_PLAIN, logprobs=5), replace(_PLAIN, logit_bias=((0, 1.0),)))


class Steps(Protocol):
    """A runner, or the one of rank 0 that leads others."""

    def forward(self, plan: StepPlan) -> Handle: ...

    def sample(self, handle: Handle, masks: Any = None) -> object: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the plans that will come."""

    num_groups: int
    block_size: int
    max_batch_tokens: int
    max_sequences: int
    max_context: int
    vocab_size: int
    pictures: PictureIds | None = None


def warm_up(runner: Steps, limits: Limits, progress: Callable[[float], None] = lambda fraction: None) -> None:
    """Runs them all. Mutates: block 0 of the K/V pool, which no sequence owns yet: what it holds is never read before it is written again.
    What steps and samples leave behind of their sequences is released."""
    run_steps(runner, limits, lambda fraction: progress(fraction / 2))
    draws = list(draws_of(limits))
    for number, (plan, rows) in enumerate(draws):
        progress(0.5 + number / len(draws) / 2)
        handle = runner.forward(plan)
        for samples, masks in rows:
            try:
                runner.sample(replace(handle, plan=replace(plan, samples=samples)), masks)
            except torch.OutOfMemoryError:  # what most requests want of so many rows may fit all the same
                log.warning("%d sequences that all draw from whole rows of logits find no memory; give less --memory", len(samples))
        _forget(runner, plan)
    progress(1.0)


def run_steps(runner: Steps, limits: Limits, progress: Callable[[float], None] = lambda fraction: None) -> None:
    """The forward passes alone. Mutates: as `warm_up`."""
    plans = list(steps_of(limits))
    for number, plan in enumerate(plans):
        progress(number / len(plans))
        runner.forward(plan)
        _forget(runner, plan)


def _forget(runner: Steps, plan: StepPlan) -> None:
    runner.forward(StepPlan(step_id=-1, slices=(), samples=(), released=tuple(piece.sequence_id for piece in plan.slices)))


def steps_of(limits: Limits) -> Iterator[StepPlan]:
    """Forward passes: prompts, decoding sequences, both; with codes too where there are any."""
    most = min(limits.max_batch_tokens, limits.max_sequences * limits.max_context)
    for count in sorted({min(count, most) for count in (*STEP_TOKENS, most)}):
        yield _step(_prompts(count, limits), limits)
    for count in sorted({min(count, limits.max_sequences, limits.max_batch_tokens) for count in (*DECODES, limits.max_sequences)}):
        yield _step([1] * count, limits)
    codes = () if limits.pictures is None else (limits.pictures.first_code,)
    for context, code in product(sorted({min(context, limits.max_context) for context in CONTEXTS}), (None, *codes)):
        for count in sorted({min(count, limits.max_sequences, limits.max_batch_tokens) for count in DECODES}):
            if count == 1 or count * context <= MOST_READ:
                yield _step([1] * count, limits, context=context, first_code=code)
        yield _step([min(16, limits.max_batch_tokens, context)], limits, context=context, first_code=code)
    has_both = limits.max_sequences > 1 and limits.max_context > 1
    if has_both and limits.max_batch_tokens > 2:
        for count, length in product((1, 16, 64), (16, 64, 512)):
            own = min(count, limits.max_sequences - 1, limits.max_batch_tokens - 2)
            yield _step([1] * own + [min(length, limits.max_batch_tokens - own, limits.max_context)], limits)
    if limits.pictures is not None:
        most_codes = min(limits.pictures.num_places, limits.max_batch_tokens - 1, limits.max_context)
        for lengths in ([1], [most_codes], [1, most_codes]) if has_both else ([1], [most_codes]):
            yield _step(lengths, limits, first_code=limits.pictures.first_code)


Rows = tuple[tuple[Sample, ...], NDArray[np.int32] | None]
"""Samples of a step, and their masks."""


def draws_of(limits: Limits) -> Iterator[tuple[StepPlan, list[Rows]]]:
    """Steps of decoding sequences, and the ways in which they may draw."""
    for count in sorted({min(count, limits.max_sequences, limits.max_batch_tokens) for count in SAMPLED}):
        masks = np.full((count, -(-limits.vocab_size // 32)), -1, dtype=np.int32)
        rows: list[Rows] = []
        for params, mask, is_penalised in product((_GREEDY, _PLAIN, _FILTERED, *_TOLD), (None, masks), (False, True)):
            rows.append((_samples(count, replace(params, repetition_penalty=1.1) if is_penalised else params), mask))
        if count == 2:
            first, _ = _samples(2, _FILTERED)
            rows.append(((replace(first, slice_indexes=(0, 1), guidance=2.0),), None))
        yield _decoding(count, limits, rows[0][0]), rows
    if limits.max_sequences > SAMPLED[-1]:  # of so many, only what is drawn mostly: penalties of all of them would fill the memory
        count = min(limits.max_sequences, limits.max_batch_tokens)
        yield _decoding(count, limits, _samples(count, _PLAIN)), [(_samples(count, _PLAIN), None)]


def _samples(count: int, params: SamplingParams) -> tuple[Sample, ...]:
    history = (0,) if params.has_penalties else None
    return tuple(Sample(-1 - row, (row,), params, position=1, num_generated=0, history=history, prompt_len=1) for row in range(count))


def _decoding(count: int, limits: Limits, samples: tuple[Sample, ...]) -> StepPlan:
    return replace(_step([1] * count, limits), samples=samples)


def _prompts(num_tokens: int, limits: Limits) -> list[int]:
    """Lengths of prompts of so many tokens together, which need not fit into one context; the shortest first, for it may be one token."""
    return sorted(min(limits.max_context, num_tokens - start) for start in range(0, num_tokens, limits.max_context))


def _step(lengths: Sequence[int], limits: Limits, *, context: int = 0, first_code: int | None = None) -> StepPlan:
    """Slices of so many tokens, each of a sequence of its own: its beginning, or where it reaches a context. first_code: of all tokens."""
    slices = []
    for row, length in enumerate(lengths):
        start = max(context - length, 0)
        tables = ((0,) * -(-(start + length) // limits.block_size),) * limits.num_groups
        grid_starts = () if first_code is None else (start,) * length
        slices.append(Slice(-1 - row, start, (first_code or 0,) * length, tables, grid_starts))
    return StepPlan(step_id=-1, slices=tuple(slices), samples=())


def keep_kernels(folder: str) -> None:
    """Has Triton keep what it compiles in this folder, "" or where TRITON_CACHE_DIR is set: as it does by itself. Before the first kernel.

    Mutates: the environment. A folder that can't be written costs later starts the compiling, and not this one its life.
    """
    if not folder or "TRITON_CACHE_DIR" in os.environ:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("compiled kernels are not kept for later starts: the cache folder can't be written (%s)", error.strerror)
        folder = tempfile.mkdtemp(prefix="braid-triton-")
    os.environ["TRITON_CACHE_DIR"] = folder


class CompileWatch:
    """Told of every kernel that Triton compiles or fetches from disk, in whoever's step. Whose: `of`, which a runner sets when it begins a
    step; until then it is warm-up's.

    num_warmed, num_compiled: kernels that warm-up made ready, and those of them that were not on disk.
    """

    def __init__(self) -> None:
        self.of: Runner | None = None
        self.num_warmed = 0
        self.num_compiled = 0
        self._began = time.monotonic()

    def install(self) -> None:
        """Mutates: Triton's hooks, those of them that the installed version has. Hooks that were there are called as before."""
        try:
            from triton import knobs
        except ImportError:
            log.info("this Triton can't say what it compiles; kernel_compiles stays 0")
            return
        for place, name, hook in (
            (knobs.runtime, "jit_post_compile_hook", self.on_ready),
            (knobs.compilation, "listener", self.on_compiled),
        ):
            if hasattr(place, name):
                setattr(place, name, _both(getattr(place, name), hook))

    def on_ready(self, *, fn: Any, **_: Any) -> None:
        """A kernel was compiled or fetched from disk, and will be launched."""
        if self.of is None:
            self.num_warmed += 1
            return
        self.of.num_compiles += 1
        log.warning("kernel %s was not warmed up: a step waited until it was compiled; please report this", fn.name)

    def on_compiled(self, *, cache_hit: bool, **_: Any) -> None:
        self.num_compiled += not cache_hit

    def report(self) -> None:
        """Says what warm-up did."""
        seconds = time.monotonic() - self._began
        log.info("%d GPU kernels are ready after %.1f s; %d of them were compiled", self.num_warmed, seconds, self.num_compiled)


def _both(first: Callable[..., Any] | None, second: Callable[..., Any]) -> Callable[..., Any]:
    if first is None:
        return second

    def call(*arguments: Any, **keywords: Any) -> Any:
        second(*arguments, **keywords)
        return first(*arguments, **keywords)

    return call
