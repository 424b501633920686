"""Warm-up leaves no kernel to be compiled in traffic, by the keys that Triton itself looks kernels up by; and the watch that counts."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch

from bench.models import SHAPES, RandomSource
from kernels.ops import select_ops
from service.engine.messages import Load, ModelInfo
from service.model.config import ModelConfig
from service.model.transformer import Precision, build_transformer
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.load import Loaded
from service.runner.load import _warm_up_all as warm_up_all
from service.runner.runner import Handle, Runner
from service.runner.warmup import CompileWatch, Limits, draws_of, keep_kernels, run_steps, steps_of, warm_up
from service.scheduling.plan import KVGroup, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds
from tests.kernels.specialised import recorded_keys
from tests.runner.test_graphs import RerunRecorder

TINY = replace(SHAPES["tiny"], layers=SHAPES["tiny"].layers[:2], max_context=256)
PICTURES = PictureIds(100, 64, 4, 4, 1, 2, 3)
WITH_EXPERTS = replace(SHAPES["tiny-experts"], max_context=256)
WITH_PICTURES = replace(
    TINY, pictures=PICTURES, layers=tuple(replace(layer, radius=(1, 1) if layer.window else None) for layer in TINY.layers)
)


def runner_of(
    config: ModelConfig, weights: Literal["dense", "int8"] = "dense", kv_dtype: torch.dtype = torch.bfloat16
) -> tuple[Runner, Limits]:
    """As it would be on a GPU, but for the device."""
    device, ops, max_sequences, max_batch_tokens = torch.device("cpu"), select_ops("triton"), 70, 128
    with torch.inference_mode():
        precision = Precision(torch.bfloat16, weights)
        model = build_transformer(config, RandomSource(config, device), ops, precision=precision, device=device)
    layout = partition_layers(config)
    cache = KVCache(config, layout, num_blocks=64, block_size=16, dtype=kv_dtype, device=device)
    runner = Runner(model, cache, num_groups=len(layout.groups), device=device)
    runner.cache.views = [(pool[0], pool[1]) for pool in runner.cache.pool]  # as keys lie on a GPU
    limits = Limits(runner.num_groups, 16, max_batch_tokens, max_sequences, config.max_context, config.vocab_size, config.pictures)
    return runner, limits


def traffic(limits: Limits, seed: int, steps: int) -> Iterator[tuple[StepPlan, np.ndarray | None]]:
    """Steps of any mixture of sequences, each with sampling parameters of its own."""
    rng = random.Random(seed)
    for _ in range(steps):
        num_decodes = rng.choice((0, 1, 2, 3, 7, 16, 17, 30, 64, 65))
        lengths = [1] * num_decodes + [rng.randint(2, 40) for _ in range(rng.choice((0, 0, 1, 2)))]
        slices = []
        for row, length in enumerate(lengths or [5]):
            start = rng.randrange(0, limits.max_context - length)
            width = -(-(start + length) // limits.block_size)
            tables = tuple(tuple(rng.randrange(64) for _ in range(width)) for _ in range(limits.num_groups))
            is_code = limits.pictures is not None and length <= 12 and rng.random() < 0.3
            starts = (max(start - 3, 0),) * length if is_code else ()
            slices.append(Slice(row, start, (100 if is_code else 5,) * length, tables, starts, start > 0 and length == 1))
        drawing = [row for row in range(len(slices)) if rng.random() < 0.9]
        own = [params_of(rng) for _ in range(rng.choice((1, 3)))]
        samples = tuple(
            Sample(row, (row,), params := rng.choice(own), 9, 1, (4, 5) if params.has_penalties else None, 1, rng.choice(((), (7,))))
            for row in drawing
        )
        words = -(-limits.vocab_size // 32)
        masks = np.full((len(samples), words), -1, dtype=np.int32) if samples and rng.random() < 0.3 else None
        yield StepPlan(0, tuple(slices), samples, released=tuple(range(70))), masks


def params_of(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_k=rng.choice((0, 0, 20)),
        top_p=rng.choice((1.0, 1.0, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.1)),
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 1.0)),
        logprobs=rng.choice((None, None, None, None, 3)),
        logit_bias=rng.choice(((), (), (), ((3, 1.0),))),
    )


@pytest.mark.parametrize(
    ("config", "weights", "kv_dtype"),
    [
        (TINY, "dense", torch.bfloat16),
        (WITH_PICTURES, "dense", torch.bfloat16),
        (TINY, "int8", torch.int8),
        (WITH_EXPERTS, "dense", torch.bfloat16),
    ],
    ids=["text", "pictures", "int8", "experts"],
)
def test_traffic_needs_no_kernel_that_warm_up_has_not_met(
    config: ModelConfig, weights: Literal["dense", "int8"], kv_dtype: torch.dtype
) -> None:
    runner, limits = runner_of(config, weights, kv_dtype)
    with recorded_keys() as warm:
        run_steps(runner, limits)
        runner.capture_graphs(limits.max_sequences, RerunRecorder())
        warm_up(runner, limits)
    with recorded_keys() as met:
        for plan, masks in traffic(limits, seed=1, steps=120):
            runner.sample(runner.forward(plan), masks)
    late = sorted(met - warm)
    assert not late, f"{len(late)} kernels would be compiled in traffic, such as {late[0]}"
    most = Counter(name for name, _, _ in warm).most_common(1)[0]
    assert most[1] <= 16, f"{most[0]} is compiled for something that varies too much"
    kinds = {name for name, _, _ in met}
    assert kinds == {name for name, _, _ in warm}, "traffic here is of too few kinds to mean anything"


def test_what_runs_at_start_is_what_the_scheduler_may_plan() -> None:
    for limits in (
        Limits(2, 16, 2048, 256, 8192, 509),
        Limits(1, 16, 16, 1, 64, 509),
        Limits(1, 16, 8192, 4, 100, 509, PICTURES),
        Limits(1, 16, 4, 3, 2, 509, PICTURES),
    ):
        plans = [*steps_of(limits), *(plan for plan, _ in draws_of(limits))]
        for plan in plans:
            lengths = [len(piece.tokens) for piece in plan.slices]
            assert 0 < sum(lengths) <= limits.max_batch_tokens
            assert len(lengths) <= limits.max_sequences
            assert min(lengths) > 0
            assert max(piece.start + len(piece.tokens) for piece in plan.slices) <= limits.max_context
            assert all(len(table) * 16 >= piece.start + len(piece.tokens) for piece in plan.slices for table in piece.tables)
            assert lengths == sorted(lengths), "those with one token come first"
            assert len({piece.sequence_id for piece in plan.slices}) == len(lengths)
        most = min(limits.max_batch_tokens, limits.max_sequences * limits.max_context)
        assert max(plan.num_tokens for plan in plans) == most
        assert any(piece.grid_starts for plan in plans for piece in plan.slices) == (limits.pictures is not None)


def test_progress_reaches_one_and_sequences_are_forgotten() -> None:
    class Steps:
        def __init__(self) -> None:
            self.alive: set[int] = set()
            self.num_sampled = 0

        def forward(self, plan: StepPlan) -> Any:
            self.alive -= set(plan.released)
            assert not self.alive, "a step begins with what another has left"
            self.alive |= {piece.sequence_id for piece in plan.slices}
            return HANDLE

        def sample(self, handle: Any, masks: Any = None) -> None:
            assert masks is None or len(masks) == len(handle.plan.samples)
            self.num_sampled += 1

    HANDLE, steps, fractions = Handle(StepPlan(0, (), ())), Steps(), list[float]()
    warm_up(steps, Limits(1, 16, 64, 20, 128, 509), fractions.append)
    assert not steps.alive
    assert steps.num_sampled > 20
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert fractions == sorted(fractions)


def test_a_gpu_warms_up_all_models_before_it_records_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that a start on a GPU has, with a runner that only writes down what is asked of it."""
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monkeypatch.setattr(knobs.compilation, "listener", None)
    told: list[str] = []

    class Steps:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self, plan: StepPlan) -> Handle:
            told.append(f"{self.name} step")
            return Handle(plan)

        def sample(self, handle: Handle, masks: Any = None) -> None:
            told.append(f"{self.name} sample")

        def capture_graphs(self, max_sequences: int, *, progress: Any) -> None:
            told.append(f"{self.name} graphs {max_sequences}")
            progress(0.5)

        def watch_compiles(self, watch: CompileWatch) -> None:
            assert watch.of is None
            told.append(f"{self.name} watched")

    info = ModelInfo("one", 128, 509, "bfloat16", 1, 1024, 64, 16)
    models = [Loaded(replace_name(info, name), Steps(name), (KVGroup(),)) for name in ("one", "two")]  # type: ignore[arg-type]
    load = Load((), "auto", "cuda", 0, 0, max_batch_tokens=64, max_sequences=5, prefix_cache=True)
    phases: list[tuple[str, float]] = []
    warm_up_all(models, load, torch.device("cuda"), lambda phase, fraction: phases.append((phase, fraction)))
    assert list(dict.fromkeys(told)) == [
        "one step", "two step", "one graphs 5", "two graphs 5", "one sample", "one watched", "two sample", "two watched",
    ]  # fmt: skip
    assert list(dict.fromkeys(phase for phase, _ in phases)) == ["warm_up", "graphs"]
    for name in ("warm_up", "graphs"):
        fractions = [fraction for phase, fraction in phases if phase == name]
        assert fractions == sorted(fractions)
    assert phases[-1] == ("warm_up", 1.0)
    assert ("graphs", 0.25) in phases
    assert ("graphs", 0.75) in phases


