"""Every launch the back end would make for a case, recorded instead of run, and compiled ahead of time for a GPU that need not be there.

So what is compiled is what the wrappers launch: their constants, tile sizes and warps. Called by `test_compile*`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels import resources

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint32: "*u32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one block may have. Source: CUDA C++ Programming Guide, table of technical specifications per compute capability."""
NEVER_SPILL = {"decode_kernel", "reduce_kernel", "kv_write_kernel", "norm_kernel"} | {
    f"{name}_kernel" for name in ("score", "threshold", "draw", "choose")
}
CHIPS = [pytest.param(90), pytest.param(80, marks=pytest.mark.long), pytest.param(100, marks=pytest.mark.long)]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with the arguments of one launch, by parameter name."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    launch_pdl: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel takes: bytes of shared memory, registers a thread, bytes of stack a thread (spilled registers)."""

    shared_bytes: int
    registers: int
    stack_bytes: int
    ptx: str = ""


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes through the kernels of a module; nothing is computed, so outputs are whatever memory held."""
    launches: list[Launch] = []
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, _Recorder(name, kernel, launches))
    call()
    return launches


class _Recorder:
    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, launch_pdl: bool = False, **kwargs: Any) -> None:
            names = [param.name for param in self.kernel.params]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            assert set(arguments) == set(names), "a launch must give every parameter"
            self.launches.append(Launch(self.name, self.kernel, arguments, num_warps, num_stages, launch_pdl))

        return launch


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles for sm_<capability>, specialised as a real launch would be (16-byte pointers, numbers divisible by 16, ones)."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, Tensor):
            signature[param.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "launch_pdl": launch.launch_pdl}
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(compiled.metadata.shared, registers, stack, compiled.asm["ptx"])


def assert_fits(launch: Launch, capability: int, detail: str = "") -> None:
    """Shared memory within the chip's, and what `resources.json` says."""
    compiled = compile_launch(launch, capability)
    key = " ".join(f"sm_{capability} {launch.name} {detail}".split()) + f" | {_variant(launch)}"
    assert compiled.shared_bytes <= SHARED_BYTES[capability], key
    found = {"registers": compiled.registers, "shared_bytes": compiled.shared_bytes, "spilled_bytes": compiled.stack_bytes}
    resources.check(key, found, never_spills=launch.name in NEVER_SPILL)


def _variant(launch: Launch) -> str:
    """What tells a compiled launch from others of its kernel: types, constants, which numbers are 1 or divisible by 16, warps, stages, and
    whether it is launched dependent."""
    types, constants, numbers = [], [], ""
    for param in launch.kernel.params:
        value = launch.arguments[param.name]
        if isinstance(value, Tensor):
            types.append(str(value.dtype).removeprefix("torch."))
        elif param.is_constexpr or value is None:
            constants.append(f"{param.name}={str(value).replace(' ', '').removeprefix('torch.')}")
        elif isinstance(value, int):
            numbers += "1" if value == 1 else "d" if value % 16 == 0 else "n"
    kinds, how = ",".join(dict.fromkeys(types)), f"{launch.num_warps} warps, {launch.num_stages} stages"
    return " ".join([kinds, *constants, *([numbers] if numbers else []), how + ", dependent" * launch.launch_pdl])


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])
