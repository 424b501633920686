"""Opening a checkpoint and its description: a GGUF file's metadata and mapped tensors, or a folder's JSON files.

Reads no tensor's contents and knows no model family; imports neither torch nor the tokenizer. Called by the codec and by the weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from service.errors import WeightsError

# What no honest file exceeds; they bound what a lying one can make us allocate.
MOST_FIELDS = 1 << 16
MOST_TENSORS = 1 << 18
MOST_ELEMENTS = 1 << 22
MOST_STRING_BYTES = 1 << 24
MOST_JSON_BYTES = 1 << 28
MOST_DIMENSIONS = 4
# A longer array of strings is the vocabulary or its merges: half of the time of opening, and only the codec wants it.
LONG_STRING_ARRAY = 1024

_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<4sIQQ")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a model's files are: one `.gguf` file, or a folder with config.json and safetensors."""

    kind: Literal["gguf", "folder"]
    path: Path


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: rows first, [out, in] for a matrix. data: mapped and read-only; F32, F16, F64 and whole numbers in their own dtype and
    shape, every other type as uint8 with the bytes of a row as its last axis."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """metadata: plain Python values by key. tensors: by name, in the order of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def find_checkpoint(path: Path) -> Checkpoint:
    """What kind of checkpoint lies at a path; a folder that holds one GGUF file and no safetensors means that file.

    Raises: WeightsError when there is nothing that can be loaded.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise WeightsError(f"{path.name} is not a .gguf file; give a .gguf file or a folder with safetensors")
        return Checkpoint("gguf", path)
    if not path.is_dir():
        raise WeightsError(f"there is no model at {path.name!r}: neither a file nor a folder")
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").is_file():
            raise WeightsError(f"the folder {path.name!r} has safetensors but no config.json")
        return Checkpoint("folder", path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return Checkpoint("gguf", found[0])
    if found:
        raise WeightsError(f"the folder {path.name!r} has {len(found)} .gguf files; name one of them")
    raise WeightsError(f"the folder {path.name!r} has neither safetensors nor a .gguf file")


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default`, when given, stands for a missing file.

    Raises: WeightsError when the file is missing, too large, not UTF-8, not JSON or not an object.
    """
    try:
        if default is not None and not path.exists():
            return default
        if path.stat().st_size > MOST_JSON_BYTES:
            raise WeightsError(f"{path.name} is larger than {MOST_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path.name} can't be read as JSON: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path.name} must hold a JSON object")
    return value


def open_gguf(path: Path, *, with_tokens: bool) -> GGUFFile:
    """Maps a GGUF file and reads its description; without with_tokens the long arrays of strings are left out of the metadata.

    Raises: WeightsError when the file is missing, truncated, or says of itself what can't be true.
    """
    try:
        _check_head(path)
        reader = _Reader(path, with_tokens)
        metadata = {key: _value(field) for key, field in reader.fields.items() if not _is_left_out(field)}
        tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    except WeightsError as error:
        raise WeightsError(f"{path.name} can't be read as GGUF: {error}") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise WeightsError(f"{path.name} can't be read as GGUF: {_reason(error)}") from error
    return GGUFFile(metadata, tensors)


