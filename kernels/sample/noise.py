"""The keyed noise that decides a draw: a counter-based hash of (seed, position, token), in whole numbers, equal on every device.

No tensors of logits and no policy here. Called by `reference`; a kernel that draws must compute the same integers.

In unsigned arithmetic that wraps around:
    key   = mix64(mix64(seed + 0x9E3779B97F4A7C15) + position)             64 bits; mix64 is SplitMix64's finaliser
    word  = mix32(mix32(token ^ (key mod 2**32)) + (key >> 32))            32 bits; mix32 is the "lowbias32" function
    u     = (word + 0.5) / 2**32                                           uniform, neither 0 nor 1
    noise = -log(-log1p(-u))                                               standard Gumbel
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW32 = 0xFFFFFFFF
MIX32 = (0x7FEB352D, 0x846CA68B)
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
GOLDEN64 = 0x9E3779B97F4A7C15
SERIES_BELOW = 1 / 32
"""Under this u the series to u**5 is exact to float32 (its next term is below 2**-27 of the sum); above it 1 - u loses nothing."""


def noise_words(seeds_R: Tensor, positions_R: Tensor, num_tokens: int) -> Tensor:
    """The 32-bit hash of (seed, position, token) for tokens 0 ... num_tokens - 1 as int64 [R, num_tokens] in [0, 2**32).

    seeds, positions int64 [R]. Source: Steele, Lea and Flood 2014, section 5 (the 64-bit mix); Wellons 2018, "Prospecting for hash
    functions" (the 32-bit mix).
    """
    key = _mix64(_mix64(seeds_R + _signed(GOLDEN64)) + positions_R)[:, None]
    tokens = torch.arange(num_tokens, device=seeds_R.device)
    return _mix32((_mix32(tokens ^ (key & LOW32)) + _shifted(key, 32)) & LOW32)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise float32, accurate in both tails, from 32-bit hashes held in int64.

    Written with log and a short series, not log1p, because a kernel has no log1p; the likeliest winner has u near 1 / V, where
    log(1 - u) alone would keep only a few bits.
    """
    u = (words.float() + 0.5) * 2.0**-32
    rest = ((LOW32 - words).float() + 0.5) * 2.0**-32
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -torch.log(torch.where(u < SERIES_BELOW, series, -torch.log(rest)))


def _mix32(x: Tensor) -> Tensor:
    """x int64 in [0, 2**32). Products wrap at 64 bits; the low 32 are right whatever the sign."""
    x = ((x ^ (x >> 16)) * MIX32[0]) & LOW32
    x = ((x ^ (x >> 15)) * MIX32[1]) & LOW32
    return x ^ (x >> 16)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MIX64[0])
    x = (x ^ _shifted(x, 27)) * _signed(MIX64[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros moved in, which int64's own shift does not do for negative numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - 2**64 if value >= 2**63 else value
