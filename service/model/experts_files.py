"""One tensor of a checkpoint's file, and the experts of a layer as one matrix: one expert's rows below the other's.

Files have a tensor for each expert, or all of a layer in one of three dimensions. Here they are described, not read. Called by `weights`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.ops import GroupedWeight
from service.checkpoint import GGUFTensor
from service.errors import WeightsError

_HF_ONE = re.compile(r"(model\.layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_HF_ALL = re.compile(r"(model\.layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")
_HF_ROUTER = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.gate\.weight")
_HF_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""What Mixtral calls them."""
_GGUF_ALL = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_GGUF_SHARED_ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor as its file describes it; read gives its contents, dense. read_grouped: as the numbers in the file, where they are of
    `GROUPED_TYPES`. read_part: dimension (0 or 1), start and end to that part of it, where a file can be read in parts."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    read_grouped: Callable[[], GroupedWeight] | None = None
    read_part: Callable[[int, int, int], Tensor] | None = None


def join_experts(found: Mapping[str, FileTensor], count: int) -> dict[str, FileTensor]:
    """The tensors of safetensors files with every layer's `count` experts as matrices, called as a dense layer's are.

    Raises: WeightsError for a layer that lacks some of its experts, or has others, or experts of several shapes or types.
    """
    joined: dict[str, FileTensor] = {}
    several: dict[str, dict[int, tuple[str, FileTensor]]] = {}
    for name, tensor in found.items():
        if one := _HF_ONE.fullmatch(name):
            layer, _, index, part = one.groups()
            several.setdefault(f"{layer}mlp.{_HF_PARTS.get(part, part)}.weight", {})[int(index)] = name, tensor
        elif (whole := _HF_ALL.fullmatch(name)) and len(tensor.shape) == 3:
            layer, part = whole.groups()
            halves = {"down_proj": (0, 1)} if part == "down_proj" else {"gate_proj": (0, 2), "up_proj": (1, 2)}
            joined |= {f"{layer}mlp.{its}.weight": _flat(tensor, *half) for its, half in halves.items()}
        elif router := _HF_ROUTER.fullmatch(name):
            joined[f"{router[1]}mlp.gate.weight"] = tensor
        else:
            joined[name] = tensor
    return joined | {name: _below(experts, count) for name, experts in several.items()}


def _below(experts: Mapping[int, tuple[str, FileTensor]], count: int) -> FileTensor:
    name, first = next(iter(experts.values()))
    if strange := sorted(set(experts) ^ set(range(count))):
        told = name.replace(f".experts.{next(iter(experts))}.", f".experts.{strange[0]}.")
        raise WeightsError(f"the checkpoint {'holds' if strange[0] in experts else 'lacks'} {told}; its config says {count} experts")
    parts = [experts[index][1] for index in range(count)]
    for name, part in experts.values():
        if (part.shape, part.dtype) != (first.shape, first.dtype) or len(part.shape) != 2:
            raise WeightsError(f"{name} is {part.dtype} of shape {list(part.shape)}, another expert {first.dtype} of {list(first.shape)}")
    return FileTensor((count * first.shape[0], first.shape[1]), first.dtype, lambda: _read_below(parts))


def _read_below(parts: Sequence[FileTensor]) -> Tensor:
    first = parts[0].read()
    matrix = first.new_empty((len(parts), *first.shape))
    for place, part in zip(matrix, parts, strict=True):  # into their places: a list of them all would be the matrix once more
        place.copy_(part.read())
    return matrix.flatten(0, 1)


def _flat(tensor: FileTensor, which: int, of: int) -> FileTensor:
    """Part `which` of `of` equal ones of every expert's rows, as a matrix."""
    count, rows, columns = tensor.shape
    height = rows // of

    def read() -> Tensor:
        start = which * height
        part = tensor.read_part(1, start, start + height) if tensor.read_part is not None else tensor.read()[:, start : start + height]
        return part.reshape(-1, columns)

    return FileTensor((count * height, columns), tensor.dtype, read)


def flat_experts(tensors: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    """The tensors of a GGUF file with every layer's experts as matrices, called as a dense layer's are."""
    flat = {}
    for name, tensor in tensors.items():
        if (experts := _GGUF_ALL.fullmatch(name)) and len(tensor.shape) == 3:
            flat[f"{experts[1]}.weight"] = replace(tensor, shape=(math.prod(tensor.shape[:2]), tensor.shape[2]))
        elif _GGUF_SHARED_ROUTER.fullmatch(name) and len(tensor.shape) == 1:
            flat[name] = replace(tensor, shape=(1, *tensor.shape))
        else:
            flat[name] = tensor
    return flat
