"""The loader keeps what it prepared, uses it the next time for every model, and counts mapped weights as memory in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cpu.library import load as native_library
from service import memory
from service.engine.messages import Load, ModelSource
from service.model import prepared
from service.model.transformer import Transformer
from service.runner import load as loader
from service.runner.load import Loaded, load_models
from service.runner.runner import Runner
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.worker import build_lane
from tests.model.checkpoints import TINY, random_tensors, write_gguf

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the compiled CPU kernels")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps what is little and new. Loading in int8 leaves torch with one thread."""
    monkeypatch.setattr(prepared, "_LEAST_BYTES", 1)
    monkeypatch.setattr(prepared, "_CALM_S", -1.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def message(paths: dict[str, Path], folder: Path, **more: object) -> Load:
    values: dict[str, object] = {"dtype": "auto", "memory_bytes": 2**23, "max_context": 0, "max_prepared_bytes": 2**30, **more}
    models = tuple(ModelSource(name, str(path)) for name, path in paths.items())
    fixed = {"device": "cpu", "max_batch_tokens": 64, "max_sequences": 4, "prefix_cache": True}
    return Load(models=models, prepared_folder=str(folder), **fixed, **values)  # type: ignore[arg-type]


def load(message: Load) -> list[Loaded]:
    found = load_models(message, lambda phase, fraction: None)
    for thread in threading.enumerate():
        if thread.name == "prepared":
            thread.join(60)
    return found


def ids(loaded: Loaded, message: Load) -> list[int]:
    lane = build_lane(loaded, message)
    lane.scheduler.add(Request("a", ((1, 5, 9, 3, 70),), SamplingParams(max_tokens=12, temperature=0.8, seed=3)), 0.0)
    found: list[int] = []
    runner = loaded.runner
    assert isinstance(runner, Runner)
    while (plan := lane.scheduler.plan(0.0)[0]) is not None:
        outputs = lane.scheduler.commit(plan, runner.sample(runner.forward(plan)), 0.0)
        found += [output.token for output in outputs if output.token is not None]
    return found


def is_mapped(loaded: Loaded, folder: Path) -> bool:
    """Does the head lie in a file of the folder?"""
    assert isinstance(loaded.runner, Runner)
    model = loaded.runner.model
    assert isinstance(model, Transformer)
    address = model.head.packed.tensors[0].data_ptr()  # type: ignore[union-attr]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= address < end:
            return str(folder) in line
    return False


def test_every_model_of_a_later_start_is_mapped_and_writes_the_same(tmp_path: Path) -> None:
    paths = {name: write_gguf(tmp_path / f"{name}.gguf", TINY, random_tensors(TINY, seed)) for seed, name in enumerate(("one", "two"))}
    first_message = message(paths, tmp_path / "kept")
    first = load(first_message)
    assert [is_mapped(one, tmp_path) for one in first] == [False, False]
    later_message = message(paths, tmp_path / "kept", max_context=100)
    later = load(later_message)
    assert [is_mapped(one, tmp_path) for one in later] == [True, True]
    assert [one.info.max_context for one in later] == [100, 100], "a shorter context needs no weights of its own"
    written = [ids(one, first_message) for one in first]
    assert [len(each) for each in written] == [12, 12]
    assert [ids(one, later_message) for one in later] == written
    assert written[0] != written[1]


@pytest.mark.parametrize("more", [{"max_prepared_bytes": 0}, {"dtype": "float32"}])
def test_nothing_is_kept_where_nothing_should_be(tmp_path: Path, more: dict[str, object]) -> None:
    load(message({"one": write_gguf(tmp_path / "one.gguf", TINY, random_tensors(TINY))}, tmp_path / "kept", **more))
    assert not (tmp_path / "kept").exists()


def test_mapped_weights_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's estimate calls their pages available."""
    asked: list[int] = []

    def available(mapped_bytes: int) -> int:
        asked.append(mapped_bytes)
        return 2**24

    monkeypatch.setattr(loader, "available_bytes", available)
    paths = {"one": write_gguf(tmp_path / "one.gguf", TINY, random_tensors(TINY))}
    (first,) = load(message(paths, tmp_path / "kept", memory_bytes=0))
    load(message(paths, tmp_path / "kept", memory_bytes=0))
    assert isinstance(first.runner, Runner)
    assert asked == [0, first.runner.model.held_bytes]


def test_a_container_counts_mapped_files_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_available", lambda: 1000)
    monkeypatch.setattr(memory, "_container_left", lambda: 800)
    assert [memory.available_bytes(mapped) for mapped in (0, 100, 300, 2000)] == [800, 800, 700, 0]
