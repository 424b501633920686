"""How a request wants its tokens drawn: one frozen value, carried unchanged from the API to the sampler.

Stdlib only. Ranges are checked at the API and again by `check`, in front of the engine, because a bad number must never reach a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1, the other penalties 0: off.

    stop_ids end the sequence and are not part of its text (end-of-sequence ids are put here by the codec unless ignored); none of
    them is drawn before min_tokens. logit_bias: (token, bias) pairs. logprobs: how many alternatives to report beside each chosen
    token; 0 reports the chosen one alone, None nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check(self, vocab_size: int, least_tokens: int = 1) -> None:
        """least_tokens: of max_tokens; 0 where the prompt is read. Raises: ValueError naming the field, when a number is out of range or
        not finite."""
        ranges = (
            ("max_tokens", self.max_tokens, least_tokens, 2**31 - 1),
            ("temperature", self.temperature, 0, 2),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100),
            ("seed", self.seed, -(2**63), 2**63 - 1),
            ("min_tokens", self.min_tokens, 0, 2**31 - 1),
            ("logprobs", self.logprobs or 0, 0, 20),
        )
        for name, value, low, high in ranges:
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be between {low} and {high}")
        for token, bias in self.logit_bias:
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise ValueError("logit_bias values must be between -100 and 100")
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias names token {token}, which is not in the vocabulary of {vocab_size}")
        if any(not 0 <= token < vocab_size for token in self.stop_ids):
            raise ValueError(f"stop_token_ids must lie in the vocabulary of {vocab_size}")
