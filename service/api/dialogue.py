"""The one road of every chat-like request: prompt, grammar, submission, and a parser per choice. Chat, Responses and Messages share it.

Knows no HTTP and no form of answer: what comes back are the pieces of a `Generation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from service.api.backend import Backend, Caller, Terms
from service.api.choice import Echo, Reply
from service.api.constraint import rule_of
from service.api.easel import Codes, Errand
from service.api.generation import Generation
from service.api.schema_chat import ChatRequest
from service.api.strict import Warnings
from service.api.studio import Studio
from service.api.together import together
from service.codec.prompt import Codec
from service.errors import RequestError
from service.scheduling.reading import Read

# Of templates that can tell a model how much to reason; they may be set for any model, and may mean nothing to it.
EFFORT_VARIABLES = frozenset({"reasoning_effort", "enable_thinking", "thinking"})


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat that runs. model: its canonical name."""

    model: str
    codec: Codec
    generation: Generation


async def converse(studio: Studio, wanted: ChatRequest, caller: Caller, request_id: str, warnings: Warnings) -> Dialogue:
    """Mutates: warnings, about what is asked for and not done. Raises: RequestError and its kinds, OverloadedError, UnavailableError;
    nothing is left running then."""
    backend = studio.easel.backend
    errand = Errand.of(caller, wanted)
    model = choose_for(backend, wanted)
    codec = backend.codecs[model]
    _note_idle(codec, wanted, warnings)
    size = _check_size(backend, model, wanted)
    pictures = await _see_all(studio, model, wanted, errand) if wanted.needs_pictures else []
    prompt, terms = await backend.encode(model, lambda: _prepare(codec, wanted, pictures), size)
    if wanted.wants_pictures:
        terms = replace(terms, show=lambda codes: studio.show(model, codes, errand), marks=studio.easel.marks(model))
    return Dialogue(model, codec, backend.submit(request_id, model, [prompt], wanted, caller, terms))


def choose_for(backend: Backend, wanted: ChatRequest) -> str:
    """The model of a conversation: without a name the first that can have it. Raises: as `Backend.choose`."""
    return backend.choose(wanted.model, generates=True, draws=wanted.needs_pictures and wanted.model is None and backend.can_draw)


async def encode_prompt(backend: Backend, model: str, wanted: ChatRequest) -> list[int]:
    """The ids of the conversation, as `converse` sends them; for the routes that only count. Raises: RequestError, OverloadedError."""
    codec = backend.codecs[model]
    marks = codec.pictures
    if wanted.pictures and marks is None:
        raise _takes_no_pictures(model, wanted)
    # How many codes a picture has is known before it is seen.
    pictures = [(marks.first_code,) * marks.num_places for _ in wanted.pictures] if marks is not None else []
    return await backend.encode(model, lambda: _encode(codec, wanted, pictures), _check_size(backend, model, wanted))


async def _see_all(studio: Studio, model: str, wanted: ChatRequest, errand: Errand) -> list[Codes]:
    """The codes of all pictures, in order. Raises: RequestError naming the part."""
    if not studio.easel.backend.info(model).picture_pixels:
        raise _takes_no_pictures(model, wanted)
    if len(wanted.pictures) > studio.media.limits.max_count:
        text = f"a request may have {studio.media.limits.max_count} pictures, not {len(wanted.pictures)}"
        raise RequestError(text, param=next(iter(wanted.pictures)))
    return await together(studio.see(model, url, param, errand) for param, url in wanted.pictures.items())


def _takes_no_pictures(model: str, wanted: ChatRequest) -> RequestError:
    if wanted.pictures:
        return RequestError(
            f"the model {model} takes text only: a part must have type text", param=next(iter(wanted.pictures)), code="unsupported_model"
        )
    return RequestError(f"the model {model} writes text only", param="modalities", code="unsupported_model")


