"""Prepared weights: mapped ones give the same numbers, stale and damaged files are not used, and keeping them never fails a start."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from gguf import GGMLQuantizationType as Type

from kernels.cpu.library import load as native_library
from kernels.ops import GroupedWeight, Int8Weight, select_ops
from service.model import prepared
from service.model.config import expected_shapes
from service.model.families import read_config
from service.model.prepared import SUFFIX, Shelf, open_shelf
from service.model.transformer import Precision, Transformer, build_transformer
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.model.test_gemma import CONFIG, write_folder
from tests.parity.steps import Steps

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the compiled CPU kernels")

# 90 outputs of a feed-forward block are no whole strips, and 90 inputs no whole groups.
ODD = dataclasses.replace(TINY, has_tied_head=False, has_qkv_bias=True, has_qk_norm=True, feed_forward_width=90)
MATRICES = [name for name, shape in expected_shapes(TINY).items() if len(shape) == 2]
MOST = 2**30


@pytest.fixture(autouse=True)
def keeps_what_is_little_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_LEAST_BYTES", 1)
    monkeypatch.setattr(prepared, "_CALM_S", -1.0)


def shelf_of(path: Path, folder: Path, weights: str = "int8", most_bytes: int = MOST) -> Shelf:
    shelf = open_shelf(path, read_config(path), weights, folder, most_bytes)
    assert shelf is not None
    return shelf


def build(path: Path, shelf: Shelf, weights: str = "int8") -> Transformer:
    precision = Precision(torch.float32, weights)  # type: ignore[arg-type]
    return build_transformer(read_config(path), shelf, select_ops("cpu"), precision=precision)


def start(path: Path, folder: Path, weights: str = "int8", most_bytes: int = MOST) -> tuple[bool, torch.Tensor]:
    """Whether an earlier start's weights were used, and logits."""
    shelf = shelf_of(path, folder, weights, most_bytes)
    found = logits(build(path, shelf, weights))
    shelf.keep()
    return shelf.is_filled, found


def logits(model: Transformer) -> torch.Tensor:
    return torch.cat(Steps(model, block_size=16, num_blocks=8).run([(0, [1, 5, 9, 3, 70, 33, 20, 8])]))


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY))


def write(path: Path, kind: str) -> Path:
    """A checkpoint: a GGUF file, or Gemma's folder of safetensors."""
    if kind == "post_norms":
        return write_folder(path, CONFIG)
    config, family = (ODD, "qwen3") if kind == "odd" else (TINY, "llama")
    types = {name: Type.Q8_0 if name.endswith(".down") else Type.Q4_1 for name in MATRICES} if kind == "grouped" else {}
    return write_gguf(path.with_suffix(".gguf"), config, random_tensors(config), types=types, family=family)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["dense", "odd", "grouped", "post_norms"])
def test_mapped_weights_are_those_that_were_made(tmp_path: Path, weights: str, kind: str) -> None:
    path = write(tmp_path / "model", kind)
    plain = build_transformer(
        read_config(path), shelf_of(path, tmp_path / "other", weights).open_source(), select_ops("cpu"),
        precision=Precision(torch.float32, weights),  # type: ignore[arg-type]
    )  # fmt: skip
    assert start(path, tmp_path / "kept", weights)[0] is False
    shelf = shelf_of(path, tmp_path / "kept", weights)
    mapped = build(path, shelf, weights)
    assert shelf.is_filled
    assert torch.equal(logits(mapped), logits(plain))
    assert mapped.held_bytes == plain.held_bytes
    assert (mapped.basis is None) == (plain.basis is None) == (kind == "post_norms" or (kind == "grouped" and weights == "int4"))
    assert (mapped.embedding is mapped.head) == (plain.embedding is plain.head)
    for name in ("qkv", "out", "gate_up", "down"):
        ours, theirs = (getattr(model.layers[1].weights, name) for model in (mapped, plain))
        assert type(ours) is type(theirs)
        assert isinstance(ours, Int8Weight | GroupedWeight)
        assert all(torch.equal(*pair) for pair in zip(ours.packed.tensors, theirs.packed.tensors, strict=True))  # type: ignore[attr-defined]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in ours.packed.tensors), "kernels read whole cache lines"  # type: ignore[attr-defined]
        assert torch.equal(ours.scales, theirs.scales)


def test_a_later_start_reads_nothing_of_the_checkpoint(path: Path, tmp_path: Path) -> None:
    start(path, tmp_path / "kept")
    shelf = shelf_of(path, tmp_path / "kept")

    def fail() -> None:
        raise AssertionError("the checkpoint was opened")

    shelf.open_source = fail  # type: ignore[method-assign, assignment]
    assert build(path, shelf).basis is not None


def test_a_changed_checkpoint_is_prepared_anew(path: Path, tmp_path: Path) -> None:
    _, before = start(path, tmp_path / "kept")
    stamp = path.stat()
    other = write_gguf(tmp_path / "other.gguf", TINY, random_tensors(TINY, seed=1))
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a copy that keeps times does: same name, size and time
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    is_filled, after = start(path, tmp_path / "kept")
    assert not is_filled
    assert not torch.equal(before, after)
    assert torch.equal(after, start(other, tmp_path / "else")[1])
    assert start(path, tmp_path / "kept")[0]
    assert len(files_in(tmp_path / "kept")) == 1, "what is stale is written over"


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(path: Path, tmp_path: Path) -> None:
    shelf = shelf_of(path, tmp_path / "kept")
    build(path, shelf)
    os.utime(path, ns=(0, 0))
    shelf.keep()
    assert not files_in(tmp_path / "kept")


