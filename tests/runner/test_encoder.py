"""The encoder as the engine runs it: plans in, vectors out, whatever the number of threads; loading, and what a lane of it knows."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from service import cli
from service.engine.messages import Load, ModelSource
from service.model.encoder import build_encoder
from service.model.encoder_config import read_encoder_config
from service.model.weights import open_encoder_weights
from service.runner.encoder import EncoderRunner, batches, pooled
from service.runner.load import load_models
from service.runner.runner import Runner
from service.scheduling.plan import PromptRead, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from service.worker import build_lane
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.model.encoders import bert, write_encoder
from tests.model.test_encoder import texts


def runner(folder: Path, num_threads: int) -> EncoderRunner:
    config = read_encoder_config(folder)
    assert config is not None
    return EncoderRunner(build_encoder(config, open_encoder_weights(folder, config), dtype=torch.float32), num_threads)


def plan(given: list[list[int]], pools: tuple[str, ...] = ("mean",), **changes: object) -> StepPlan:
    slices = tuple(Slice(index, 0, tuple(text), ((index,),)) for index, text in enumerate(given))
    reads = tuple(PromptRead(index, index, pool=pools[index % len(pools)], is_last=True) for index in range(len(given)))  # type: ignore[arg-type]
    return StepPlan(**{"step_id": 1, "slices": slices, "samples": (), "reads": reads, **changes})  # type: ignore[arg-type]


def vectors(made: EncoderRunner, step: StepPlan) -> list[bytes]:
    handle = made.forward(step)
    assert made.sample(handle) == []
    found = [reading.vector for reading in made.read(handle)]
    assert all(found)
    return [vector for vector in found if vector is not None]


def test_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    reference = bert()
    write_encoder(tmp_path, reference)
    given = texts()
    for pool, pick in (("mean", lambda rows: rows.mean(0)), ("cls", lambda rows: rows[0]), ("last", lambda rows: rows[-1])):
        for text, vector in zip(given, vectors(runner(tmp_path, 2), plan(given, (pool,))), strict=True):
            with torch.inference_mode():
                theirs = pick(reference(input_ids=torch.tensor([text])).last_hidden_state[0])
            torch.testing.assert_close(torch.tensor(struct.unpack("<32f", vector)), theirs, rtol=0, atol=1e-4)


def test_threads_change_no_bit(tmp_path: Path) -> None:
    write_encoder(tmp_path, bert())
    step = plan(texts() * 5, ("mean", "cls", "last"))
    assert vectors(runner(tmp_path, 1), step) == vectors(runner(tmp_path, 3), step)


def test_a_step_may_hold_nothing(tmp_path: Path) -> None:
    made = runner(write_encoder(tmp_path, bert()), 2)
    assert made.read(made.forward(plan([]))) == []


def test_what_an_encoder_can_not_do(tmp_path: Path) -> None:
    made = runner(write_encoder(tmp_path, bert()), 1)
    sample = Sample(0, (0,), SamplingParams(max_tokens=1), 3, 0)
    with pytest.raises(RuntimeError, match="draws nothing"):
        made.forward(plan([[1, 2, 3]], samples=(sample,)))
    with pytest.raises(RuntimeError, match="whole prompts"):
        made.forward(plan([], slices=(Slice(0, 2, (1,), ((0,),)),), reads=()))
    for read in (PromptRead(0, 0, targets=(1,)), PromptRead(0, 0, pool="mean", is_last=False), PromptRead(0, 0, is_last=True)):
        with pytest.raises(RuntimeError, match="vectors of whole prompts"):
            made.read(made.forward(plan([[1, 2, 3]], reads=(read,))))


def test_batches_keep_the_order() -> None:
    given = [[0] * length for length in (5, 1, 1, 9, 3, 4)]
    assert [[len(text) for text in batch] for batch in batches(given, 6)] == [[5, 1], [1, 9], [3, 4]]
    assert batches([], 1) == []
    assert [len(batch) for batch in batches(given, 1)] == [1] * 6


def test_a_mean_is_summed_in_more_than_float32() -> None:
    rows = torch.full((1000, 2), 0.1)
    rows[0] = 1e7
    assert pooled(rows, "mean")[0] == pytest.approx(10000.0999, rel=1e-7)


def message(*paths: tuple[str, Path], **changes: object) -> Load:
    usual: dict[str, object] = {"dtype": "auto", "device": "cpu", "memory_bytes": 0, "max_context": 0, "max_batch_tokens": 512}
    models = tuple(ModelSource(name, str(path)) for name, path in paths)
    return Load(models=models, max_sequences=4, prefix_cache=True, **{**usual, **changes})  # type: ignore[arg-type]


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_it_is_loaded_beside_a_decoder(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", bert())
    decoder = write_gguf(tmp_path / "own.gguf", TINY, random_tensors(TINY))
    reports: list[tuple[str, float]] = []
    load = message(("writes", decoder), ("reads", encoder))
    writes, reads = load_models(load, lambda phase, fraction: reports.append((phase, fraction)))
    assert writes.info.can_generate
    assert isinstance(writes.runner, Runner)
    info = reads.info
    assert (info.can_generate, info.pool, info.vector_width, info.dtype) == (False, "mean", 32, "float32")
    assert (info.max_context, info.vocab_size, info.kv_tokens) == (256, 21, 1024)
    assert reports[-1] == ("warm_up", 1.0)
    assert isinstance(reads.runner, EncoderRunner)
    lane = build_lane(reads, load)
    assert lane.info is info


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("changes", "context"), [({"max_context": 100}, 100), ({"max_batch_tokens": 64}, 64), ({"max_context": 4096}, 256)]
)
def test_limits_of_an_encoder(tmp_path: Path, changes: dict[str, object], context: int) -> None:
    (found,) = load_models(message(("reads", write_encoder(tmp_path, bert())), **changes), lambda phase, fraction: None)
    assert found.info.max_context == context


@pytest.mark.usefixtures("threads")
def test_bfloat16_is_an_encoder_too(tmp_path: Path) -> None:
    write_encoder(tmp_path, bert())
    (found,) = load_models(message(("reads", tmp_path), dtype="bfloat16"), lambda phase, fraction: None)
    assert found.info.dtype == "bfloat16"
    given = texts()
    exact = [torch.tensor(struct.unpack("<32f", vector)) for vector in vectors(runner(tmp_path, 1), plan(given))]
    assert isinstance(found.runner, EncoderRunner)
    rough = [torch.tensor(struct.unpack("<32f", vector)) for vector in vectors(found.runner, plan(given))]
    # 8 bits of mantissa, two layers: about 1 % of a vector's length.
    assert all(torch.cosine_similarity(a, b, dim=0) > 0.999 for a, b in zip(exact, rough, strict=True))


def test_its_plan_tells_the_weights_and_no_kv(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "reads", bert())
    answer = CliRunner().invoke(cli.main, ["plan", str(folder)])
    assert answer.exit_code == 0, answer.output
    assert "an encoder for texts of up to 256 tokens; it needs no K/V" in " ".join(answer.output.split())
    assert "float32" in answer.output
    assert "int8" not in answer.output
    assert CliRunner().invoke(cli.main, ["plan", str(folder), "--memory", "1K"]).exit_code == 1