def replace_name(info: ModelInfo, name: str) -> ModelInfo:
    return msgspec.structs.replace(info, name=name)


def test_a_kernel_compiled_in_a_step_is_counted_and_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    earlier: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **keywords: earlier.append(keywords["key"]))
    monkeypatch.setattr(knobs.compilation, "listener", None)
    watch = CompileWatch()
    watch.install()
    kernel = SimpleNamespace(name="norm_kernel")

    def launch(cache_hit: bool) -> None:
        """As Triton tells of a kernel that it has not got in memory."""
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
        hook = knobs.runtime.jit_post_compile_hook
        hook(key="k", repr="", fn=kernel, compile={}, is_manual_warmup=False, already_compiled=False)

    launch(cache_hit=False)
    launch(cache_hit=True)
    assert (watch.num_warmed, watch.num_compiled) == (2, 1)
    assert "norm_kernel" not in caplog.text

    runner, limits = runner_of(TINY)
    other, _ = runner_of(TINY)
    for one in (runner, other):
        one.watch_compiles(watch)
    with recorded_keys(), caplog.at_level(logging.WARNING):
        runner.forward(next(steps_of(limits)))
        launch(cache_hit=False)
    assert runner.counts().kernel_compiles == 1
    assert other.counts().kernel_compiles == 0
    assert watch.num_warmed == 2
    assert "norm_kernel" in caplog.text
    assert earlier == ["k"] * 3


