"""How much is in flight, and whether there is room for more: counted on the client's side, so that a refusal costs no round trip.

Plain numbers; time is an argument. Used by the engine client.
"""

from __future__ import annotations

from service.errors import OverloadedError, RequestError

MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0
_NEWEST_WEIGHT = 0.2


class Admission:
    """Choices and tokens (prompt and generated) in flight, and how long a request usually takes. max_requests bounds the choices, since
    each of a request's n choices takes the place of one; their prompt counts once."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.num_tokens = 0
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._num_choices = 0
        self._tokens: dict[str, int] = {}
        self._choices: dict[str, int] = {}
        self._entered: dict[str, float] = {}
        self._mean_s: float | None = None

    @property
    def num_requests(self) -> int:
        """The choices of a request count as one each."""
        return self._num_choices

    def check(self, prompt_len: int, num_choices: int = 1) -> None:
        """Raises: OverloadedError, with the time after which a place is likely; RequestError for what an idle server would refuse too."""
        self._check_alone(prompt_len, num_choices)
        if self._num_choices + num_choices > self._max_requests:
            raise OverloadedError(
                f"{self._num_choices} requests are in flight; {num_choices} more would pass the limit of {self._max_requests}.",
                retry_after_s=self._retry_after_s(),
            )
        if self.num_tokens + prompt_len > self._max_tokens:
            raise OverloadedError(
                f"{self.num_tokens} tokens are in flight; {prompt_len} more would pass the limit of {self._max_tokens}.",
                retry_after_s=self._retry_after_s(),
            )

    def _check_alone(self, prompt_len: int, num_choices: int) -> None:
        if prompt_len > self._max_tokens:
            raise RequestError(f"the prompt has {prompt_len} tokens; this server takes at most {self._max_tokens} at a time")
        if num_choices > self._max_requests:
            raise RequestError(f"this server takes at most {self._max_requests} choices at a time, not {num_choices}", param="n")

    def enter(self, request_id: str, prompt_len: int, now: float, num_choices: int = 1) -> None:
        self._tokens[request_id] = prompt_len
        self._choices[request_id] = num_choices
        self._num_choices += num_choices
        self._entered[request_id] = now
        self.num_tokens += prompt_len

    def grow(self, request_id: str, num_tokens: int) -> None:
        self._tokens[request_id] += num_tokens
        self.num_tokens += num_tokens

    def leave(self, request_id: str, now: float) -> None:
        self.num_tokens -= self._tokens.pop(request_id)
        self._num_choices -= self._choices.pop(request_id)
        seconds = now - self._entered.pop(request_id)
        mean_s = self._mean_s if self._mean_s is not None else seconds
        self._mean_s = mean_s + _NEWEST_WEIGHT * (seconds - mean_s)

    def _retry_after_s(self) -> float:
        """With n requests in flight that take t seconds each, one ends every t / n seconds; a quarter of them makes real room."""
        usual_s = self._mean_s if self._mean_s is not None else MIN_RETRY_S
        return min(max(usual_s / 4, MIN_RETRY_S), MAX_RETRY_S)
