"""GGUF files: every supported type, the order of rotary rows, and files that do not fit their config."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from kernels.linear.reference import dense_of
from service.checkpoint import GGUFTensor
from service.errors import WeightsError
from service.model.config import ModelConfig, RopeScaling, expected_shapes
from service.model.families import read_config
from service.model.layers import rotary_frequencies
from service.model.weights import dense_of_gguf, open_weights
from tests.model.checkpoints import TINY, random_tensors, write_gguf

UNTIED = dataclasses.replace(TINY, has_tied_head=False)
QWEN2 = dataclasses.replace(TINY, has_qkv_bias=True)
QWEN3 = dataclasses.replace(TINY, has_qk_norm=True, has_tied_head=False)


def read_all(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    source = open_weights(path, config)
    return {name: source.get(name) for name in expected_shapes(config)}


@pytest.mark.parametrize(("config", "family"), [(TINY, "llama"), (UNTIED, "llama"), (QWEN2, "llama"), (QWEN2, "qwen2"), (QWEN3, "qwen3")])
def test_config_and_every_tensor_come_back(tmp_path: Path, config: ModelConfig, family: str) -> None:
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors, family=family)
    assert read_config(path) == config
    for name, found in read_all(path, config).items():
        np.testing.assert_array_equal(found.numpy(), tensors[name], err_msg=name)


# Rows of 64 for the small blocks, of 256 for the K types.
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0], ids=lambda kind: kind.name)
def test_quantised_types_match_the_library(tmp_path: Path, kind: Type) -> None:
    tensors = random_tensors(TINY)
    stored = dict.fromkeys(("layers.0.gate", "layers.1.out", "embedding", "layers.0.v"), kind)
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors, types=stored)
    found = read_all(path, TINY)
    for name in stored:
        library = dequantize(quantize(tensors[name], kind), kind)
        np.testing.assert_array_equal(found[name].float().numpy(), library, err_msg=name)
        if kind.name[0] == "Q":  # and it is near the truth, so that two equal mistakes would show
            assert np.abs(library - tensors[name]).mean() < {"8": 0.01, "5": 0.06, "4": 0.12}[kind.name[1]]
    expected_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert found["layers.0.gate"].dtype == expected_dtype


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_groups_stand_for_what_the_library_reads(tmp_path: Path, kind: Type) -> None:
    tensors = random_tensors(TINY)
    stored = dict.fromkeys(("layers.0.gate", "layers.1.out", "embedding", "layers.0.v", "layers.1.k"), kind)
    source = open_weights(write_gguf(tmp_path / "tiny.gguf", TINY, tensors, types=stored), TINY)
    for name in stored:
        weight = source.get_grouped(name)
        assert weight.bits == (8 if kind is Type.Q8_0 else 4)
        assert int(weight.values.max()) < 2**weight.bits
        torch.testing.assert_close(dense_of(weight), source.get(name), rtol=0, atol=1e-6)
    assert source.bits_of("layers.0.up") == 0
    with pytest.raises(WeightsError, match=r"no layers\.0\.up in groups"):
        source.get_grouped("layers.0.up")


def unpack_scales(packed: np.ndarray) -> tuple[list[int], list[int]]:
    """The eight 6-bit scales and minima in the 12 bytes of a Q4_K or Q5_K block, one at a time as ggml's C does."""
    scales, minima = [], []
    for j in range(8):
        if j < 4:
            scales.append(int(packed[j]) & 63)
            minima.append(int(packed[j + 4]) & 63)
        else:
            scales.append(int(packed[j + 4]) & 15 | int(packed[j - 4]) >> 6 << 4)
            minima.append(int(packed[j + 4]) >> 4 | int(packed[j]) >> 6 << 4)
    return scales, minima


