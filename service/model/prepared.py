"""Weights that an earlier start has rotated, quantised and packed: a file for each model, which later starts map.

A file is taken only where its key says that today's code would make the same of today's checkpoint; else the weights are made anew, and
written over it. Nothing here may fail a start: what goes wrong is logged. Called by the runner's loader; `transformer` asks a `Shelf`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from gguf import quants
from torch import Tensor

from kernels import ops
from kernels.cpu.packed import PackedStrips, strips_of
from kernels.ops import GroupedWeight, Int8Weight, Weight
from service.checkpoint import Checkpoint, find_checkpoint
from service.model.config import ModelConfig
from service.model.weights import WeightSource, open_weights

log = logging.getLogger("braid.prepared")

SUFFIX = ".prepared"
_PART = ".part"
_MAGIC = b"braidpw1"
_HEAD = struct.Struct("<8sQ32s")  # the magic, and length and SHA-256 of the JSON behind it
_PAGE, _LINE = 4096, 64  # where the first tensor begins, and every one: the kernels read whole cache lines
_POPULATE_READ = 22  # Linux 5.14: MADV_POPULATE_READ, which Python's mmap has no name for
_LEAST_BYTES = 16 * 2**20  # of weights; less is prepared in a moment
_CALM_S = 1.0  # a file that was changed later than that could change again and keep its time stamp
_ABANDONED_S = 3600.0
_LOCK_S = 60.0
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model's prepared weights lie, the key that they must have, and how many bytes all files of that folder may have."""

    path: Path
    key: str
    most_bytes: int


class Shelf:
    """One model's weights by name: those of an earlier start, or those that this one makes of what `open_source` opens."""

    def __init__(self, find_place: Callable[[], Place], open_source: Callable[[], WeightSource]) -> None:
        """Raises: OSError where `find_place` does."""
        self.open_source = open_source
        self._find_place = find_place
        self._place = find_place()
        self._found = _read(self._place)
        self._made: dict[str, Weight] = {}

    @property
    def is_filled(self) -> bool:
        """By an earlier start: then nothing has to be read or made."""
        return self._found is not None

    def __contains__(self, name: str) -> bool:
        return self._found is not None and name in self._found

    def get(self, name: str, make: Callable[[], Weight]) -> Weight:
        """The weight of that name; makes it where it is not there."""
        if self._found is not None:
            return self._found[name]
        self._made[name] = weight = make()
        return weight

    def keep(self) -> None:
        """Writes what was made for the next start, and forgets it. Little, and what a changed checkpoint may be mixed into, is not kept."""
        made, self._made = self._made, {}
        try:
            if sum(tensor.nbytes for weight in made.values() for tensor in _encode(weight)[1]) < _LEAST_BYTES:
                return
            if self._find_place() != self._place:
                raise OSError("the checkpoint has changed since")
            _keep(self._place, dict(sorted(made.items())))  # layers are made side by side: the file depends on no race of theirs
        except Exception as error:
            log.info("prepared weights are not kept for the next start: %s", error)


def open_shelf(path: Path, config: ModelConfig, form: str, folder: Path, most_bytes: int) -> Shelf | None:
    """For the checkpoint at `path`, whose config is given as the checkpoint has it, held as `form` says. None where that can't be: a
    checkpoint that can't be read, or was changed just now."""
    checkpoint = find_checkpoint(path)
    try:
        return Shelf(lambda: _place_of(checkpoint, config, form, folder, most_bytes), lambda: open_weights(path, config))
    except OSError as error:
        log.info("prepared weights are neither looked for nor kept: %s", error)
        return None


# --- which file, and its key ------------------------------------------------------------------------------------------------------


