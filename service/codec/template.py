"""A model's chat template: messages in, marked text out, in jinja2's immutable sandbox and within a bound on its output.

The template comes from the model's files and never from a client. Knows no ids. Called by prompt.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.codec.special import MARKERS
from service.errors import RequestError, StartupError

MOST_OUTPUT_CHARS = 1 << 26
# Of the thread's own time. A template that is linear in its messages needs a hundredth of it for the longest prompts.
MOST_SECONDS = 3.0
_OPERATIONS_PER_LOOK = 512
_MOST_STRING = 4096
# What a request never sets through chat_template_kwargs, whatever the template reads.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"})
# Variables of so many templates that clients set them for every model.
_COMMON = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
PROBE = "kilowattepoch"  # a word that no template holds
_IS_NONE = re.compile(r"content['\"]?\]? +is +none")
_ESCAPED = re.compile(f"[^\\x00-\\x7e{''.join(MARKERS)}]")


class ChatTemplate:
    """One compiled template. tokens: what it may name, such as bos_token and eos_token, as texts."""

    def __init__(self, source: str, tokens: Mapping[str, str], *, most_chars: int = MOST_OUTPUT_CHARS) -> None:
        """Raises: StartupError when the source is no template."""
        self.source = source
        self._most_chars = most_chars
        environment = self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        environment.globals.update(tokens)
        try:
            self._template = environment.from_string(source)
            read = meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise StartupError(f"the model's chat template is no valid template: {error}") from error

        self.variables = frozenset(name for name in read - RESERVED - environment.globals.keys() if not name.startswith("_"))
        # Where an assistant message without text has to have content none, or else its calls are not written.
        self.wants_none = bool(_IS_NONE.search(source))
        self.knows_calls = "tool_calls" in source

    def knows(self, role: str, **variables: Any) -> bool:
        """Does it write what it is given: a message of this role (that is not the user's), or what holds PROBE among the variables?"""
        messages = [{"role": "user", "content": "x"}]
        if role != "user":
            messages.insert(0, {"role": role, "content": PROBE})
        try:
            return PROBE in self.render(messages, {"add_generation_prompt": True, **variables})
        except RequestError:
            return False

    def checked_variables(self, given: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
        """What a request sets of the template's variables.

        Raises: RequestError (param chat_template_kwargs.NAME) for a name that it does not read and for a value that is no scalar.
        """
        checked: dict[str, str | int | float | bool] = {}
        for name, value in given.items():
            param = f"chat_template_kwargs.{name}"[:200]
            if name not in self.variables | _COMMON:
                allowed = ", ".join(sorted(self.variables | _COMMON))
                raise RequestError(f"{param} is not allowed; the model's chat template takes {allowed}", param=param)
            if value is None:
                continue
            if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > _MOST_STRING):
                raise RequestError(f"{param} must be a string of at most {_MOST_STRING} characters, a number or a boolean", param=param)
            checked[name] = value
        return checked

    def effort_variables(self, effort: str | None) -> dict[str, str | bool]:
        """What a reasoning_effort means to the template: the nearest effort that it knows, and whether to reason at all."""
        if effort is None:
            return {}
        named = effort if effort in ("low", "medium", "high") or f'"{effort}"' in self.source or f"'{effort}'" in self.source else None
        effort_word = named or {"none": "low", "minimal": "low"}.get(effort, "high")
        does = effort != "none"
        return {"reasoning_effort": effort_word, "enable_thinking": does, "thinking": does}

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text of a conversation, markers and all.

        Raises: RequestError (param messages) with the template's own words when it refuses, or when it writes too much.
        """
        pieces: list[str] = []
        size = 0
        self._environment.start_clock()
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


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with an end to what a template may spend: every attribute, item and call is counted, and no loop does without."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._clock = threading.local()

    def start_clock(self) -> None:
        """For the render that follows in this thread."""
        self._clock.deadline = time.thread_time() + MOST_SECONDS
        self._clock.num_left = _OPERATIONS_PER_LOOK

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._look()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._look()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return super().call(context, obj, *args, **kwargs)

    def _look(self) -> None:
        clock = self._clock
        clock.num_left -= 1
        if clock.num_left < 0:
            clock.num_left = _OPERATIONS_PER_LOOK
            if time.thread_time() > clock.deadline:
                raise _RefusalError(f"the model's chat template works on these messages for more than {MOST_SECONDS:g} s")


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