def test_a_draw_that_finds_no_memory_does_not_end_the_start(caplog: pytest.LogCaptureFixture) -> None:
    class Steps:
        num_sampled = 0

        def forward(self, plan: StepPlan) -> Handle:
            return Handle(plan)

        def sample(self, handle: Handle, masks: Any = None) -> None:
            self.num_sampled += 1
            if handle.plan.samples[0].params.logprobs is not None:
                raise torch.OutOfMemoryError("no room")

    steps, fractions = Steps(), list[float]()
    warm_up(steps, Limits(1, 16, 64, 3, 128, 509), fractions.append)
    assert fractions[-1] == 1
    assert "3 sequences" in caplog.text
    assert steps.num_sampled > 30


def test_kernels_are_kept_where_that_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    keep_kernels("")
    assert "TRITON_CACHE_DIR" not in os.environ
    keep_kernels(str(tmp_path / "braid" / "triton"))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "braid" / "triton")
    assert list((tmp_path / "braid" / "triton").iterdir()) == []
    keep_kernels(str(tmp_path / "another"))
    assert not (tmp_path / "another").exists(), "whoever set the variable is obeyed"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").touch()
    keep_kernels(str(tmp_path / "file" / "triton"))
    assert os.access(os.environ["TRITON_CACHE_DIR"], os.W_OK)
    assert "not kept" in caplog.text
    os.rmdir(os.environ["TRITON_CACHE_DIR"])


def test_a_triton_without_hooks_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    CompileWatch().install()
    bare = ModuleType("triton")
    bare.knobs = SimpleNamespace(runtime=SimpleNamespace(), compilation=SimpleNamespace())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", bare)
    CompileWatch().install()
    assert not vars(bare.knobs.runtime)
