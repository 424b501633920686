"""A few PTX instructions in Python, so that what a kernel has as inline assembly is checked without a GPU, bit by bit.

Only what our kernels use, on 32-bit registers; anything else is an error. Called by `test_compile_quantised`.
Source: NVIDIA, Parallel Thread Execution ISA 8.7, sections 9.7 (instructions) and 9.7.8 (lop3: the table's bits, prmt).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

MASK = 0xFFFFFFFF


def run(asm: str, num_outputs: int, inputs: list[int]) -> list[int]:
    """The output registers ($0 ...) of the assembly for 32-bit inputs ($num_outputs ...)."""
    registers = {f"${num_outputs + index}": value for index, value in enumerate(inputs)}
    for line in asm.strip().strip("{}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, _, rest = line.strip().partition(" ")
            target, *operands = [operand.strip() for operand in rest.split(",")]
            registers[target] = INSTRUCTIONS[name](*(_value(operand, registers) for operand in operands)) & MASK
    return [registers[f"${index}"] for index in range(num_outputs)]


def _value(operand: str, registers: dict[str, int]) -> int:
    if re.fullmatch(r"0f[0-9A-F]{8}", operand):
        return int(operand[2:], 16)
    return registers[operand] if operand in registers else int(operand, 0)


def _lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> place & 1) << 2 | (b >> place & 1) << 1 | (c >> place & 1) for place in range(32))
    return sum((table >> index & 1) << place for place, index in enumerate(bits))


def _prmt(a: int, b: int, selector: int) -> int:
    both = (a | b << 32).to_bytes(8, "little")
    assert not selector & 0x8888, "the form that spreads a sign is not here"
    return int.from_bytes(bytes(both[selector >> 4 * place & 7] for place in range(4)), "little")


def _float(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def _bfloat16(value: float) -> int:
    """The float32 nearest to value, as bfloat16; every value here is one already, or the test would not notice a wrong rounding."""
    bits = _bits(value)
    assert not bits & 0xFFFF, "not a bfloat16"
    return bits >> 16


def _fma_pairs(a: int, b: int, c: int) -> int:
    halves = []
    for shift in (0, 16):
        x, y, z = (_float((register >> shift & 0xFFFF) << 16) for register in (a, b, c))
        halves.append(_bfloat16(x * y + z))
    return halves[0] | halves[1] << 16


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, count: a << count,
    "shr.u32": lambda a, count: a >> count,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "add.rn.f32": lambda a, b: _bits(_float(a) + _float(b)),
    "cvt.rn.bf16x2.f32": lambda high, low: _bfloat16(_float(high)) << 16 | _bfloat16(_float(low)),
    "fma.rn.bf16x2": _fma_pairs,
}
