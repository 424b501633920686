"""The one road of every chat-like request: prompt, grammar, submission, and a parser per choice. Chat, Responses and Messages share it.

Knows no HTTP and no form of answer: what comes back are the pieces of a `Generation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from service.api.backend import Backend, Caller
from service.api.generation import Generation
from service.api.schema_chat import ChatRequest
from service.codec.prompt import Codec


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat that runs. model: its canonical name. warnings: what was ignored, clamped or truncated beyond what the body said."""

    model: str
    codec: Codec
    generation: Generation
    warnings: list[str] = field(default_factory=list)


async def converse(backend: Backend, wanted: ChatRequest, caller: Caller, request_id: str) -> Dialogue:
    """Raises: RequestError and its kinds, OverloadedError, UnavailableError; nothing is left running then."""
    model = backend.choose(wanted.model)
    codec = backend.codecs[model]
    prompt = await encode_prompt(backend, model, wanted)
    return Dialogue(model, codec, backend.submit(request_id, model, [prompt], wanted, caller))


async def encode_prompt(backend: Backend, model: str, wanted: ChatRequest) -> list[int]:
    """The ids of the conversation, as `converse` sends them; for the routes that only count. Raises: RequestError, OverloadedError."""
    codec = backend.codecs[model]
    messages = [message.as_template_input() for message in wanted.messages]
    return await backend.encode(model, lambda: codec.encode_chat(messages), sum(map(_num_chars, messages)))


def _num_chars(message: dict[str, Any]) -> int:
    content = message.get("content", "")
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
