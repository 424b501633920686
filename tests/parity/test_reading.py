"""What is read of prompts equals what transformers computes: log-probabilities and pooled hidden states, however the prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.ops import select_ops
from service.model.families import read_config
from service.model.rotation import RotatedSource
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import PromptReading
from service.scheduling.reading import Pool, Read
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Request
from tests.parity.test_llama import OTHER, TOKENS, build_reference

TOLERANCE = 1e-4
BLOCK_SIZE = 4


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    reference = build_reference(request.param)
    path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(path)
    return reference, path


def build(path: Path, ops: str, *, is_int8: bool = False) -> Transformer:
    config = read_config(path)
    precision = Precision(torch.float32, "int8" if is_int8 else "dense")
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops(ops), precision=precision)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(request: pytest.FixtureRequest, pair: tuple[Any, Path]) -> Transformer:
    return build(pair[1], request.param)


@dataclass
class Reading:
    """Scheduler and runner over a small pool: what the engine's loop does. readings and hits: by request id."""

    model: Transformer
    max_batch_tokens: int = 64
    num_blocks: int = 64
    readings: dict[str, PromptReading] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout, cpu = partition_layers(self.model.config), torch.device("cpu")
        num_blocks = self.num_blocks * len(layout.groups)
        cache = KVCache(self.model.config, layout, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32, device=cpu)
        self.runner = Runner(self.model, cache, num_groups=len(layout.groups), device=cpu)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            groups=layout.groups,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=16,
            max_context=self.model.config.max_context,
            pictures=self.model.config.pictures,
        )

    def add(self, request_id: str, prompt: Sequence[int], read: Read | None, *, max_tokens: int = 0, priority: int = 0) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.scheduler.add(Request(request_id, (tuple(prompt),), sampling, read=read, priority=priority), 0.0)

    def step(self) -> None:
        plan, _ = self.scheduler.plan(0.0)
        assert plan is not None
        handle = self.runner.forward(plan)
        for output in self.scheduler.commit(plan, self.runner.sample(handle), 0.0, self.runner.read(handle)):
            if output.reading is not None:
                assert output.request_id not in self.readings
                self.readings[output.request_id] = output.reading
            if output.usage is not None:
                self.hits[output.request_id] = output.usage.cached_tokens

    def drain(self) -> dict[str, PromptReading]:
        while self.scheduler.has_work:
            self.step()
        assert not self.runner.reader._pooled, "a sum was kept for ever"
        return self.readings

    def of(self, prompt: Sequence[int], read: Read) -> PromptReading:
        self.add("only", prompt, read)
        return self.drain()["only"]


def logprobs_of(reference: Any, prompt: Sequence[int]) -> Tensor:
    """Of every id after each position [T, V]."""
    with torch.no_grad():
        return reference(torch.tensor([list(prompt)])).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def hidden_of(reference: Any, prompt: Sequence[int]) -> Tensor:
    """After the last norm [T, D]."""
    with torch.no_grad():
        return reference(torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states[-1][0]  # type: ignore[no-any-return]


def assert_logprobs(reading: PromptReading, reference: Any, prompt: Sequence[int], first: int = 1, num_top: int = 0) -> None:
    assert len(reading.logprobs) == len(prompt) - first
    expected = logprobs_of(reference, prompt)
    for position, (logprob, top) in enumerate(reading.logprobs, first):
        row = expected[position - 1]
        assert logprob == pytest.approx(float(row[prompt[position]]), abs=TOLERANCE)
        assert len(top) == num_top
        values = [value for _, value in top]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=TOLERANCE)
        assert [float(row[token]) for token, _ in top] == pytest.approx(values, abs=TOLERANCE)


def vector_of(reading: PromptReading) -> Tensor:
    assert reading.vector is not None
    return torch.from_numpy(np.frombuffer(reading.vector, "<f4").copy())


