"""Reading descriptions: what is there is read exactly, and no truncated or lying file does more harm than a WeightsError."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.checkpoint import find_checkpoint, open_gguf, read_json
from service.errors import WeightsError
from tests.codec.tiny import byte_level_metadata, write_gguf


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a.weight": np.arange(64, dtype=np.float32).reshape(2, 32),
        "b.bias": np.ones(3, np.float16),
    }
    return write_gguf(tmp_path_factory.mktemp("gguf") / "honest.gguf", byte_level_metadata(), tensors)


def header(num_tensors: int = 0, num_fields: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_fields)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor_file(dims: list[int], kind: int, offset: int, data_bytes: int = 4096, name: bytes = b"t") -> bytes:
    info = string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    head = header(num_tensors=1) + info
    return head + b"\0" * (-len(head) % 32) + b"\0" * data_bytes


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        open_gguf(path, with_tokens=True)
    assert str(tmp_path) not in caught.value.message
    return caught.value.message


def test_metadata_are_plain_values_and_tensors_are_rows_first(honest: Path) -> None:
    file = open_gguf(honest, with_tokens=True)
    expected = byte_level_metadata()
    assert {key: file.metadata[key] for key in expected} == expected
    tensor = file.tensors["a.weight"]
    assert (tensor.shape, tensor.type) == ((2, 32), gguf.GGMLQuantizationType.F32)
    assert tensor.data.dtype == np.float32
    assert tensor.data.tolist() == np.arange(64).reshape(2, 32).tolist()
    assert not tensor.data.flags.writeable
    assert file.tensors["b.bias"].data.tolist() == [1, 1, 1]


def test_every_type_of_value_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    writer.add_uint8("u8", 7)
    writer.add_int8("i8", -7)
    writer.add_uint64("u64", 2**40)
    writer.add_float64("f64", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["é", "", "日本"])
    writer.add_string("text", "line\nline")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = open_gguf(tmp_path / "types.gguf", with_tokens=True).metadata
    theirs = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "types.gguf").fields.items()}
    assert dict(metadata) == theirs
    assert metadata["texts"] == ["é", "", "日本"]
    assert metadata["yes"] is True


def test_long_lists_of_strings_are_left_out_unless_wanted(tmp_path: Path) -> None:
    tokens = [f"t{n}" for n in range(3000)]
    path = write_gguf(tmp_path / "long.gguf", {"general.architecture": "llama", "tokens": tokens, "few": ["a"], "last": 5})
    assert open_gguf(path, with_tokens=True).metadata["tokens"] == tokens
    without = open_gguf(path, with_tokens=False).metadata
    assert "tokens" not in without
    assert (without["few"], without["last"]) == (["a"], 5)


def test_the_default_model_opens_with_what_the_package_reads(smollm2_path: Path) -> None:
    file = open_gguf(smollm2_path, with_tokens=True)
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == file.metadata["llama.vocab_size"] == 49152
    tensor = file.tensors["blk.0.attn_k.weight"]
    assert (tensor.shape, tensor.data.shape) == ((192, 576), (192, 576 // 32 * 20))


def test_every_truncation_is_refused(honest: Path, tmp_path: Path) -> None:
    data = honest.read_bytes()
    for size in [*range(200), *range(200, len(data) - 32, 97), len(data) - 33]:
        assert "can't be read as GGUF" in refused(tmp_path, data[:size])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_read_or_refused_but_nothing_else(honest: Path, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(honest.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 8))
        value = data.draw(st.sampled_from([b"\xff", b"\xff" * 8, b"\0" * 4, b"\x7f\xff\xff\xff", struct.pack("<Q", 2**63), b"\x09"]))
        damaged[at : at + len(value)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = open_gguf(path, with_tokens=True)
    except WeightsError:
        return
    assert all(tensor.data.nbytes <= len(damaged) for tensor in file.tensors.values())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "only 0 bytes"),
        (header(magic=b"ggml") + b"\0" * 64, "does not start with GGUF"),
        (header(version=1) + b"\0" * 64, "version is 1"),
        (header(version=3 << 24) + b"\0" * 64, "big-endian"),
        (header(num_tensors=2**62), "tensors"),
        (header(num_fields=2**40), "fields"),
        (header(num_fields=9), "it ends at"),
        (header(num_fields=1) + struct.pack("<Q", 2**63) + b"\0" * 64, "a string claims"),
        (header(num_fields=1) + string(b"k") + struct.pack("<I", 99) + b"\0" * 64, "99"),
        (header(num_fields=1) + string(b"k") + struct.pack("<IIQ", 9, 0, 2**60), "an array claims"),
        (header(num_fields=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2**20), "are expected at"),
        (header(num_fields=1) + string(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**40), "inside a list"),
        (header(num_fields=1) + string(b"k") + struct.pack("<IIQIQ", 9, 9, 1, 0, 1) + b"\0", "arrays of arrays"),
        (header(num_fields=1) + string(b"\xff\xfe") + struct.pack("<II", 4, 1), "utf-8"),
        (header(num_fields=2) + 2 * (string(b"k") + struct.pack("<II", 4, 1)), "Duplicate"),
        (header(num_fields=1) + string(b"general.alignment") + struct.pack("<II", 4, 3), "alignment"),
        (tensor_file([8, 8], 0, 1 << 40), "the file ends at"),
        (tensor_file([8, 8], 0, 2**64 - 32), "the file ends at"),
        (tensor_file([8, 8], 0, 7), "not aligned"),
        (tensor_file([2**32, 2**32], 0, 0), "the file ends at"),
        (tensor_file([2**63, 2], 0, 0), "the file ends at"),
        (tensor_file([64, 64], 0, 0), "the file ends at"),
        (tensor_file([8, 8], 200, 0), "unknown type 200"),
        (tensor_file([33, 8], 2, 0), "blocks of 32"),
        (tensor_file([0, 8], 0, 0), "shape"),
        (tensor_file([1] * 9, 0, 0), "shape"),
        (header(num_tensors=1) + string(b"t") + struct.pack("<I", 2**32 - 1), "it ends at"),
    ],
)
def test_a_lie_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refused(tmp_path, data)


def test_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    info = string(b"t") + struct.pack("<I1QIQ", 1, 8, 0, 0)
    head = header(num_tensors=2) + info * 2
    assert "duplicated" in refused(tmp_path, head + b"\0" * (-len(head) % 32 + 64))


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file") as caught:
        open_gguf(tmp_path / "none.gguf", with_tokens=False)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "can't be read as JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"[" * 100_000, "can't be read as JSON"),
    ],
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        read_json(tmp_path / "config.json")


def test_json_is_read_and_a_default_stands_for_a_missing_file(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": [1, "é"]}
    (tmp_path / "config.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json(tmp_path / "config.json") == value
    assert read_json(tmp_path / "none.json", default={}) == {}
    with pytest.raises(WeightsError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")


def test_kinds_of_checkpoint_are_told_apart(honest: Path, tmp_path: Path) -> None:
    assert find_checkpoint(honest).kind == "gguf"
    assert find_checkpoint(honest.parent).path == honest
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_checkpoint(tmp_path).kind == "folder"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "c.bin"):
        (tmp_path / name).touch()
    for path, words in ((tmp_path, "2 .gguf files"), (tmp_path / "c.bin", "not a .gguf"), (tmp_path / "none", "neither a file")):
        with pytest.raises(WeightsError, match=words):
            find_checkpoint(path)
