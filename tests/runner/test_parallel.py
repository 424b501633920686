"""Shares of a model: that together they compute what the whole does, that each reads and holds its part alone, and what can't be split.
Ranks are threads here; `tests/parity/test_parallel.py` has real processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from kernels.ops import select_ops
from service.errors import StartupError
from service.model.config import Experts, expected_shapes
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import FileTensor, WeightSource, open_weights
from service.runner import parallel
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.parallel import Leader, Share, ShareSource
from service.runner.runner import Runner
from service.scheduling.plan import PENDING, Slice, StepPlan
from tests.model import checkpoints
from tests.runner.shares import CONFIGS, LLAMA, STREAMS, build_shares, build_whole, run_together, source_of

FLOAT = Precision(torch.float32)
INT8 = Precision(torch.float32, "int8")


def cuts_of(tokens: list[int]) -> list[list[int]]:
    """A prompt in two chunks and then token by token."""
    return [tokens[:20], tokens[20:41], *([token] for token in tokens[41:])]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_shares_compute_what_the_whole_does(tmp_path: Path, name: str, size: int) -> None:
    """Two K/V heads among 4 or 8 ranks are held by several; 8 of them are divided."""
    config, source, cuts = CONFIGS[name], source_of(CONFIGS[name], tmp_path), cuts_of(STREAMS[name])
    want = run_together([build_whole(config, source, FLOAT)], cuts)
    got = run_together(build_shares(config, source, size, FLOAT), cuts)
    assert float((got - want).abs().max()) <= 1e-5  # the same sums in another order
    assert float(want.std()) > 0.2


def test_over_the_plain_back_end(tmp_path: Path) -> None:
    source, cuts = source_of(LLAMA, tmp_path), cuts_of(STREAMS["llama"])
    want = run_together([build_whole(LLAMA, source, FLOAT, "reference")], cuts)
    assert float((run_together(build_shares(LLAMA, source, 2, FLOAT, "reference"), cuts) - want).abs().max()) <= 1e-5


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3", "shared_expert"])
def test_int8_shares_lose_no_more_than_the_whole_in_int8(tmp_path: Path, name: str, size: int) -> None:
    """A row of `out` or `down`, and a row of what they multiply, has a scale for each rank's part of it; with post norms they are held in
    groups of 32 where a part is so many columns wide."""
    config = CONFIGS[name]
    source, cuts = source_of(config, tmp_path), cuts_of(STREAMS[name])
    exact = run_together([build_whole(config, source, FLOAT)], cuts)

    def error(models: list[Transformer]) -> float:
        return float((run_together(models, cuts) - exact).square().mean().sqrt())

    whole = error([build_whole(config, source, INT8)])
    assert error(build_shares(config, source, size, INT8)) <= 1.1 * whole
    assert 0 < whole < 0.2 * float(exact.std())


def recording(source: WeightSource, read: dict[str, list[int]]) -> WeightSource:
    """The same, noting how many numbers of each tensor are read, each time."""

    def noting(name: str, tensor: FileTensor) -> FileTensor:
        def note(part: Tensor) -> Tensor:
            read.setdefault(name, []).append(part.numel())
            assert part.untyped_storage().nbytes() == part.numel() * part.itemsize, "it keeps more in memory than it is"
            return part

        assert tensor.read_part is not None
        part: Callable[[int, int, int], Tensor] = tensor.read_part
        return replace(tensor, read=lambda: note(tensor.read()), read_part=lambda *span: note(part(*span)))

    return WeightSource({name: noting(name, tensor) for name, tensor in source.tensors.items()})


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_reads_and_holds_its_part_alone(tmp_path: Path, name: str, rank: int) -> None:
    config, size = CONFIGS[name], 4
    read: dict[str, list[int]] = {}
    source = recording(source_of(config, tmp_path), read)
    share = Share(config, rank, size)
    model = build_transformer(share.config("it"), ShareSource(source, share), select_ops("cpu"), precision=FLOAT)
    counts = {part: max(numbers) for part, numbers in read.items() if part.startswith("layers.0.")}
    shapes = {part: int(np.prod(shape)) for part, shape in expected_shapes(config).items()}
    for part in ("q", "out", "gate", "up", "down", "q_bias"):
        if (full := f"layers.0.{part}") in shapes:
            assert counts[full] == shapes[full] // size, part
    for part in ("k", "v", "k_bias", "v_bias"):
        if (full := f"layers.0.{part}") in shapes:
            assert counts[full] == shapes[full] // min(size, config.num_kv_heads), part
    layer = model.layers[0].weights
    assert isinstance(layer.qkv, Tensor)
    rows = (config.num_heads // size + 2 * max(config.num_kv_heads // size, 1)) * config.head_width
    assert layer.qkv.shape == (rows, config.width)
    assert layer.out.shape == (config.width, config.num_heads // size * config.head_width)
    assert layer.gate_up.shape == (2 * config.feed_forward_width // size, config.width)
    assert layer.down.shape == (config.width, config.feed_forward_width // size)
    assert model.head.shape == ({0: 33, 3: 32}[rank], config.width)  # of 131
    assert read["embedding" if config.has_tied_head else "head"][-1] == model.head.numel()
    assert model.embedding.shape == (config.vocab_size, config.width)


@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("llama", 4), ("qwen3", 4)])
def test_a_rank_keeps_the_keys_and_values_of_its_heads_alone(name: str, size: int) -> None:
    config, share = CONFIGS[name], Share(CONFIGS[name], 1, size).config("it")
    layout = partition_layers(share)
    for dtype in (torch.float32, torch.int8, torch.float8_e4m3fn):  # scales are a head's, and go with it
        whole, part = (layout.block_bytes(each, 16, dtype) for each in (config, share))
        assert part == whole // min(size, config.num_kv_heads)
    cache = KVCache(share, layout, num_blocks=3, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.pool.shape[3] == max(config.num_kv_heads // size, 1)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_parts_of_a_tensor_are_what_the_shares_config_expects(tmp_path: Path, name: str, size: int) -> None:
    """Also of families to come: a matrix that a rank reads whole and should not shows here."""
    config, source = CONFIGS[name], source_of(CONFIGS[name], tmp_path)
    for rank in (0, size - 1):
        share = Share(config, rank, size)
        shapes = expected_shapes(share.config("it"))
        each = -(-config.vocab_size // size)
        shapes["head"] = (min(each, config.vocab_size - rank * each), config.width)
        assert {part: tuple(ShareSource(source, share).get(part).shape) for part in shapes} == shapes


@pytest.mark.parametrize(
    ("changes", "size", "allowed"),
    [
        ({}, 3, "1, 2, 4, 8"),
        ({}, 16, "1, 2, 4, 8"),
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "1, 3"),
        ({"num_heads": 12, "num_kv_heads": 4}, 3, "1, 2, 4, 12"),
        ({"feed_forward_width": 100}, 8, "1, 2, 4"),
        ({"experts": Experts(4, 2, 36, True, (True, True))}, 8, "1, 2, 4"),
        ({"experts": Experts(4, 2, 32, True, (True, True), shared_width=50)}, 4, "1, 2"),
    ],
)
def test_what_can_not_be_split_is_refused(changes: dict[str, Any], size: int, allowed: str) -> None:
    config = replace(LLAMA, **changes)
    with pytest.raises(StartupError, match=f"--tensor-parallel {size} can't split small, .* it allows {allowed}$"):
        Share(config, 0, size).config("small")
    for each in map(int, allowed.split(", ")):
        Share(config, 0, each).config("small")


def test_a_gguf_file_is_read_in_the_same_parts(tmp_path: Path) -> None:
    """Its query and key rows are put back in order before they are cut."""
    config = replace(checkpoints.TINY, num_heads=4, num_kv_heads=2)
    tensors = checkpoints.random_tensors(config)
    path = checkpoints.write_gguf(tmp_path / "m.gguf", config, tensors, types={"layers.0.down": GGMLQuantizationType.Q8_0})
    source, share = open_weights(path, config), Share(config, 1, 2)
    parts = ShareSource(source, share)
    for name in ("layers.0.q", "layers.0.k"):
        rows = tensors[name]
        assert np.array_equal(parts.get(name).numpy(), rows[len(rows) // 2 :])
    down = parts.get("layers.0.down")
    assert torch.equal(down, source.get("layers.0.down")[:, config.feed_forward_width // 2 :])
    assert down.untyped_storage().nbytes() == down.numel() * down.itemsize
    assert torch.equal(parts.get("final_norm"), source.get("final_norm"))


class SomePeers:
    rank, size, port, listen_fd, tell = 1, 4, 999, None, None

    def least(self, value: int) -> int:
        return value

    def give_up(self, message: str) -> None:
        raise AssertionError(message)


def test_on_gpus_each_rank_has_its_own_and_nccl_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls alone: what they do needs two GPUs (`tests/parity/test_parallel.py`)."""
    seen: dict[str, Any] = {}
    environment = {"NCCL_SOCKET_IFNAME": "eth7"}
    monkeypatch.setattr(parallel.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(parallel.dist, "TCPStore", lambda *arguments, **keywords: ("store", *arguments[:4]))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **keywords: seen.update(backend=backend, **keywords))
    monkeypatch.setattr(parallel.atexit, "register", lambda work: None)
    assert parallel.join(SomePeers(), torch.device("cuda")) == seen["current"] == seen["device_id"] == torch.device("cuda:1")
    assert (seen["backend"], seen["rank"], seen["world_size"]) == ("nccl", 1, 4)
    assert seen["store"] == ("store", "127.0.0.1", 999, 4, False)
    assert environment["NCCL_SOCKET_IFNAME"] == "eth7"
    assert environment["GLOO_SOCKET_IFNAME"].startswith("lo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(StartupError, match="--tensor-parallel 4 needs as many GPUs, and torch finds 3"):
        parallel.join(SomePeers(), torch.device("cuda"))


def test_a_step_that_fails_on_rank_0_is_the_end_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runner.parallel._CAUSE_S", 0.0)
    model = build_whole(LLAMA, source_of(LLAMA, tmp_path), FLOAT)
    layout = partition_layers(LLAMA)
    cache = KVCache(LLAMA, layout, num_blocks=4, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    told: list[tuple[Slice, ...]] = []
    reasons: list[str] = []
    leader = Leader(Runner(model, cache, num_groups=len(layout.groups), device=torch.device("cpu")), told.append, reasons.append)
    good = Slice(0, 0, (1, 2, 3), ((0,), (1,)))
    leader.forward(StepPlan(0, (good,), ()))
    leader.forward(StepPlan(1, (), ()))  # a step that only encodes pictures is nothing to the others
    assert (told, reasons) == ([(good,)], [])
    with pytest.raises(ValueError, match="one waits for an id"):
        leader.forward(StepPlan(2, (replace(good, tokens=(1, PENDING)),), ()))
    assert (told, reasons) == ([(good,)], [])
    with pytest.raises(IndexError):
        leader.forward(StepPlan(2, (replace(good, tokens=(LLAMA.vocab_size + 5,)),), ()))
    assert len(told) == 2
    assert reasons == ["a step failed, and the ranks of a split model can't go on after that"]