def assert_vector(reading: PromptReading, reference: Any, prompt: Sequence[int], pool: Pool) -> None:
    hidden = hidden_of(reference, prompt)
    expected = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pool]
    assert float((vector_of(reading) - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("budget", [64, 17, 4, 1])
def test_logprobs(pair: tuple[Any, Path], model: Transformer, budget: int) -> None:
    reading = Reading(model, max_batch_tokens=budget).of(TOKENS, Read(first=1, num_top=3))
    assert_logprobs(reading, pair[0], TOKENS, num_top=3)


@pytest.mark.parametrize("pool", ["last", "mean", "cls"])
@pytest.mark.parametrize("budget", [64, 17, 1])
def test_vectors(pair: tuple[Any, Path], model: Transformer, pool: Pool, budget: int) -> None:
    assert_vector(Reading(model, max_batch_tokens=budget).of(TOKENS, Read(pool=pool)), pair[0], TOKENS, pool)


def test_after_a_prefix_hit(pair: tuple[Any, Path], model: Transformer) -> None:
    bench = Reading(model)
    bench.add("before", TOKENS[:32], None, max_tokens=1)
    bench.drain()
    mixed = TOKENS[:30] + OTHER[:9]
    bench.add("ends", mixed, Read(first=30, num_top=2))
    bench.add("last", mixed, Read(pool="last"))
    readings = bench.drain()
    assert min(bench.hits["ends"], bench.hits["last"]) >= 28, "nothing was found"
    assert_logprobs(readings["ends"], pair[0], mixed, first=30, num_top=2)
    assert_vector(readings["last"], pair[0], mixed, "last")


def test_preempted(pair: tuple[Any, Path], model: Transformer) -> None:
    """An urgent request grows while the prompt is read in small slices, and takes its blocks."""
    if model.config.layers[0].window is not None:
        pytest.skip("a window of nine tokens needs so few blocks that nobody loses any")
    bench = Reading(model, max_batch_tokens=4, num_blocks=16)
    bench.add("urgent", OTHER[:4], None, max_tokens=50)
    bench.step()
    bench.add("read", TOKENS[:48], Read(first=1, num_top=1, pool="mean"), priority=1)
    while "read" not in bench.readings:
        bench.step()
    assert bench.scheduler.stats.preemptions > 0
    bench.drain()
    assert_logprobs(bench.readings["read"], pair[0], TOKENS[:48], num_top=1)
    assert_vector(bench.readings["read"], pair[0], TOKENS[:48], "mean")


def test_a_crowd_of_different_reads_and_a_text(pair: tuple[Any, Path], model: Transformer) -> None:
    bench = Reading(model, max_batch_tokens=24)
    bench.add("text", OTHER[:5], None, max_tokens=12)
    bench.add("logprobs", TOKENS[:40], Read(first=20, num_top=5))
    bench.add("one", OTHER[:2], Read(first=1))
    bench.add("mean", OTHER, Read(pool="mean"))
    bench.add("both", TOKENS[3:30], Read(first=1, pool="last"))
    readings = bench.drain()
    assert set(readings) == {"logprobs", "one", "mean", "both"}
    assert_logprobs(readings["logprobs"], pair[0], TOKENS[:40], first=20, num_top=5)
    assert_logprobs(readings["one"], pair[0], OTHER[:2])
    assert_vector(readings["mean"], pair[0], OTHER, "mean")
    assert_logprobs(readings["both"], pair[0], TOKENS[3:30])
    assert_vector(readings["both"], pair[0], TOKENS[3:30], "last")


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_vectors_of_rotated_weights_are_in_the_basis_of_the_model(pair: tuple[Any, Path], pool: Pool) -> None:
    """Int8 models compute on a rotated residual stream with the last norm's weights folded away; here without the rounding to int8."""
    config = read_config(pair[1])
    rotated = RotatedSource(open_weights(pair[1], config), config)
    precision = Precision(torch.float32)
    model = build_transformer(replace(config, has_tied_head=False), rotated, select_ops("reference"), precision=precision)
    assert model.basis is not None
    assert_vector(Reading(model).of(TOKENS, Read(pool=pool)), pair[0], TOKENS, pool)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_int8_vectors_are_close(pair: tuple[Any, Path], pool: Pool) -> None:
    """Rounding weights and activations to int8 moves these vectors by 0.9 to 1.9 % of their length."""
    reading = Reading(build(pair[1], "cpu", is_int8=True)).of(TOKENS, Read(pool=pool))
    hidden = hidden_of(pair[0], TOKENS)
    expected = hidden[-1] if pool == "last" else hidden.mean(0)
    assert float((vector_of(reading) - expected).norm() / expected.norm()) < 0.04
