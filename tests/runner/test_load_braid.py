"""A folder of the family "braid" loads and warms up, and what it says of its pictures crosses to whoever plans its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch

from kernels.cpu.library import load as native_library
from service.engine.messages import Load, ModelSource, Ready
from service.runner.load import load_models
from service.runner.runner import Runner
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.worker import build_lane
from tests.parity.braid import PICTURES, STREAM, grid_starts, random_weights, write_folder


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_pictures_reach_the_scheduler(tmp_path: Path, dtype: Literal["auto", "float32"]) -> None:
    folder = write_folder(tmp_path, random_weights())
    threads = torch.get_num_threads()
    load = Load(
        models=(ModelSource("braid", str(folder)),),
        memory_bytes=2**22,
        dtype=dtype,
        device="cpu",
        threads=threads,
        max_context=0,
        max_batch_tokens=128,
        max_sequences=4,
        prefix_cache=True,
        log_level="info",
    )
    loaded = load_models(load, lambda phase, fraction: None)[0]
    torch.set_num_threads(threads)  # one model in int8 leaves torch with a single one
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(Ready(models=(loaded.info,))), type=Ready)
    assert crossed.models[0].pictures == PICTURES
    # Guesses are made by default only where a row's arithmetic depends on nothing else.
    assert crossed.models[0].usual_draft_len == (8 if dtype == "auto" and native_library() is not None else 0)
    scheduler = build_lane(loaded, load).scheduler
    scheduler.add(Request("a", (tuple(STREAM),), SamplingParams(max_tokens=2, temperature=0.0)), 0.0)
    plan, _ = scheduler.plan(0.0)
    assert plan is not None
    assert plan.slices[0].grid_starts == tuple(grid_starts(STREAM))
    runner = loaded.runner
    assert isinstance(runner, Runner)
    assert len(scheduler.commit(plan, runner.sample(runner.forward(plan)), 0.0)) == 1
