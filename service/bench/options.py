"""What a run of `braid bench serve` was asked for, as one plain value. Made by `cli` from flags and by bench/load.py; read by all here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.errors import StartupError

DATASETS = ("random", "shared-prefix", "multi-turn", "pictures")
CHAT, COMPLETIONS, PICTURES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
GOALS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Options:
    """Names as in `vllm bench serve`. Lengths in tokens, think_time in seconds (a mean), goodput in milliseconds by name of GOALS.

    request_rate: arrivals a second; inf is a closed loop. max_concurrency None: no bound. endpoint "": the dataset's usual one.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = ""
    model: str = ""
    api_key: str = ""
    dataset_name: str = "random"
    num_prompts: int = 100
    random_input_len: int = 139
    random_output_len: int = 128
    shared_prefix_len: int = 512
    num_turns: int = 4
    think_time: float = 0.0
    partial_images: int = 2
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    warmups: int = 1
    seed: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draws = self.dataset_name == "pictures"
        if self.dataset_name not in DATASETS:
            raise StartupError(f"there is no dataset {self.dataset_name!r}; there are {', '.join(DATASETS)}")
        if self.endpoint and self.endpoint not in ((PICTURES,) if draws else (CHAT, COMPLETIONS)):
            known = PICTURES if draws else f"{CHAT} or {COMPLETIONS}"
            raise StartupError(f"--endpoint of --dataset-name {self.dataset_name} is {known}")
        if draws and "tpot" in self.goodput:
            raise StartupError("pictures have no tpot; give --goodput ttft (the first preview) or e2el (the whole picture)")

    @property
    def route(self) -> str:
        return self.endpoint or (PICTURES if self.dataset_name == "pictures" else CHAT)

    def told(self) -> dict[str, Any]:
        """For a file of figures: all but the key, and inf as vLLM writes it."""
        known = {**self.__dict__, "endpoint": self.route, "request_rate": told_rate(self.request_rate), "goodput": dict(self.goodput)}
        return {name: value for name, value in known.items() if name != "api_key"}


def told_rate(rate: float) -> float | str:
    """JSON has no infinity; vLLM writes "inf"."""
    return rate if math.isfinite(rate) else "inf"
