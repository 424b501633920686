"""The output items of a response as they grow: messages, reasoning and calls, and the events that tell of each step.

Knows nothing of the response around them and no HTTP. Called by `responses_shape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from service.api.responses_context import new_id, output_text
from service.codec.reply import CallDelta

# A type of event and its own fields; the number comes when it is told.
News = tuple[str, dict[str, Any]]
Ending = Literal["completed", "incomplete"]


class Part:
    """An output item with one content part: a message, or reasoning."""

    kind = "message"
    delta_type = "response.output_text"

    def __init__(self, index: int) -> None:
        self.id = new_id(self.kind)
        self._index = index
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> Iterable[News]:
        yield "response.output_item.added", {"output_index": self._index, "item": self.body("in_progress", has_part=False)}
        yield "response.content_part.added", {**self._place(), "part": self._part("", [])}

    def delta(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> News:
        self._texts.append(text)
        self._logprobs.extend(logprobs)
        return f"{self.delta_type}.delta", {**self._place(), "delta": text, "logprobs": list(logprobs)}

    def closing(self, status: Ending) -> Iterable[News]:
        text = "".join(self._texts)
        yield f"{self.delta_type}.done", {**self._place(), "text": text, "logprobs": self._logprobs}
        yield "response.content_part.done", {**self._place(), "part": self._part(text, self._logprobs)}
        yield "response.output_item.done", {"output_index": self._index, "item": self.body(status)}

    def body(self, status: str, *, has_part: bool = True) -> dict[str, Any]:
        content = [self._part("".join(self._texts), self._logprobs)] if has_part else []
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index, "content_index": 0}

    def _part(self, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return output_text(text, logprobs)


class ReasoningPart(Part):
    kind = "reasoning"
    delta_type = "response.reasoning_text"

    def delta(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> News:
        return _without_logprobs(super().delta(text))

    def closing(self, status: Ending) -> Iterable[News]:
        return map(_without_logprobs, super().closing(status))

    def body(self, status: str, *, has_part: bool = True) -> dict[str, Any]:
        content = [self._part("".join(self._texts), ())] if has_part else []
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def _part(self, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


def _without_logprobs(news: News) -> News:
    kind, fields = news
    return kind, {name: value for name, value in fields.items() if name != "logprobs"}


class Call:
    """An output item that is a call of a function or of a custom tool."""

    def __init__(self, index: int, first: CallDelta) -> None:
        self.kind = "custom_tool_call" if first.kind == "custom" else "function_call"
        self.id = new_id(self.kind)
        self.number = first.index
        self._index = index
        self._call_id = first.id or ""
        self._name = first.name or ""
        self._field = "input" if first.kind == "custom" else "arguments"
        self._delta_type = "response.custom_tool_call_input" if first.kind == "custom" else "response.function_call_arguments"
        self._texts: list[str] = []

    def opening(self) -> Iterable[News]:
        yield "response.output_item.added", {"output_index": self._index, "item": self.body("in_progress")}

    def delta(self, text: str) -> News:
        self._texts.append(text)
        return f"{self._delta_type}.delta", {**self._place(), "delta": text}

    def closing(self, status: Ending) -> Iterable[News]:
        name = {"name": self._name} if self._field == "arguments" else {}
        yield f"{self._delta_type}.done", {**self._place(), **name, self._field: "".join(self._texts)}
        yield "response.output_item.done", {"output_index": self._index, "item": self.body(status)}

    def body(self, status: str) -> dict[str, Any]:
        text = "".join(self._texts)
        return {"id": self.id, "type": self.kind, "call_id": self._call_id, "name": self._name, self._field: text, "status": status}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}


class Output:
    """The items of one response: what a piece brings goes to the open item, or closes it and opens the next."""

    def __init__(self) -> None:
        self._done: list[dict[str, Any]] = []
        self._open: Part | Call | None = None

    def items(self, status: str) -> list[dict[str, Any]]:
        """status: of the item that is still open."""
        return [*self._done, self._open.body(status)] if self._open is not None else list(self._done)

    @property
    def is_in_text(self) -> bool:
        return self._open is not None and self._open.kind == Part.kind

    def goes_on(self, delta: CallDelta) -> bool:
        """Does it belong to the call that is open?"""
        return isinstance(self._open, Call) and self._open.number == delta.index

    def text(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterable[News]:
        part, news = self._part(Part)
        yield from news
        yield part.delta(text, logprobs)

    def reasoning(self, text: str) -> Iterable[News]:
        part, news = self._part(ReasoningPart)
        yield from news
        yield part.delta(text)

    def call(self, delta: CallDelta) -> Iterable[News]:
        call = self._open
        if not isinstance(call, Call) or not self.goes_on(delta):
            yield from self.close("completed")
            self._open = call = Call(len(self._done), delta)
            yield from call.opening()
        if delta.arguments:
            yield call.delta(delta.arguments)

    def close(self, status: Ending) -> Iterable[News]:
        if self._open is not None:
            yield from self._open.closing(status)
            self._done.append(self._open.body(status))
            self._open = None

    def _part(self, kind: type[Part]) -> tuple[Part, list[News]]:
        if isinstance(self._open, Part) and self._open.kind == kind.kind:
            return self._open, []
        news = list(self.close("completed"))
        self._open = part = kind(len(self._done))
        return part, [*news, *part.opening()]
