"""A checkpoint's tensors under our names, checked against the config and read one by one: GGUF and safetensors.

Nothing in a file is believed before it is compared with what the config asks for, and nothing in it is run: no pickle, no
`torch.load`, no code that ships with a model. Called by the runner's loader, which hands the source to `build_transformer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.ops import GROUP, GroupedWeight
from service.checkpoint import GGUFTensor, find_checkpoint, open_gguf, read_json
from service.errors import WeightsError
from service.model.config import ROUTERS, ModelConfig, expected_shapes
from service.model.encoder_config import ENCODER_IGNORED, ENCODER_NAMES, ENCODER_PREFIX, EncoderConfig, encoder_shapes
from service.model.experts_files import FileTensor, flat_experts, join_experts
from service.model.families import (
    GGUF_INTERLEAVED,
    GGUF_NAMES,
    GGUF_POST_NORM_NAMES,
    GGUF_ROPE_FACTORS,
    HF_BESIDE_TEXT,
    HF_NAMES,
    HF_POST_NORM_NAMES,
    HF_TEXT_PREFIXES,
)

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
GROUPED_TYPES = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Bits of the types whose blocks are what `GroupedWeight` holds."""
SAFETENSORS_TYPES = ("F32", "F16", "BF16")
_MOST_NAMED = 5
# gguf.quants works on 16 rows at a time, and on rows of a thousand numbers spends its time in Python: 16 rows handed over as one took
# SmolLM2's 272 tensors from 0.65 s to 0.18 s (AMD Zen 5, one core).
_ROWS_AS_ONE = 16


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Checked tensors by our name. Each `get` reads and dequantises anew; nothing is kept."""

    tensors: Mapping[str, FileTensor]

    def get(self, name: str) -> Tensor:
        """float32, float16 or bfloat16, in memory of its own, on the CPU. Raises: WeightsError for an unknown name."""
        if name not in self.tensors:
            raise WeightsError(f"the checkpoint has no {name}")
        return self.tensors[name].read()

    def get_part(self, name: str, dim: int, start: int, end: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) start ... end - 1 of a tensor, in memory of their own. A file that can't be read in parts is read
        whole for it. Raises: WeightsError for an unknown name."""
        read_part = self.tensors[name].read_part if name in self.tensors else None
        if read_part is not None:
            return read_part(dim, start, end)
        return self.get(name).narrow(dim, start, end - start).clone(memory_format=torch.contiguous_format)

    def bits_of(self, name: str) -> int:
        """Of each number, where the file has them in groups; else 0."""
        found = self.tensors.get(name)
        return GROUPED_TYPES[found.dtype] if found is not None and found.read_grouped is not None else 0

    def layers_have_groups(self, config: ModelConfig) -> bool:
        """Are all matrices of the layers in groups already?"""
        names = [name for name, shape in expected_shapes(config).items() if len(shape) == 2 and name.startswith("layers.")]
        return all(self.bits_of(name) for name in names if name.rpartition(".")[2] not in ROUTERS)

    def get_grouped(self, name: str) -> GroupedWeight:
        """The numbers of the file as they are, unpacked. Raises: WeightsError where the file has none in groups."""
        read = self.tensors[name].read_grouped if name in self.tensors else None
        if read is None:
            raise WeightsError(f"the checkpoint has no {name} in groups of {GROUP}")
        return read()


def open_weights(path: Path, config: ModelConfig) -> WeightSource:
    """Opens a GGUF file, or a folder of safetensors, and checks every name, shape and type before any content is read.

    Raises: WeightsError for a damaged file, and for tensors that are missing, unknown, misshapen or of an unsupported type.
    """
    checkpoint = find_checkpoint(path)
    shapes = expected_shapes(config)
    if checkpoint.kind == "gguf":
        names = GGUF_NAMES | (GGUF_POST_NORM_NAMES if config.has_post_norms else {})
        return _match(_gguf(checkpoint.path, config), names, shapes, GGUF_TYPES)
    names, found = HF_NAMES | (HF_POST_NORM_NAMES if config.has_post_norms else {}), _safetensors(checkpoint.path)
    if config.experts is not None:
        found = join_experts(found, config.experts.count)
    if not config.norm_offset:
        return _match(found, names, shapes, SAFETENSORS_TYPES)
    source = _match(_of_text(found), names, shapes, SAFETENSORS_TYPES)
    return WeightSource(
        {name: _offset(tensor, config.norm_offset) if "norm" in name else tensor for name, tensor in source.tensors.items()}
    )


