"""The JSON of a Messages answer, whole and as Anthropic's stream events: blocks that open and close, the reason of the end, the usage.

Knows no request and no engine. `messages` hands it to `sse`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from pydantic_core import from_json

from service.api.choice import Piece
from service.api.generation import Generation
from service.api.messages_error import messages_error
from service.api.sse import event
from service.codec.reply import CallDelta
from service.errors import BraidError


class MessagesShape:
    """One answer. head: id and model. request_id: for errors that come in the middle."""

    def __init__(self, head: dict[str, Any], generation: Generation, request_id: str, warnings: list[str]) -> None:
        self._head = {**head, "type": "message", "role": "assistant"}
        self._generation = generation
        self._request_id = request_id
        self._extra = {"warnings": warnings} if warnings else {}
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._end: Piece | None = None

    def opening(self) -> bytes:
        """The message as it begins; how much of the prompt was cached is told at the end."""
        usage = {**_usage(self._generation.num_prompt_tokens, 0), "output_tokens": 0, "service_tier": "standard"}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage, **self._extra}
        return _event("message_start", message=message) + _event("ping")

    def chunk(self, piece: Piece) -> bytes:
        """The events of one piece; empty when there is nothing to tell."""
        return b"".join(self._take(piece))

    def closing(self) -> bytes:
        """The end of the open block and of the message."""
        end = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return b"".join(self._close()) + _event("message_delta", delta=end, usage=self._final_usage()) + _event("message_stop")

    def failure(self, error: BraidError) -> bytes:
        """An error event, which is the last one."""
        return b"event: error\ndata: " + messages_error(error, self._request_id) + b"\n\n"

    def add(self, piece: Piece) -> None:
        """Keeps a piece for `whole`. Mutates: the shape."""
        self._take(piece)

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        self._close()
        body = {
            **self._head,
            "content": [_finished(block) for block in self._blocks],
            "stop_reason": self._stop_reason(),
            "stop_sequence": self._stop_sequence(),
            "usage": {**self._final_usage(), "service_tier": "standard"},
            **self._extra,
        }
        return msgspec.json.encode(body)

    def _take(self, piece: Piece) -> list[bytes]:
        """Mutates: the blocks."""
        events: list[bytes] = []
        if piece.reasoning:
            events += self._more("thinking", "thinking", piece.reasoning)
        if piece.text:
            events += self._more("text", "text", piece.text)
        for call in piece.calls:
            events += self._call(call)
        if piece.finish is not None:
            self._end = piece
        return events

    def _more(self, kind: str, field: str, text: str) -> list[bytes]:
        events = []
        if not self._is_open or self._blocks[-1]["type"] != kind:
            block = {"type": kind, field: "", **({"signature": ""} if kind == "thinking" else {})}
            events = self._open(block)
        self._blocks[-1][field] += text
        return [*events, self._delta({"type": f"{kind}_delta", field: text})]

    def _call(self, call: CallDelta) -> list[bytes]:
        events = []
        if call.name is not None:
            name = (call.id or "").removeprefix("call_")
            events = self._open({"type": "tool_use", "id": f"toolu_{name}", "name": call.name, "input": {}})
            self._blocks[-1]["json"] = ""
        self._blocks[-1]["json"] += call.arguments
        return [*events, self._delta({"type": "input_json_delta", "partial_json": call.arguments})] if call.arguments else events

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        events = self._close()
        self._blocks.append(dict(block))
        self._is_open = True
        return [*events, _event("content_block_start", index=len(self._blocks) - 1, content_block=block)]

    def _close(self) -> list[bytes]:
        if not self._is_open:
            return []
        self._is_open = False
        events = []
        block = self._blocks[-1]
        if block["type"] == "thinking":
            # Clients send it back with the thinking and want it to be there; nobody here has to check it.
            block["signature"] = hashlib.sha256(block["thinking"].encode()).hexdigest()
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        return [*events, _event("content_block_stop", index=len(self._blocks) - 1)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _stop_reason(self) -> str:
        if self._end is None or self._end.finish == "length":
            return "max_tokens"
        if self._end.finish != "tool_calls" and self._stop_sequence() is not None:
            return "stop_sequence"  # also inside a call, which then must not be run
        return "tool_use" if any(block["type"] == "tool_use" for block in self._blocks) else "end_turn"

    def _stop_sequence(self) -> str | None:
        reason = self._end.stop_reason if self._end is not None else None
        return reason if isinstance(reason, str) else None

    def _final_usage(self) -> dict[str, int]:
        found: Any = self._generation.usage()
        usage = _usage(found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"])
        return {**usage, "output_tokens": found["completion_tokens"]}


def _event(kind: str, **fields: object) -> bytes:
    return event({"type": kind, **fields}, kind)


def _usage(prompt_tokens: int, cached_tokens: int) -> dict[str, int]:
    """The parts of the prompt add up."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
    }


def _finished(block: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as the object they spell; of a call that was cut short, what there is of it."""
    if block["type"] != "tool_use":
        return block
    arguments = block.pop("json")
    try:
        given = from_json(arguments, allow_partial=True)
    except ValueError:
        given = {}
    return {**block, "input": given if isinstance(given, dict) else {}}
