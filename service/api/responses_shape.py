"""A response as it grows: pieces of a generation into output items, and the events that tell of each step. Whole answers are the same
machine, without its events.

Knows no HTTP and no engine. `Answer` in `sse` says what is asked of it. Called by the Responses routes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from service.api.choice import Piece, Token
from service.api.generation import Generation
from service.api.logprobs import chat_entries
from service.api.responses_input import rename
from service.api.responses_items import News, Output
from service.api.responses_schema import FlatFunction, FlatTool, ResponsesRequest
from service.api.sse import event
from service.codec.tokenizer import Tokenizer
from service.errors import BraidError


class ResponseAnswer:
    """One response. head: the fields that stay equal. on_end: called once, when it is over, with the response's final JSON and items;
    not for one that failed before anything of it was told."""

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        has_logprobs: bool,
        on_end: Callable[[ResponseAnswer], None] | None = None,
    ) -> None:
        self.id: str = head["id"]
        self.status = "queued" if head["background"] else "in_progress"
        self._head = head
        self._generation = generation
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._on_end = on_end
        self._output = Output()
        self._num_told = 0
        self._held: list[Token] = []
        self._blank = ""
        self._finish: str | None = None
        self._error: dict[str, str] | None = None
        self._completed_at: int | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        incomplete = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._head,
            "status": self.status,
            "completed_at": self._completed_at,
            "error": self._error,
            "incomplete_details": incomplete,
            "output": self.items(),
            "usage": _usage(self._generation.usage()) if self.is_over else None,
        }

    def items(self) -> list[dict[str, Any]]:
        """A finished item in the output of a response that broke off is completed; the one that it broke off in is not."""
        return self._output.items("in_progress" if not self.is_over else "incomplete")

    # Streamed: each of these gives the bytes of events.

    def queued(self) -> bytes:
        """Begins a response in the background."""
        return self._tell([("response.created", {"response": self.body()}), ("response.queued", {"response": self.body()})])

    def opening(self) -> bytes:
        created = [] if self._num_told else [("response.created", {"response": self.body()})]
        self.status = "in_progress"
        return self._tell([*created, ("response.in_progress", {"response": self.body()})])

    def chunk(self, piece: Piece) -> bytes:
        return self._tell(self._take(piece))

    def closing(self) -> bytes:
        news = list(self._close())
        return self._tell([*news, self._end()])

    def failure(self, error: BraidError) -> bytes:
        """An event for readers of events, and the response's own last word."""
        rename(error)
        self.status = "failed"
        self._error = {"code": _error_code(error), "message": error.message}
        fields = {"code": error.code or error.type, "message": error.message, "param": error.param}
        return self._tell([("error", fields), self._end()])

    def cancelled(self) -> bytes:
        """Ends a response that nobody waits for any more; OpenAI has no event of that name, so it is an incomplete one."""
        self.status = "cancelled"
        return self._tell([self._end()])

    # Whole.

    def add(self, piece: Piece) -> None:
        for _ in self._take(piece):
            pass

    def whole(self) -> bytes:
        for _ in self._close():
            pass
        self._end()
        return msgspec.json.encode(self.body())

    def _take(self, piece: Piece) -> Iterable[News]:
        # The rest of a call that is open was written before anything else that came together with it.
        rest = list(itertools.takewhile(self._output.goes_on, piece.calls))
        for delta in rest:
            yield from self._output.call(delta)
        if piece.reasoning:
            yield from self._apart(self._output.reasoning(piece.reasoning))
        # Tokens without text, as those of a mark between reasoning and text, wait for it: no item begins without a text.
        self._held.extend(piece.tokens if self._has_logprobs and not piece.reasoning else ())
        if piece.text:
            yield from self._text(piece.text)
        for delta in piece.calls[len(rest) :]:
            yield from self._apart(self._output.call(delta))
        self._finish = piece.finish or self._finish

    def _text(self, text: str) -> Iterable[News]:
        """A new message begins with its first visible character: what models put between two calls is none."""
        self._blank += text
        if self._output.is_in_text or not self._blank.isspace():
            text, self._blank = self._blank, ""
            yield from self._output.text(text, self._released())

    def _apart(self, news: Iterable[News]) -> Iterable[News]:
        """What is no text. Mutates: the blanks and tokens before it, which are dropped."""
        self._blank = ""
        self._held.clear()
        return news

    def _released(self) -> list[dict[str, Any]]:
        entries = chat_entries(self._tokenizer, self._held)
        self._held.clear()
        return entries

    def _close(self) -> Iterable[News]:
        is_cut = self._finish == "length"
        if not self._output.items("in_progress"):
            yield from self._output.text(self._blank, self._released())  # clients look for a message
        yield from self._output.close("incomplete" if is_cut else "completed")
        self.status = "incomplete" if is_cut else "completed"

    def _end(self) -> News:
        """Mutates: the response, which is over."""
        if self.status == "completed":
            self._completed_at = int(time.time())
        last = {"completed": "response.completed", "failed": "response.failed"}.get(self.status, "response.incomplete")
        if self._on_end is not None:
            self._on_end(self)
        return last, {"response": self.body()}

    def _tell(self, news: Iterable[News]) -> bytes:
        return b"".join(self._numbered(kind, fields) for kind, fields in news)

    def _numbered(self, kind: str, fields: dict[str, Any]) -> bytes:
        number = self._num_told
        self._num_told += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    """Chat's usage in the names of this API."""
    cached = chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": chat["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": chat["total_tokens"],
    }


def _error_code(error: BraidError) -> str:
    """One of OpenAI's codes for a response that failed."""
    return (
        "rate_limit_exceeded"
        if error.status == 429
        else "invalid_prompt"
        if 400 <= error.status < 500 and error.status != 408
        else "server_error"
    )


def head(wanted: ResponsesRequest, response_id: str, model: str, defaults: dict[str, float], warnings: Sequence[str]) -> dict[str, Any]:
    """What a response says of its request. defaults: the model's own temperature and top_p."""
    given = wanted.model_dump(by_alias=True, exclude_none=True, include=_ECHOED)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "instructions": None,
        "max_output_tokens": None,
        "previous_response_id": None,
        "metadata": {},
        "tool_choice": "auto",
        "top_logprobs": 0,
        **defaults,
        **given,
        # There is one tier.
        "service_tier": "default",
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
        "tools": [_echo(tool) for tool in wanted.tools],
        **({"warnings": list(warnings)} if warnings else {}),
    }


_ECHOED = {
    "background",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
}


def _echo(tool: FlatTool) -> dict[str, Any]:
    """OpenAI's clients expect parameters and strict in every function."""
    given: dict[str, Any] = tool.model_dump(exclude_none=True)
    return {"parameters": None, "strict": False, **given} if isinstance(tool, FlatFunction) else given
