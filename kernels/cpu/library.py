"""Finds and loads the compiled CPU kernels, and mirrors their C structs (braid_cpu.h) for ctypes.

No tensor and no arithmetic here. Called by `kernels.cpu.ops`, which does without when there is no library.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "scales", "sums")),
        *((name, c_int64) for name in ("out_features", "in_features", "group_bits")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "qkv_bias", "q_norm", "k_norm", "rotary", "out_norm", "down_norm")),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "head_width", "width", "gelu")),
        ("eps", c_float),
    )


class KV(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("key_block", "key_head", "key_place", "value_block", "value_head", "value_place")),
        *((name, c_int64) for name in ("scale_block", "scale_head", "block_size", "num_kv_heads", "head_width", "bits", "key_number")),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("num_sequences", c_int64),
        ("grid_start", c_void_p),
    )


class Spec(ctypes.Structure):
    _fields_ = (
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int64) for name in ("window", "sink", "columns", "row_radius", "column_radius")),
    )


class Draw(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("temperature", "top_p", "min_p", "top_k", "seeds", "positions", "mask"))


_P, _N = c_void_p, c_int64
_ARGUMENTS = {
    "braid_qkv": (_P, _P, _P, _P, _P, _P, c_int32, _P, _P, _N),
    "braid_attend": (_P, _P, _P, _P, _P, _P, _N, _N),
    "braid_layers": (_P, _N, _P, _P, _P, _P, _P, _P, _P, _N),
    "braid_out_mlp": (_P, _P, _P, _P, _P, _N),
    "braid_linear": (_P, _P, _P, _P, _N),
    "braid_embed": (_P, _P, _P, _P, _N),
    "braid_rms_norm": (_P, _P, _P, _P, c_float, _P, _P, _N, _N),
    "braid_kv_write": (_P, _P, _P, _P, _P, _P, _P, _N),
    "braid_gated": (_P, _P, _P, _N, _N, c_int32),
    "braid_sample": (_P, _P, _P, _P, _N, _N),
    "braid_draw": (_P, _P, _P, _P, _P, _N),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library with its functions' types set; None, and a line in the log, when it was not built or can't be loaded."""
    found = sorted(Path(__file__).parent.glob("_braid_cpu*"))
    if not found:
        log.warning("the compiled CPU kernels are missing; everything runs on plain PyTorch, several times slower")
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        log.warning("the compiled CPU kernels can't be loaded (%s); everything runs on plain PyTorch, several times slower", error)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int32
    library.braid_create.argtypes, library.braid_create.restype = (c_char_p, c_int32, c_int32), c_void_p
    library.braid_destroy.argtypes, library.braid_destroy.restype = (c_void_p,), None
    library.braid_isa.argtypes, library.braid_isa.restype = (c_void_p,), c_char_p
    return library
