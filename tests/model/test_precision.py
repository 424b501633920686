"""How a model's matrices are held: rows of int8, numbers in groups as a file has them, and such that are made at load."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from kernels.ops import Fp8Weight, GroupedWeight, Int8Weight, select_ops
from service.errors import StartupError
from service.footprint import weight_bytes
from service.model.config import ModelConfig, expected_shapes
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.runner.load import Storage, choose_storage
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.parity.steps import Steps


class Numbers:
    """A source of random tensors without a file, of the size that trained ones have."""

    def __init__(self, config: ModelConfig) -> None:
        self.tensors = random_tensors(config)

    def get(self, name: str) -> torch.Tensor:
        tensor = torch.from_numpy(self.tensors[name])
        return tensor if tensor.ndim == 1 else tensor * tensor.shape[1] ** -0.5


UNTIED = dataclasses.replace(TINY, has_tied_head=False)
MATRICES = ("qkv", "out", "gate_up", "down")
LAYERS = [name for name, shape in expected_shapes(TINY).items() if len(shape) == 2 and name.startswith("layers.")]


def build(path: Path, weights: str, back_end: str = "reference") -> Transformer:
    config = read_config(path)
    precision = Precision(torch.float32, weights)  # type: ignore[arg-type]
    return build_transformer(config, open_weights(path, config), select_ops(back_end), precision=precision)  # type: ignore[arg-type]


def logits(model: Transformer) -> torch.Tensor:
    return torch.cat(Steps(model, block_size=16, num_blocks=8).run([(0, [1, 5, 9, 3, 70, 33, 20, 8])]))


@pytest.fixture
def grouped_file(tmp_path: Path) -> Path:
    """q and k of 4 bits, v of 8, as files of mixed types have them."""
    types = {name: Type.Q8_0 if name.endswith((".v", ".down")) else Type.Q4_1 for name in LAYERS}
    return write_gguf(tmp_path / "grouped.gguf", TINY, random_tensors(TINY), types={**types, "embedding": Type.Q8_0})


def test_a_files_groups_are_kept(grouped_file: Path) -> None:
    kept, dense = build(grouped_file, "int4"), build(grouped_file, "dense")
    found = {name: getattr(kept.layers[0].weights, name) for name in MATRICES}  # type: ignore[union-attr]
    assert {name: weight.bits for name, weight in found.items()} == {"qkv": 8, "out": 4, "gate_up": 4, "down": 8}
    assert kept.embedding is kept.head, "a tied table is held once"
    assert kept.basis is None
    config = read_config(grouped_file)
    storage = choose_storage("int4", torch.device("cpu"))
    assert weight_bytes(config, storage, open_weights(grouped_file, config)) == kept.held_bytes
    error = (logits(kept) - logits(dense)).norm() / logits(dense).norm()
    assert error < 0.15, "only activations are quantised"


@pytest.mark.parametrize("back_end", ["reference", "cpu"])
def test_others_are_rotated_and_get_groups_of_their_own(tmp_path: Path, back_end: str) -> None:
    path = write_gguf(tmp_path / "dense.gguf", UNTIED, random_tensors(UNTIED))
    made, dense = build(path, "int4", back_end), build(path, "dense")
    assert made.basis is not None
    assert isinstance(made.head, GroupedWeight)
    assert made.head.bits == 8
    error = (logits(made) - logits(dense)).norm() / logits(dense).norm()
    assert 0.001 < error < 0.6, "random numbers without any structure are the worst that 4 bits can meet"


def test_rows_that_are_no_whole_groups_become_int8(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, feed_forward_width=80)
    path = write_gguf(tmp_path / "odd.gguf", config, random_tensors(config))
    weights = build(path, "int4").layers[1].weights  # type: ignore[union-attr]
    assert isinstance(weights.down, Int8Weight)
    assert isinstance(weights.gate_up, GroupedWeight)


def test_without_the_library_groups_become_dense(grouped_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cpu.ops.load", lambda: None)
    model = build(grouped_file, "int4", "cpu")
    assert isinstance(model.head, torch.Tensor)
    torch.testing.assert_close(logits(model), logits(build(grouped_file, "dense")), rtol=1e-4, atol=1e-4)


def test_what_a_device_does_not_have_is_refused() -> None:
    gpu = torch.device("cuda")
    assert choose_storage("auto", gpu).name == "bfloat16"
    with pytest.raises(StartupError, match="on a GPU alone; on a CPU there are float32, bfloat16, int8 and int4"):
        choose_storage("fp8", torch.device("cpu"))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_a_gpu_keeps_activations_and_kv_in_bfloat16(weights: str) -> None:
    storage = choose_storage(weights, torch.device("cuda"))
    assert storage == Storage(weights, Precision(torch.bfloat16, weights), torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_post_norms", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_fp8_keeps_tables_dense_and_turns_nothing(is_tied: bool, has_post_norms: bool) -> None:
    config = dataclasses.replace(TINY, has_tied_head=is_tied, has_post_norms=has_post_norms)
    source, ops = Numbers(config), select_ops("reference")
    made = build_transformer(config, source, ops, precision=Precision(torch.float32, "fp8"))
    dense = build_transformer(config, source, ops, precision=Precision(torch.float32))
    assert made.basis is None
    assert isinstance(made.head, torch.Tensor)
    assert (made.embedding is made.head) is is_tied
    assert all(isinstance(getattr(layer.weights, name), Fp8Weight) for layer in made.layers for name in MATRICES)
    assert weight_bytes(config, Storage("fp8", Precision(torch.float32, "fp8"), torch.float32)) == made.held_bytes
    error = (logits(made) - logits(dense)).norm() / logits(dense).norm()
    assert 0.001 < error < 0.15, "three bits of mantissa"


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_a_gpu_quantises_keys_of_layers_that_see_everything(name: str, dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    storage = choose_storage("auto", gpu, name)
    assert (storage.name, storage.kv_dtype, storage.local_kv_dtype) == ("bfloat16", dtype, torch.bfloat16)
    assert choose_storage("float32", gpu, name).local_kv_dtype == torch.float32
    assert choose_storage("auto", gpu).kv_dtype == torch.bfloat16
    assert choose_storage("auto", gpu, "bfloat16").local_kv_dtype is None


def test_a_cpu_has_no_fp8_and_quantises_all_layers() -> None:
    with pytest.raises(StartupError, match="use int8, bfloat16 or float32 on a CPU"):
        choose_storage("auto", torch.device("cpu"), "fp8")
    assert choose_storage("bfloat16", torch.device("cpu"), "int8").local_kv_dtype is None