def _place_of(checkpoint: Checkpoint, config: ModelConfig, form: str, folder: Path, most_bytes: int) -> Place:
    """Raises: OSError."""
    files = [checkpoint.path]
    if checkpoint.kind == "folder":
        files = [*checkpoint.path.glob("*.safetensors"), *checkpoint.path.glob("*.safetensors.index.json"), checkpoint.path / "config.json"]
    stamps = [(path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns) for path in sorted(files) for found in (path.stat(),)]
    if time.time() - max(max(stamp[2:]) for stamp in stamps) / 1e9 < _CALM_S:
        raise OSError("the checkpoint was changed just now")
    facts = (stamps, config, form, _code_digest(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    whose = hashlib.sha256(f"{checkpoint.path.resolve()} {form}".encode()).hexdigest()[:16]
    return Place(folder / f"{checkpoint.path.stem}-{whose}{SUFFIX}", hashlib.sha256(repr(facts).encode()).hexdigest(), most_bytes)


def _code_digest() -> str:
    """Of everything that has a say in what the weights become, so that nobody has to raise a number: 2 ms."""
    model, kernels = Path(__file__).parent, Path(ops.__file__).parent
    places = ((model, "*.py"), (kernels, "*.py"), (kernels / "linear", "*.py"), (kernels / "cpu", "*.py"), (kernels / "cpu", "_braid_cpu*"))
    digest = hashlib.sha256(Path(quants.__file__).read_bytes())
    for folder, pattern in places:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the file ---------------------------------------------------------------------------------------------------------------------
# Head, JSON, and from the next page on the tensors, each on a cache line. JSON: the key, the bytes of all tensors, and by name how a weight
# is held and [dtype, shape, first byte] of its tensors.


def _read(place: Place) -> dict[str, Weight] | None:
    """The weights as views of the mapped file; None where there is none, or not that of this key."""
    try:
        with place.path.open("rb") as file:
            header, start = _read_header(file)
            if header["key"] != place.key:
                log.info("%s was prepared from other files or by other code; its weights are made anew", place.path.name)
                return None
            # Private: pages are shared with everybody until somebody writes, which nobody does.
            mapping = mmap.mmap(file.fileno(), start + header["bytes"], access=mmap.ACCESS_COPY)
        _populate(mapping)
        data = torch.frombuffer(mapping, dtype=torch.uint8, offset=start)
        found = {name: _decode(told, data) for name, told in header["weights"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, struct.error) as error:
        log.warning("%s can't be used (%s); its weights are made anew", place.path.name, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(place.path)  # those used last are the last to go
    return found


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The JSON, and where the tensors begin. Raises: ValueError, KeyError or struct.error where it or the file is not whole."""
    size = os.fstat(file.fileno()).st_size
    magic, length, digest = _HEAD.unpack(file.read(_HEAD.size))
    if magic != _MAGIC or length > size:
        raise ValueError("it does not begin as it should")
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("its head has another checksum")
    header: dict[str, Any] = json.loads(text)
    start = _up(_HEAD.size + length, _PAGE)
    if start + header["bytes"] != size:
        raise ValueError(f"it has {size} bytes and not {start + header['bytes']}")
    return header, start


def _populate(mapping: mmap.mmap) -> None:
    """Fills the page table at once: else the first step does it, fault by fault."""
    if sys.platform == "linux":
        for advice in (mmap.MADV_WILLNEED, _POPULATE_READ):
            with contextlib.suppress(OSError):  # an older system
                mapping.madvise(advice)


def _decode(told: dict[str, Any], data: Tensor) -> Weight:
    tensors = tuple(_view(data, *each) for each in told["tensors"])
    if told["kind"] == "dense":
        return tensors[0]
    out_features, in_features, bits, empty = told["out"], told["in"], told["bits"], data.new_empty(0)
    strips = strips_of(tensors, out_features, in_features, bits)
    if told["kind"] == "int8":
        return Int8Weight(out_features, in_features, empty.to(torch.int8), tensors[1][:out_features], strips)
    return GroupedWeight(out_features, in_features, bits, empty, empty.half(), empty.half(), strips)


def _view(data: Tensor, dtype: str, shape: list[int], start: int) -> Tensor:
    kind = _DTYPES[dtype]
    return data.narrow(0, start, math.prod(shape) * kind.itemsize).view(kind).view(shape)


def _encode(weight: Weight) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """How a weight is held, and the tensors that hold it. Raises: ValueError for a form that no file has."""
    if isinstance(weight, Tensor):
        return {"kind": "dense"}, (weight,)
    if not isinstance(weight.packed, PackedStrips):
        raise ValueError("they are not packed as strips")
    kind, bits = ("grouped", weight.bits) if isinstance(weight, GroupedWeight) else ("int8", 0)
    return {"kind": kind, "out": weight.out_features, "in": weight.in_features, "bits": bits}, weight.packed.tensors


def _lay_out(key: str, weights: dict[str, Weight]) -> tuple[bytes, list[tuple[int, Tensor]], int]:
    """What goes before the tensors, each tensor with its first byte in the file, and the file's size."""
    told, placed, end = dict[str, Any](), list[tuple[int, Tensor]](), 0
    for name, weight in weights.items():
        told[name], tensors = _encode(weight)
        told[name]["tensors"] = []
        for tensor in tensors:
            start = _up(end, _LINE)
            told[name]["tensors"].append((str(tensor.dtype), list(tensor.shape), start))
            placed.append((start, tensor))
            end = start + tensor.nbytes
    text = json.dumps({"key": key, "bytes": end, "weights": told}).encode()
    head = _HEAD.pack(_MAGIC, len(text), hashlib.sha256(text).digest()) + text
    first = _up(len(head), _PAGE)
    return head, [(first + start, tensor) for start, tensor in placed], first + end


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --- keeping it -------------------------------------------------------------------------------------------------------------------


def _keep(place: Place, weights: dict[str, Weight]) -> None:
    """Writes beside the file and renames, so that nobody ever reads half of one. Raises: OSError, ValueError, or Timeout, which is one."""
    # Only a first start needs it, and asyncio comes with it.
    from filelock import FileLock

    began = time.monotonic()
    head, tensors, size = _lay_out(place.key, weights)
    folder = place.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=_LOCK_S):
        if _has_key(place):  # another server was faster
            return
        _make_room(place, size)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=place.path.name, suffix=_PART, delete=False) as file:
            try:
                file.write(head)
                for start, tensor in tensors:
                    file.seek(start)
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, place.path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    log.info("%s: %.0f MiB kept for the next start, written in %.1f s", place.path.name, size / 2**20, time.monotonic() - began)


def _has_key(place: Place) -> bool:
    try:
        with place.path.open("rb") as file:
            return bool(_read_header(file)[0]["key"] == place.key)
    except (OSError, ValueError, KeyError, struct.error):
        return False


def _make_room(place: Place, size: int) -> None:
    """Removes files left half written, and those not used for the longest time until the new one fits. Raises: OSError when it can't."""
    folder = place.path.parent
    for part in folder.glob(f"*{_PART}"):
        if time.time() - part.stat().st_mtime > _ABANDONED_S:
            part.unlink(missing_ok=True)
    others = sorted((path for path in folder.glob(f"*{SUFFIX}") if path != place.path), key=lambda path: path.stat().st_mtime)
    left = place.most_bytes - size
    if left < 0:
        raise OSError(f"they have {size >> 20} MiB, more than the {place.most_bytes >> 20} MiB of --max-prepared")
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise OSError(f"they have {size >> 20} MiB and the disk has {free >> 20} MiB left")
    for path in reversed(others):
        left -= path.stat().st_size
        if left < 0:
            path.unlink(missing_ok=True)
