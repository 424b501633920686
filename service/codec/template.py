"""A model's chat template: messages in, marked text out, in jinja2's immutable sandbox and within a bound on its output.

The template comes from the model's files and never from a client. Knows no ids. Called by prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.codec.special import MARKERS
from service.errors import RequestError, StartupError

MOST_OUTPUT_CHARS = 1 << 26
_ESCAPED = re.compile(f"[^\\x00-\\x7e{''.join(MARKERS)}]")


class ChatTemplate:
    """One compiled template. tokens: what it may name, such as bos_token and eos_token, as texts."""

    def __init__(self, source: str, tokens: Mapping[str, str], *, most_chars: int = MOST_OUTPUT_CHARS) -> None:
        """Raises: StartupError when the source is no template."""
        self.source = source
        self._most_chars = most_chars
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        environment.globals.update(tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise StartupError(f"the model's chat template is no valid template: {error}") from error

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text of a conversation, markers and all.

        Raises: RequestError (param messages) with the template's own words when it refuses, or when it writes too much.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**variables, "messages": messages}):
                pieces.append(piece)
                size += len(piece)
                if size > self._most_chars:
                    raise RequestError(f"the model's chat template writes more than {self._most_chars} characters", param="messages")
        except _RefusalError as error:
            raise RequestError(_unmarked(str(error)), param="messages") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            message = f"the model's chat template can't write these messages: {_unmarked(str(error))}"
            raise RequestError(message, param="messages") from error
        except (RecursionError, MemoryError) as error:
            raise RequestError("the model's chat template needs too much memory for these messages", param="messages") from error
        return "".join(pieces)


class _RefusalError(jinja2.TemplateError):
    """What a template raises on purpose."""


class _GenerationTag(Extension):
    """{% generation %} marks what an assistant wrote, for training; in serving its body is just written."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise _RefusalError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """JSON as templates expect it: HTML's letters as they are. Markers stay themselves even where everything else is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _unmarked(text: str) -> str:
    return "".join(char for char in text if char not in MARKERS)
