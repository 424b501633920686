"""What a request wants to know of its own prompt, beside new tokens or instead of them: log-probabilities, or one vector.

Stdlib only; carried unchanged from the API to the runner, as `SamplingParams` is. A request that only reads has max_tokens 0: it ends
with "length" once its prompt is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pool = Literal["", "last", "mean", "cls"]


@dataclass(frozen=True, slots=True)
class Read:
    """first: the logprob of each prompt id at positions first ... end is reported, given the ids before it; at least 1, 0 for none.
    num_top: how many of the likeliest ids beside each, 0 ... 20. pool: the vector that the final hidden states give, after the last
    norm: of the last id, their mean, or of the first id; "" for none.

    Positions that are read are computed, never found in the prefix cache: with `first` the hit ends before position first - 1, with
    "mean" and "cls" there is none.
    """

    first: int = 0
    num_top: int = 0
    pool: Pool = ""

    def check(self, prompt_len: int) -> None:
        """Raises: ValueError naming what is wrong."""
        if not 0 <= self.first <= prompt_len:
            raise ValueError(f"a prompt of {prompt_len} ids can't be read from position {self.first}")
        if not 0 <= self.num_top <= 20:
            raise ValueError("between 0 and 20 alternatives can be read")
        if self.pool not in ("", "last", "mean", "cls"):
            raise ValueError("pool must be last, mean or cls")
        if not (self.first or self.pool):
            raise ValueError("there is nothing to read")
