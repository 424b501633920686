"""What kernels would be compiled for: every launch recorded instead of run, by the key that Triton itself looks it up by.

The key holds constants, types, which numbers are one or divisible by 16, which pointers are aligned, warps and stages. Outputs are zeros.
Called by tests of warm-up and of shape buckets; needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Key = tuple[str, str, str]
_BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_ZEROS = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like}


class _Zeros(TorchFunctionMode):
    """What no kernel fills must be something that can be looked up by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ZEROS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def recorded_keys() -> Iterator[set[Key]]:
    """(kernel, what its arguments are specialised on, options) of every launch inside. Mutates: Triton's launching, until the end."""
    keys: set[Key] = set()
    binders: dict[int, Any] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if id(kernel) not in binders:
            binders[id(kernel)] = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
        _, specialization, options = binders[id(kernel)](*args, **kwargs)
        keys.add((kernel.__name__, str(specialization), str(options)))

    launch = JITFunction.run
    JITFunction.run = run
    try:
        with _Zeros():
            yield keys
    finally:
        JITFunction.run = launch
