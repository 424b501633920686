"""Errors in the form that Anthropic's clients read, and the paths that speak it.

No other form is known here. Called by `errors`, which chooses the form by path, and by the event stream of `messages`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from service.errors import BraidError, ContextLengthError

_PATHS = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The fields of a chat request, which messages are translated into, by the names that their clients gave them.
_NAMES = (
    (re.compile(r"^tools\[(\d+)\]\.function\.parameters"), r"tools[\1].input_schema"),
    (re.compile(r"^tools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"^reasoning_effort\b"), "output_config.effort"),
    (re.compile(r"^chat_template_kwargs\.enable_thinking\b"), "thinking"),
    (re.compile(r"^max_completion_tokens\b"), "max_tokens"),
    (re.compile(r"^stop\b"), "stop_sequences"),
)


def is_messages_path(path: str) -> bool:
    return path == _PATHS or path.startswith(f"{_PATHS}/")


def messages_error(error: BraidError, request_id: str) -> bytes:
    """The body; `param` and `code` are additions that other servers leave out."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    # Agents look for these words to know that they have to shorten the conversation.
    start = "prompt is too long: " if isinstance(error, ContextLengthError) else ""
    param = renamed(error.param or "")
    message = error.message.replace(error.param, param) if error.param and error.param != param else error.message
    told: dict[str, Any] = {"type": _TYPES.get(error.status, usual), "message": start + message}
    told |= {key: value for key, value in (("param", param), ("code", error.code)) if value}
    return msgspec.json.encode({"type": "error", "error": told, "request_id": request_id})


def renamed(param: str) -> str:
    """A field of a chat request, or a text that begins with one, as the client knows it."""
    for pattern, name in _NAMES:
        param, num_found = pattern.subn(name, param)
        if num_found:
            break
    return param