def half(block: np.ndarray, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def k_block_by_hand(block: np.ndarray, kind: Type) -> list[float]:
    """256 numbers of one block by the format's definition, in plain loops."""
    out = [0.0] * 256
    if kind == Type.Q6_K:
        low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block, 208)
        for i in range(256):
            part, place = i // 128, i % 128
            quarter, column = place // 32, place % 32
            nibble = int(low[64 * part + place % 64]) >> (4 * (place // 64)) & 15
            code = (nibble | (int(high[32 * part + column]) >> (2 * quarter) & 3) << 4) - 32
            out[i] = d * int(scales[i // 16]) * code
        return out
    scales_of, minima = unpack_scales(block[4:16])
    d, least = half(block, 0), half(block, 2)
    fifth, codes = (block[16:48], block[48:]) if kind == Type.Q5_K else (None, block[16:])
    for i in range(256):
        group, column = i // 32, i % 32
        code = int(codes[32 * (group // 2) + column]) >> (4 * (group % 2)) & 15
        if fifth is not None:
            code += (int(fifth[column]) >> group & 1) << 4
        out[i] = d * scales_of[group] * code - least * minima[group]
    return out


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_types_match_their_definition(kind: Type) -> None:
    """The library can't write these, so random bytes are read, and compared with the format written out by hand."""
    size = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}[kind]
    data = np.random.default_rng(1).integers(0, 256, size=(6, 2 * size), dtype=np.uint8)
    scale_at = 208 if kind == Type.Q6_K else 0
    for row in data:
        for start in (0, size):
            row[start + scale_at : start + scale_at + 2] = np.array([0.01], np.float16).view(np.uint8)
            if kind != Type.Q6_K:
                row[start + 2 : start + 4] = np.array([0.02], np.float16).view(np.uint8)
    found = dense_of_gguf(GGUFTensor("t", (6, 512), kind, data)).numpy()
    by_hand = [k_block_by_hand(row[:size], kind) + k_block_by_hand(row[size:], kind) for row in data]
    np.testing.assert_allclose(found, np.array(by_hand), rtol=1e-5, atol=1e-5)


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY), types={"layers.1.up": Type.Q5_1})
    with pytest.raises(WeightsError, match=re.escape("blk.1.ffn_up.weight is of type Q5_1; supported are F32, F16")):
        open_weights(path, TINY)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    del tensors["layers.1.down"]
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    with pytest.raises(WeightsError, match=re.escape("lacks blk.1.ffn_down.weight")):
        open_weights(path, read_config(path))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {name: values for name, values in random_tensors(TINY).items() if not name.startswith("layers.1.")}
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    with pytest.raises(WeightsError, match="and 4 more"):
        open_weights(path, read_config(path))


def test_extra_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, {**random_tensors(TINY), "blk.0.mystery.weight": np.ones(4, np.float32)})
    with pytest.raises(WeightsError, match=re.escape("does not have: blk.0.mystery.weight")):
        open_weights(path, read_config(path))


@pytest.mark.parametrize("name", ["layers.0.k", "layers.1.down", "embedding", "final_norm"])
def test_wrong_shapes_are_told_with_both(tmp_path: Path, name: str) -> None:
    tensors = random_tensors(TINY)
    shape = tensors[name].shape
    tensors[name] = np.ones((shape[0] + 2, *shape[1:]), np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors, family="qwen2")
    with pytest.raises(WeightsError, match=re.escape(f"has shape {[shape[0] + 2, *shape[1:]]}; the config asks for {list(shape)}")):
        open_weights(path, read_config(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": None}, "attention.head_count = None"),
        ({"llama.attention.head_count": 0, "llama.rope.dimension_count": None}, "num_heads = 0"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads can't be shared by 3"),
        ({"llama.block_count": 2**31}, "block_count = 2147483648"),
        ({"llama.block_count": 0}, "block_count = 0"),
        ({"llama.embedding_length": "wide"}, "embedding_length = 'wide'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a positive number"),
        ({"llama.rope.freq_base": float("inf")}, "must be a positive number"),
        ({"llama.rope.dimension_count": 8}, "keys are 16 wide, values 16, and 8 dimensions are rotated"),
        ({"llama.rope.scaling.type": "yarn"}, "kind 'yarn'"),
        ({"llama.expert_count": 8}, "expert_used_count = None"),
        ({"llama.expert_count": 8, "llama.expert_gating_func": 2}, "chosen in a way that is not built"),
        ({"llama.context_length": True}, "context_length = True"),
        ({"split.count": 3}, "one part of a split model"),
    ],
)
def test_what_is_not_built_or_makes_no_sense_is_refused(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY), metadata=metadata)
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_config(path)


def test_unknown_family_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY), family="mamba")
    with pytest.raises(WeightsError, match="architecture is 'mamba'; supported in GGUF files are llama, qwen2, qwen2moe, qwen3"):
        read_config(path)


def test_vocabulary_comes_from_the_embedding_where_metadata_is_silent(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY), metadata={"llama.vocab_size": None})
    assert read_config(path) == TINY


