"""How much is in flight, and whether there is room for more: counted on the client's side, so that a refusal costs no round trip.

Plain numbers; time is an argument. Used by the engine client.
"""

from __future__ import annotations

from service.errors import OverloadedError

MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0
_NEWEST_WEIGHT = 0.2


class Admission:
    """Requests and tokens (prompt and generated) in flight, and how long a request usually takes."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.num_tokens = 0
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tokens: dict[str, int] = {}
        self._entered: dict[str, float] = {}
        self._mean_s: float | None = None

    @property
    def num_requests(self) -> int:
        return len(self._tokens)

    def check(self, prompt_len: int) -> None:
        """Raises: OverloadedError, with the time after which a place is likely. A request alone is never too large."""
        if self.num_requests >= self._max_requests:
            raise OverloadedError(f"{self.num_requests} requests are in flight, which is the limit.", retry_after_s=self._retry_after_s())
        if self._tokens and self.num_tokens + prompt_len > self._max_tokens:
            raise OverloadedError(
                f"{self.num_tokens} tokens are in flight; {prompt_len} more would pass the limit of {self._max_tokens}.",
                retry_after_s=self._retry_after_s(),
            )

    def enter(self, request_id: str, prompt_len: int, now: float) -> None:
        self._tokens[request_id] = prompt_len
        self._entered[request_id] = now
        self.num_tokens += prompt_len

    def grow(self, request_id: str, num_tokens: int) -> None:
        self._tokens[request_id] += num_tokens
        self.num_tokens += num_tokens

    def leave(self, request_id: str, now: float) -> None:
        self.num_tokens -= self._tokens.pop(request_id)
        seconds = now - self._entered.pop(request_id)
        mean_s = self._mean_s if self._mean_s is not None else seconds
        self._mean_s = mean_s + _NEWEST_WEIGHT * (seconds - mean_s)

    def _retry_after_s(self) -> float:
        """With n requests in flight that take t seconds each, one ends every t / n seconds; a quarter of them makes real room."""
        usual_s = self._mean_s if self._mean_s is not None else MIN_RETRY_S
        return min(max(usual_s / 4, MIN_RETRY_S), MAX_RETRY_S)
