"""Keeps this folder out of an ordinary run, and mends four things in Triton's interpreter that would fail right kernels.

TRITON_INTERPRET is read when a kernel is defined, so the tests here run in a process of their own, which `test_interpreter.py` in the
folder above starts.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """The interpreter keeps a scalar in an array of one element and calls int() on it, which NumPy 2.4 no longer does; loop bounds
        read from memory would fail. This asks for the element instead."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index

    _convert_float = interpreter._convert_float

    def _convert_rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """The interpreter cuts float32 down to bfloat16 and to 8 bits; the hardware rounds to the nearest, ties to even, as this does. On
        the way back from bfloat16 it loses subnormal numbers."""
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        if source != tl.float32 or target != tl.bfloat16:
            return _convert_float(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = _convert_rounded

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _dot_wide(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter multiplies the bit patterns of bfloat16 as whole numbers; the hardware multiplies exactly into float32."""
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return _create_dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = _dot_wide

    _binary_op = interpreter.InterpreterBuilder.binary_op

    def _binary_wide(self: Any, a: Any, b: Any, operation: Any) -> Any:
        """The interpreter adds and multiplies the bit patterns of bfloat16 as whole numbers, and knows no constant of that type."""
        if a.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply):
            return _binary_op(self, a, b, operation)
        wide = _binary_op(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), operation)
        return self.cast_impl(wide, tl.bfloat16)

    interpreter.InterpreterBuilder.binary_op = _binary_wide
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