def _check_size(backend: Backend, model: str, wanted: ChatRequest) -> int:
    """How many characters there are to work on. Raises: ContextLengthError where the texts alone can't fit."""
    num_chars = sum(len(message.text()) for message in wanted.messages)
    backend.check_chars(model, num_chars, "messages")  # named first, where these alone are too long
    forms = [tool.parameters for tool in wanted.offered.tools] if wanted.offered is not None else []
    constraint = wanted.constraint
    others = [message.reasoning_content or message.reasoning or "" for message in wanted.messages]
    num_form_chars = len(msgspec.json.encode(forms)) if forms else 0
    # The model is told its tools, never shorter than this.
    backend.check_chars(model, num_chars + num_form_chars, "tools" if forms else "messages")
    return num_chars + sum(map(len, others)) + num_form_chars + len(msgspec.json.encode(constraint and constraint[1]))


def _prepare(codec: Codec, wanted: ChatRequest, pictures: Sequence[Codes]) -> tuple[list[int], Terms]:
    """Raises: RequestError."""
    prompt = _encode(codec, wanted, pictures)
    tools = wanted.offered
    begins_reasoning = codec.format.is_reasoning(prompt)
    rule = rule_of(wanted)
    if tools is not None:
        grammar = codec.format.grammar(tools, is_reasoning=begins_reasoning, text=rule)
    else:
        grammar = codec.format.after_reasoning(rule, is_reasoning=begins_reasoning) if rule else ""
    if grammar and wanted.wants_pictures:
        raise RequestError("modalities with image can't be combined with an answer that follows a grammar", param="modalities")
    reply = _reply(codec, wanted, begins_reasoning)
    read = None if wanted.prompt_logprobs is None else Read(first=1, num_top=wanted.prompt_logprobs)
    echo = Echo(wanted.messages[-1].text()) if wanted.echo and wanted.continues else None
    return prompt, Terms(grammar, _grammar_param(wanted) if grammar else None, [read] if read else (), reply, [echo] if echo else ())


def _encode(codec: Codec, wanted: ChatRequest, pictures: Sequence[Codes]) -> list[int]:
    messages: Sequence[dict[str, Any]] = [message.as_template_input() for message in wanted.messages]
    return codec.encode_chat(
        messages,
        add_generation_prompt=wanted.add_generation_prompt and not wanted.continues,
        continue_final_message=wanted.continues,
        tools=wanted.offered,
        template_kwargs=wanted.chat_template_kwargs,
        reasoning_effort=wanted.reasoning_effort,
        pictures=pictures,
    )


def _reply(codec: Codec, wanted: ChatRequest, begins_reasoning: bool) -> Reply:
    tools = wanted.offered
    marks = codec.format.shown(tools)
    shown = marks if wanted.skip_special_tokens else marks | codec.tokenizer.special.ids
    if codec.format.is_plain(tools) and not begins_reasoning:
        return Reply(shown=shown)
    return Reply(
        lambda: codec.format.parser(tools, is_reasoning=begins_reasoning),
        shown,
        is_reasoning=begins_reasoning,
        is_named=tools is not None and tools.is_named,
        has_text=tools is None or tools.mode != "required",
    )


def _grammar_param(wanted: ChatRequest) -> str:
    constraint = wanted.constraint
    return constraint[2] if constraint is not None else "functions" if wanted.is_legacy else "tools"


def _note_idle(codec: Codec, wanted: ChatRequest, warnings: Warnings) -> None:
    """What has no effect here. Mutates: warnings."""
    known = codec.template.variables if codec.template is not None else frozenset()
    if wanted.verbosity not in (None, "medium"):
        warnings.note("verbosity", "verbosity has no effect on this model")
    if wanted.reasoning_effort not in (None, "none") and not known & EFFORT_VARIABLES:
        warnings.note("reasoning_effort", "reasoning_effort has no effect on this model")
    for name in wanted.chat_template_kwargs:
        if name in EFFORT_VARIABLES - known:
            warnings.note(f"chat_template_kwargs.{name}", f"chat_template_kwargs.{name} has no effect on this model")
    if wanted.store:
        warnings.note("store", "store has no effect: chat completions are not kept")
    if wanted.moderation is not None:
        warnings.note("moderation", "moderation has no effect: no model here judges texts")
