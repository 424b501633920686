"""What may come in: the checks of a request against this scheduler's limits, and the count of those that wait for their first slice.

Refuses at once what could never run, so that nothing can block the queue for ever. No lists of requests here. Used by `scheduler`.
"""

from __future__ import annotations

from service.errors import ContextLengthError, OverloadedError, RequestError
from service.scheduling.sequence import Request
from service.scheduling.tables import BlockTables


class Intake:
    """max_context: prompt and output of one sequence, in tokens. max_gang: sequences that one step can hold. max_step: tokens of all
    sequences of a gang, where a step must compute them together."""

    def __init__(
        self, tables: BlockTables, *, max_context: int, max_gang: int, max_requests: int, max_tokens: int, max_step: int | None = None
    ) -> None:
        self.tables = tables
        self.max_context = max_context
        self.max_gang = max_gang
        self.max_step = max_step
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_tokens = 0

    def enter(self, request: Request) -> None:
        """Counts a request that waits. A prompt longer than max_tokens may wait alone. Raises: OverloadedError."""
        tokens = request.num_prompt_tokens
        if self.num_requests >= self.max_requests:
            raise OverloadedError(f"{self.num_requests} requests are waiting already; try again later", retry_after_s=1)
        if self.num_tokens and self.num_tokens + tokens > self.max_tokens:
            raise OverloadedError(f"{self.num_tokens} prompt tokens are waiting already; try again later", retry_after_s=1)
        self.num_requests += 1
        self.num_tokens += tokens

    def leave(self, request: Request) -> None:
        """It has its first slice, or has ended without one."""
        self.num_requests -= 1
        self.num_tokens -= request.num_prompt_tokens

    def check_request(self, request: Request) -> None:
        """Raises: RequestError for what is malformed or needs more sequences at once than there can be."""
        if not 1 <= len(request.prompts) <= 2 or not all(request.prompts):
            raise RequestError("a request needs a prompt of at least one token, or two with guidance", param="prompt")
        if request.num_choices < 1:
            raise RequestError("n must be at least 1", param="n")
        if request.sampling.max_tokens < (0 if request.read else 1):
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if request.read:
            try:
                request.read.check(len(request.prompts[0]))
            except ValueError as error:
                raise RequestError(str(error)) from None
        if len(request.prompts) > self.max_gang:
            raise RequestError("guidance needs two sequences in one step, and this server runs one at a time")

    def max_new_tokens(self, request: Request) -> int:
        """How many ids could be drawn if the request had the pool to itself. The last one is never computed: it needs no place.

        Raises: ContextLengthError when the prompt does not fit, or leaves no room for an id where one is wanted.
        """
        longest, total = max(map(len, request.prompts)), request.num_prompt_tokens
        if longest + min(request.sampling.max_tokens, 1) > self.max_context:
            left = ", of which at least one is left for the answer" if request.sampling.max_tokens else ""
            raise ContextLengthError(f"the prompt has {longest} tokens; the context is {self.max_context}{left}")
        if self.max_step is not None and total > self.max_step:
            raise ContextLengthError(f"the prompt has {total} tokens, and this server must compute it in one step of {self.max_step}")
        if not self._has_room(request, 0):
            raise ContextLengthError(f"the prompt has {longest} tokens, which is more than the K/V cache of this server holds")
        high = self.max_context - longest
        low = min(high, 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._has_room(request, middle - 1) else (low, middle - 1)
        return low

    def _has_room(self, request: Request, num_new: int) -> bool:
        """Can every prompt be in the pool with so many computed ids behind it, and be computed again after a preemption?"""
        lengths = [len(prompt) + num_new for prompt in request.prompts]
        if self.max_step is not None and sum(lengths) > self.max_step:
            return False
        return sum(sum(self.tables.peak_blocks(length)) for length in lengths) <= self.tables.pool.num_blocks
