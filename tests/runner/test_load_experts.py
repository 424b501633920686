"""A mixture of experts through the real loader, scheduler and runner: a request gets the same alone and in a crowd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cpu.library import load as native_library
from service.engine.messages import Load, ModelSource
from service.runner.load import load_models
from service.runner.runner import Runner
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.worker import build_lane
from tests.model.test_experts import write_folder

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the compiled CPU kernels")
PROMPTS = ((1, 5, 9, 3, 70), tuple(range(3, 40)), (7,))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Loading in int8 leaves torch with one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(path: Path, dtype: str, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    limits = {"device": "cpu", "max_batch_tokens": 16, "max_sequences": 4, "prefix_cache": True, "memory_bytes": 2**23, "max_context": 0}
    message = Load(models=(ModelSource("m", str(path)),), dtype=dtype, prepared_folder="", max_prepared_bytes=0, **limits)  # type: ignore[arg-type]
    (loaded,) = load_models(message, lambda phase, fraction: None)
    lane, runner = build_lane(loaded, message), loaded.runner
    assert isinstance(runner, Runner)
    for number, prompt in enumerate(prompts):
        lane.scheduler.add(Request(str(number), (prompt,), SamplingParams(max_tokens=12, temperature=0.8, seed=3)), 0.0)
    ids: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while (plan := lane.scheduler.plan(0.0)[0]) is not None:
        for output in lane.scheduler.commit(plan, runner.sample(runner.forward(plan)), 0.0):
            if output.token is not None:
                ids[output.request_id].append(output.token)
    return list(ids.values())


@pytest.mark.parametrize("form", ["each", "mixtral"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_alone_and_in_a_crowd(tmp_path: Path, form: str, dtype: str) -> None:
    path = write_folder(tmp_path / "model", form)  # type: ignore[arg-type]
    together = written(path, dtype, PROMPTS)
    assert [len(each) for each in together] == [12, 12, 12]
    assert [written(path, dtype, (prompt,))[0] for prompt in PROMPTS] == together