def test_a_checkpoint_that_was_changed_just_now_gets_no_shelf(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_CALM_S", 3600.0)
    assert open_shelf(path, read_config(path), "int8", tmp_path / "kept", MOST) is None


def test_other_code_and_other_forms_have_their_own(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(path, tmp_path / "kept")
    assert not start(path, tmp_path / "kept", "int4")[0]
    assert len(files_in(tmp_path / "kept")) == 2
    monkeypatch.setattr(prepared, "_code_digest", lambda: "other code")
    assert not start(path, tmp_path / "kept")[0]
    assert len(files_in(tmp_path / "kept")) == 2


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_in_the_head(path: Path) -> None:
    os.truncate(path, 20)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def claim_a_long_head(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:16] = b"\xff" * 8
    path.write_bytes(data)


def replace_with_a_stranger(path: Path) -> None:
    path.write_bytes(b"GGUF" + bytes(10_000))


def replace_with_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncate, cut_in_the_head, empty, lengthen, flip, claim_a_long_head, replace_with_a_stranger)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_and_written_anew(
    path: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    _, before = start(path, tmp_path / "kept")
    (file,) = files_in(tmp_path / "kept")
    whole = file.read_bytes()
    damage(file)
    is_filled, found = start(path, tmp_path / "kept")
    assert not is_filled
    assert "can't be used" in caplog.text
    assert torch.equal(found, before)
    assert file.read_bytes() == whole
    assert start(path, tmp_path / "kept")[0]


def test_a_folder_in_its_place_is_no_obstacle(path: Path, tmp_path: Path) -> None:
    _, before = start(path, tmp_path / "kept")
    (file,) = files_in(tmp_path / "kept")
    replace_with_a_folder(file)
    assert torch.equal(start(path, tmp_path / "kept")[1], before)


def _start_beside(path: Path, folder: Path, gate: Barrier) -> None:
    prepared._LEAST_BYTES, prepared._CALM_S = 1, -1.0
    torch.set_num_threads(1)
    shelf = shelf_of(path, folder)
    build(path, shelf)
    gate.wait(60)
    shelf.keep()


def test_two_servers_that_start_at_once(path: Path, tmp_path: Path) -> None:
    """This process and another. A third holds the lock until both want it; then one writes, and the other finds it written."""
    folder = tmp_path / "kept"
    shelf = shelf_of(path, folder)
    before = logits(build(path, shelf))
    folder.mkdir()
    lock = FileLock(folder / ".lock")
    lock.acquire()
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    other = context.Process(target=_start_beside, args=(path, folder, gate))
    other.start()
    gate.wait(60)
    keeping = threading.Thread(target=shelf.keep)
    keeping.start()
    time.sleep(0.2)
    assert not [each for each in folder.iterdir() if each.name != ".lock"], "nobody writes while another does"
    lock.release()
    keeping.join(60)
    other.join(60)
    assert other.exitcode == 0
    assert [each.name for each in folder.iterdir() if each.name != ".lock"] == [files_in(folder)[0].name]
    is_filled, found = start(path, folder)
    assert is_filled
    assert torch.equal(found, before)


def test_a_server_goes_on_with_a_file_that_another_replaces(path: Path, tmp_path: Path) -> None:
    start(path, tmp_path / "kept")
    model = build(path, shelf_of(path, tmp_path / "kept"))
    before = logits(model)
    (file,) = files_in(tmp_path / "kept")
    file.unlink()
    start(path, tmp_path / "kept")
    assert torch.equal(logits(model), before)


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    paths = [write_gguf(tmp_path / f"{name}.gguf", TINY, random_tensors(TINY)) for name in "abc"]
    folder = tmp_path / "kept"
    start(paths[0], folder)
    size = files_in(folder)[0].stat().st_size
    start(paths[1], folder)
    old, new = time.time() - 500, time.time() - 100
    for file in files_in(folder):
        os.utime(file, (old, old) if file.name.startswith("a") else (new, new))
    assert start(paths[0], folder)[0], "used again, it is not the oldest any more"
    start(paths[2], folder, most_bytes=2 * size + 100)
    assert [file.name[0] for file in files_in(folder)] == ["a", "c"]
    start(paths[1], folder, most_bytes=size - 1)
    assert [file.name[0] for file in files_in(folder)] == ["a", "c"], "what does not fit at all drives nobody out"


def test_what_was_left_half_written_goes(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    old, new = folder / "a.part", folder / "b.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    start(path, folder)
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"


@pytest.mark.parametrize("problem", ["no_space", "file_for_a_folder", "write_fails"])
def test_what_can_not_be_kept_is_logged_and_does_no_harm(
    path: Path, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "kept"
    if problem == "file_for_a_folder":
        folder.write_bytes(b"")
    elif problem == "no_space":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40, 1000))  # type: ignore[attr-defined]
    else:

        def fail(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
    is_filled, found = start(path, folder)
    assert not is_filled
    assert "not kept" in caplog.text
    assert torch.equal(found, start(path, tmp_path / "else")[1])
    assert not folder.is_dir() or {each.name for each in folder.iterdir()} <= {".lock"}


def test_little_is_not_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_LEAST_BYTES", 2**20)
    start(path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