def _of_text(found: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """The text model's tensors out of those of a model that also reads pictures."""
    kept = {}
    for name, tensor in found.items():
        if not name.startswith(HF_BESIDE_TEXT):
            prefix = next((each for each in HF_TEXT_PREFIXES if name.startswith(each)), "")
            kept[HF_TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return kept


def _offset(tensor: FileTensor, offset: float) -> FileTensor:
    return replace(tensor, read=lambda: tensor.read().float() + offset, read_part=None)


def open_encoder_weights(path: Path, config: EncoderConfig) -> WeightSource:
    """The same for an encoder's folder, whose heads, if it has any, are left out."""
    tensors = _safetensors(find_checkpoint(path).path)
    bare = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in bare.items() if not name.startswith(ENCODER_IGNORED)}
    return _match(found, ENCODER_NAMES, encoder_shapes(config), SAFETENSORS_TYPES)


def _match(
    found: Mapping[str, FileTensor], names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], types: tuple[str, ...]
) -> WeightSource:
    file_names = {name: _file_name(name, names) for name in shapes}
    if missing := [each for each in file_names.values() if each not in found]:
        raise WeightsError(f"the checkpoint lacks {_list(missing)}")
    known = {*file_names.values(), names.get("head")}  # a checkpoint may store the head beside the embedding it is tied to
    if extra := [each for each in found if each not in known and not _is_ignorable(each)]:
        raise WeightsError(f"the checkpoint holds tensors that a model of this config does not have: {_list(extra)}")
    for name, shape in shapes.items():
        tensor = found[file_names[name]]
        if tensor.shape != shape:
            raise WeightsError(f"{file_names[name]} has shape {list(tensor.shape)}; the config asks for {list(shape)}")
        if tensor.dtype not in types:
            raise WeightsError(f"{file_names[name]} is of type {tensor.dtype}; supported are {', '.join(types)}")
    return WeightSource({name: found[file_name] for name, file_name in file_names.items()})


def _file_name(name: str, names: Mapping[str, str]) -> str:
    if not name.startswith("layers."):
        return names[name]
    _, index, part = name.split(".")
    return names["layers.{}." + part].format(index)


def _is_ignorable(file_name: str) -> bool:
    """Tables that follow from the config; rotary factors were read with it."""
    return file_name == GGUF_ROPE_FACTORS or file_name.endswith("rotary_emb.inv_freq")