def test_linear_scaling_and_window(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.attention.sliding_window": 32}
    layer = read_config(write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY), metadata=metadata)).layers[0]
    assert (layer.window, layer.rope_scaling) == (32, RopeScaling("linear", 4.0))


def llama3_factors(head_width: int, base: float, factor: float) -> np.ndarray:
    """As the converter writes them: a divisor for each frequency."""
    out = []
    for frequency in base ** (-np.arange(0, head_width, 2) / head_width):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("base", [500_000.0, 10_000.0])
def test_llama3_factors_become_their_schedule(tmp_path: Path, factor: float, base: float) -> None:
    factors = llama3_factors(TINY.head_width, base, factor)
    tensors = {**random_tensors(TINY), "rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors, metadata={"llama.rope.freq_base": base})
    config = read_config(path)
    scaling = config.layers[0].rope_scaling
    assert scaling is not None
    assert scaling.kind == "llama3"
    unscaled, scaled = rotary_frequencies(16, base, None), rotary_frequencies(16, base, scaling)
    np.testing.assert_allclose((unscaled / scaled).numpy(), factors, rtol=1e-3)
    open_weights(path, config)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 5, 8, dtype=np.float32), "another schedule"),
        (np.ones(4, np.float32), "must hold 8 float32"),
        (np.zeros(8, np.float32), "at least 1"),
        (np.full(8, np.nan, np.float32), "at least 1"),
    ],
)
def test_other_rotary_factors_are_refused(tmp_path: Path, factors: np.ndarray, message: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, {**random_tensors(TINY), "rope_freqs.weight": factors})
    with pytest.raises(WeightsError, match=message):
        read_config(path)


def test_truncated_anywhere_is_a_clean_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY)).read_bytes()
    data_start = GGUFReader(tmp_path / "tiny.gguf").data_offset
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 64, 5), *range(64, data_start, 97), *range(data_start, len(whole), 4099), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            open_weights(cut, read_config(cut))


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    source = open_weights(write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY)), TINY)
    with pytest.raises(WeightsError, match=r"has no layers\.7\.q"):
        source.get("layers.7.q")


def test_what_is_handed_out_is_the_callers_own(tmp_path: Path) -> None:
    source = open_weights(write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY)), TINY)
    source.get("layers.0.v").zero_()
    assert source.get("layers.0.v").abs().max() > 0


@pytest.mark.e2e
def test_default_model(smollm2_path: Path) -> None:
    config = read_config(smollm2_path)
    assert (config.num_parameters, config.eos_ids, config.max_context) == (134_515_008, (2,), 8192)
    source = open_weights(smollm2_path, config)
    norms = [source.get(f"layers.{index}.attention_norm") for index in (0, 29)]
    assert all(norm.isfinite().all() and norm.std() > 0 for norm in norms)
    assert source.get("embedding").shape == (49_152, 576)