def _check_head(path: Path) -> None:
    if not path.is_file():
        raise WeightsError("there is no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise WeightsError(f"it has only {size} bytes")
    magic, version, num_tensors, num_fields = _HEAD.unpack(head)
    if magic != b"GGUF":
        raise WeightsError("it does not start with GGUF")
    if version not in (2, 3):
        raise WeightsError(f"its version is {version} (or it is big-endian); versions 2 and 3, little-endian, can be read")
    if num_fields > MOST_FIELDS or num_tensors > MOST_TENSORS:
        raise WeightsError(f"it claims {num_fields} fields and {num_tensors} tensors")


class _Reader(GGUFReader):  # type: ignore[misc]  # the gguf package has no types
    """The gguf package's reader with every read held inside the file, and arrays read whole instead of element by element."""

    def __init__(self, path: Path, with_tokens: bool) -> None:
        self._with_tokens = with_tokens
        super().__init__(path)

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        self._require(int(offset), int(count) * np.dtype(dtype).itemsize)
        values: npt.NDArray[Any] = super()._get(int(offset), dtype, int(count), override_order)
        return values

    def _require(self, offset: int, num_bytes: int) -> None:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > len(self.data):
            raise WeightsError(f"it ends at byte {len(self.data)}, but {num_bytes} bytes are expected at {offset}")

    def _get_str(self, offset: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        length = self._get(offset, np.uint64)
        if length[0] > MOST_STRING_BYTES:
            raise WeightsError(f"a string claims {length[0]} bytes")
        return length, self._get(offset + 8, np.uint8, length[0])

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if count > MOST_ELEMENTS:
            raise WeightsError(f"an array claims {count} elements")
        types = [GGUFValueType.ARRAY, kind]
        if kind == GGUFValueType.STRING:
            values, end = self._strings(start, count)
            return end - orig_offs, [values], [0], types
        dtype = self.gguf_scalar_to_np.get(kind)
        if dtype is None:
            raise WeightsError("arrays of arrays are not supported")
        numbers = self._get(start, dtype, count)
        return 12 + numbers.nbytes, [numbers.tolist()], [0], types

    def _strings(self, offset: int, count: int) -> tuple[list[str] | None, int]:
        """An array of strings and where it ends; None in place of a long one that nobody asked for."""
        self._require(offset, 8 * count)
        view = memoryview(self.data)
        length_at = _LENGTH.unpack_from
        is_wanted = self._with_tokens or count <= LONG_STRING_ARRAY
        strings: list[str] = []
        for _ in range(count):
            (length,) = length_at(view, offset)
            start = offset + 8
            offset = start + length
            if offset > len(view):
                raise WeightsError(f"it ends at byte {len(view)}, inside a list of {count} strings")
            if is_wanted:
                strings.append(str(view[start:offset], "utf-8"))
        return (strings if is_wanted else None), offset

    def _build_tensors(self, start_offs: int, fields: Sequence[Any]) -> None:
        for field in fields:
            self._check_tensor(int(start_offs), field)
        super()._build_tensors(int(start_offs), fields)

    def _check_tensor(self, start: int, field: Any) -> None:
        dims, raw_type, offset = [int(n) for n in field.parts[3]], int(field.parts[4][0]), int(field.parts[5][0])
        try:
            kind = GGMLQuantizationType(raw_type)
        except ValueError:
            raise WeightsError(f"tensor {field.name!r} has the unknown type {raw_type}") from None
        if not 1 <= len(dims) <= MOST_DIMENSIONS or 0 in dims:
            raise WeightsError(f"tensor {field.name!r} has the shape {dims[:8]}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if dims[0] % block:
            raise WeightsError(f"tensor {field.name!r} has rows of {dims[0]}, which {kind.name} can't divide into blocks of {block}")
        num_bytes = math.prod(dims) // block * block_bytes
        if offset % int(self.alignment):
            raise WeightsError(f"tensor {field.name!r} starts at {offset}, which is not aligned to {self.alignment}")
        if start + offset + num_bytes > len(self.data):
            raise WeightsError(f"tensor {field.name!r} needs {num_bytes} bytes at {start + offset}, but the file ends at {len(self.data)}")


def _is_left_out(field: Any) -> bool:
    return len(field.types) == 2 and field.parts[field.data[0]] is None


def _value(field: Any) -> Any:
    """A field as a plain Python value."""
    part = field.parts[field.data[0]]
    if field.types[0] == GGUFValueType.ARRAY:
        return part
    if field.types[0] == GGUFValueType.STRING:
        return str(part.tobytes(), "utf-8")
    return part.tolist()[0]


def _tensor(tensor: Any) -> GGUFTensor:
    return GGUFTensor(tensor.name, tuple(reversed([int(n) for n in tensor.shape])), tensor.tensor_type, tensor.data)


def _reason(error: BaseException) -> str:
    """An error in words, without the path that an OSError carries."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__