def _list(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- GGUF -------------------------------------------------------------------------------------------------------------------------


def _gguf(path: Path, config: ModelConfig) -> dict[str, FileTensor]:
    gguf = open_gguf(path, with_tokens=False)
    heads: dict[str, int] = {}  # of the tensors whose rows must be put back in order
    if gguf.metadata.get("general.architecture") in GGUF_INTERLEAVED:
        for index in range(len(config.layers)):
            heads |= {f"blk.{index}.attn_q.{part}": config.num_heads for part in ("weight", "bias")}
            heads |= {f"blk.{index}.attn_k.{part}": config.num_kv_heads for part in ("weight", "bias")}
    return {name: _gguf_tensor(tensor, heads.get(name)) for name, tensor in flat_experts(gguf.tensors).items()}


def _gguf_tensor(tensor: GGUFTensor, num_heads: int | None) -> FileTensor:
    def ordered(rows: Tensor) -> Tensor:
        return rows if num_heads is None else half_split_rows(rows, num_heads)

    def read_grouped() -> GroupedWeight:
        bits, *parts = groups_of_gguf(tensor)
        return GroupedWeight(tensor.shape[0], tensor.shape[1], bits, *map(ordered, parts))

    is_grouped = tensor.type.name in GROUPED_TYPES and len(tensor.shape) == 2
    return FileTensor(tensor.shape, tensor.type.name, lambda: ordered(dense_of_gguf(tensor)), read_grouped if is_grouped else None)


def groups_of_gguf(tensor: GGUFTensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Bits, values uint8 [out, in], scales and offsets float16 [out, in / 32] of a matrix in one of `GROUPED_TYPES`.

    Source: ggml's block_q4_0 (scale, 16 bytes: numbers 0-15 in the low nibbles, 16-31 in the high ones, 8 is zero), block_q4_1 (with
    the offset behind the scale) and block_q8_0 (scale, 32 signed bytes).
    """
    rows, columns = tensor.shape
    kind = tensor.type
    block_bytes = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}[kind]
    blocks = torch.from_numpy(np.array(tensor.data)).view(torch.uint8).reshape(rows, columns // GROUP, block_bytes)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == GGMLQuantizationType.Q8_0:
        return 8, (blocks[..., 2:] ^ 128).reshape(rows, columns), scales, scales * -128  # signed bytes + 128
    numbers = blocks[..., -GROUP // 2 :]
    values = torch.cat((numbers & 15, numbers >> 4), dim=-1).reshape(rows, columns)
    has_offset = kind == GGMLQuantizationType.Q4_1
    return 4, values, scales, blocks[..., 2:4].contiguous().view(torch.float16)[..., 0] if has_offset else scales * -8


def dense_of_gguf(tensor: GGUFTensor) -> Tensor:
    """A copy of the tensor: float32 for quantised types, else its own type. Shape as the file says, [out, in]."""
    name = tensor.type.name
    shape = tensor.shape
    if name in ("F32", "F16"):
        return torch.from_numpy(np.array(tensor.data)).reshape(shape)
    data = np.ascontiguousarray(tensor.data)
    if name == "BF16":
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16).reshape(shape)
    data = data.reshape(math.prod(shape[:-1]), -1)
    # Blocks are independent, so several rows may be handed over as one.
    merged = data.reshape(data.shape[0] // math.gcd(data.shape[0], _ROWS_AS_ONE), -1)
    return torch.from_numpy(dequantize(merged, tensor.type)).reshape(shape)


def half_split_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Puts rows (0, H/2, 1, H/2 + 1, ...) of each head back in order 0, 1, 2, ..., as a half-split rotary embedding wants them.

    rows [N * H, ...]. Source: the inverse of `permute` in llama.cpp's convert_hf_to_gguf.
    """
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# --- safetensors ------------------------------------------------------------------------------------------------------------------


def _safetensors(folder: Path) -> dict[str, FileTensor]:
    index = folder / "model.safetensors.index.json"
    found: dict[str, FileTensor] = {}
    for path in _shards(folder, index):
        for name, tensor in _open_safetensors(path).items():
            if name in found:
                raise WeightsError(f"{name} is in two files of the checkpoint")
            found[name] = tensor
    return found


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that hold the weights. Raises: WeightsError when there are none, or when it is unclear which."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise WeightsError(f"the folder has {len(files)} .safetensors files and neither model.safetensors nor {index.name}")
        return files
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(each, str) for each in names.values()):
        raise WeightsError(f"{index.name} has no weight_map of tensor names to file names")
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):  # an index must not lead out of its folder
            raise WeightsError(f"{index.name} names the file {name!r}, which is not a .safetensors file of its folder")
        if not (folder / name).is_file():
            raise WeightsError(f"{index.name} names the file {name}, which is missing")
    return [folder / name for name in shards]


def _open_safetensors(path: Path) -> dict[str, FileTensor]:
    """The library checks the header against the file's length: offsets, sizes, overlaps, duplicates."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        return {name: _safetensor(file, name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from error


def _safetensor(file: Any, name: str) -> FileTensor:
    def read() -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.clone()  # else it is the mapped file itself, which somebody may change

    def read_part(dim: int, start: int, end: int) -> Tensor:
        part: Tensor = piece[start:end] if dim == 0 else piece[:, start:end]
        return part.clone(memory_format=torch.contiguous_format)

    piece = file.get_slice(name)
    return FileTensor(tuple(piece.get_shape()), str(piece.get_dtype()), read, read_part=read_part)
