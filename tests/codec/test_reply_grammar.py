"""Grammars of tool calls: whatever they admit is read as calls whose arguments fit, and what they must keep out stays out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from service.codec.grammar import schema_rule
from service.codec.prompt import load_codec
from service.codec.reply_format import ReplyFormat
from service.codec.tokenizer import Tokenizer
from service.codec.tools import Tool, ToolSet
from service.engine.constraint import compile_grammar, make_tokenizer
from service.engine.messages import Vocabulary
from service.errors import RequestError
from tests.codec.replies import BY_NAME, NOW, RUN, SCHEMA, THINK, byte_tokenizer, format_of, hear, offered

STRICT = Tool("get_weather", parameters=SCHEMA, is_strict=True)
REGEX = Tool("pick", kind="custom", syntax="regex", definition='[ab"]{2,5}')
LARK = Tool("cal", kind="custom", syntax="lark", definition='start: NUMBER "+" NUMBER\nNUMBER: /[0-9]{1,3}/')
ALL = (STRICT, NOW, RUN, REGEX, LARK)
ANSWER = {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"], "additionalProperties": False}


@cache
def byte_vocabulary() -> tuple[Tokenizer, LLTokenizer]:
    tokenizer = byte_tokenizer()
    return tokenizer, library_tokenizer(tokenizer)


def library_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    vocabulary = Vocabulary("m", tokenizer.pieces, sorted(tokenizer.special.ids), list(tokenizer.ends.eos_ids))
    return make_tokenizer(vocabulary, tokenizer.vocab_size)


def liked(tokenizer: Tokenizer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[V] which tokens end with something that closes, and which are plain letters and signs or several of them."""
    pieces = tokenizer.pieces
    closing = np.array([piece[-1:] in (b'"', b"}", b"]", b">", b"/", b"+") for piece in pieces])
    return closing, np.array([piece.isascii() and piece.decode("ascii").isprintable() for piece in pieces])


def walk(matcher: LLMatcher, tokenizer: Tokenizer, rng: random.Random, most: int = 1500) -> str | None:
    """A text that the grammar admits, drawn with a liking for what closes and ends; None when it got too long."""
    ids: list[int] = []
    eos = tokenizer.ends.eos_ids[0]
    closing, readable = liked(tokenizer)
    for _ in range(most):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")[: len(closing)].astype(bool)
        if allowed[eos] and rng.random() < 0.2:
            break
        wanted = [allowed & closing] if rng.random() < 0.4 else []
        choices = next(found for group in (*wanted, allowed & readable, allowed) if (found := np.flatnonzero(group)).size)
        token = int(choices[rng.randrange(choices.size)])
        if token == eos:
            break
        assert matcher.consume_token(token)
        ids.append(token)
        if matcher.is_stopped():
            break
    else:
        return None
    return tokenizer.decode(ids, skip_special=False)


def admits(form: ReplyFormat, grammar: str, text: str) -> bool:
    """Is it a whole answer? Control tokens are spelled in the text."""
    tokenizer, library = byte_vocabulary()
    matcher = compile_grammar(library, grammar)
    ids = [token for part in tokenizer.special.split(text) for token in ([part.id] if not isinstance(part, str) else part.encode())]
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


def check(name: str, arguments: str) -> None:
    """What each of ALL takes."""
    if name == STRICT.name:
        jsonschema.validate(json.loads(arguments), SCHEMA)
    elif name == NOW.name:
        assert json.loads(arguments) == {}
    elif name == REGEX.name:
        assert 2 <= len(arguments) <= 5
        assert set(arguments) <= set('ab"')
    elif name == LARK.name:
        assert all(part.isdigit() for part in arguments.split("+"))
        assert arguments.count("+") == 1


def variants() -> Iterator[tuple[ToolSet, str, bool]]:
    """(tools, rule of an answer in text, does it begin inside reasoning?)"""
    rule = schema_rule(ANSWER, "response_format")
    for mode in ("required", "auto"):
        for is_parallel in (True, False):
            for text in ("", rule):
                for is_reasoning in (False, True):
                    yield offered(*ALL, mode=mode, is_parallel=is_parallel), text, is_reasoning


@pytest.mark.parametrize("reasons", [False, True])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_what_a_grammar_admits_is_read_as_calls_that_fit(name: str, reasons: bool) -> None:
    form = format_of(name, marks=THINK if reasons else None)
    tokenizer, library = byte_vocabulary()
    rng = random.Random(name)
    num_calls = 0
    for tools, text, is_reasoning in variants():
        matcher = compile_grammar(library, form.grammar(tools, is_reasoning=is_reasoning, text=text))
        for _ in range(3):
            reply = walk(matcher.deep_copy(), tokenizer, rng)
            if reply is None:
                continue
            parser = form.parser(tools, is_reasoning=is_reasoning)
            heard = hear(parser, [reply])
            assert not parser.is_cut, reply
            for called, arguments in heard.calls:
                check(called, arguments)
            if tools.mode == "required":
                assert heard.calls, reply
                assert heard.text == "", reply
            if tools.is_single:
                assert len(heard.calls) <= 1
            if text and not heard.calls:
                jsonschema.validate(json.loads(heard.text), ANSWER)
            num_calls += len(heard.calls)
    assert num_calls > 20


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_strict_call_has_no_way_around_its_schema(name: str) -> None:
    """A call that breaks the schema, written in every way that the dialect is read in, is refused or is text."""
    form, dialect = format_of(name), BY_NAME[name]
    tools = offered(STRICT)
    grammar = form.grammar(tools)
    bad, good = '{"city": 5}', '{"city": "Oslo", "unit": "C"}'
    objects = [f'{{"name": "get_weather", "{key}": {bad}}}' for key in ("arguments", "parameters")]
    written = dialect.opening + dialect.before + "get_weather" + dialect.middle + "{}" + dialect.after + dialect.closing
    replies = [
        *objects,
        *(f"[{text}]" for text in objects),
        *(f"{trigger}{text}" for trigger in dialect.triggers for text in objects),
        *(f"{trigger}\n{text}" for trigger in dialect.triggers for text in objects),
        written.format(bad) if "{" not in written.replace("{}", "") else written.replace("{}", bad),
        "<function=get_weather><parameter=city>5</parameter></function>",
        "[TOOL_CALLS]get_weather[ARGS]" + bad,
        "<start_function_call>call:get_weather{city:5}",
    ]
    for reply in replies:
        for text in (reply, "I say: " + reply):
            if admits(form, grammar, text):
                assert hear(form.parser(tools), [text]).calls == []
    assert admits(form, grammar, written.replace("{}", good))
    assert admits(form, grammar, "Just an answer.")
    assert not admits(form, form.grammar(offered(STRICT, mode="required")), "Just an answer.")


def test_nothing_is_enforced_where_nothing_has_to_be() -> None:
    form = format_of("hermes", marks=THINK)
    assert form.grammar(offered(NOW, RUN)) == ""
    assert form.grammar(offered(NOW), text=schema_rule(ANSWER, "x")) != ""
    for tools in (offered(NOW, mode="required"), offered(NOW, STRICT), offered(REGEX), offered(LARK)):
        assert form.grammar(tools) != ""


def test_only_allowed_tools_are_called() -> None:
    form = format_of("hermes")
    grammar = form.grammar(ToolSet((NOW, STRICT), ("get",), "required"))
    call = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    assert admits(form, grammar, call.format("get", "{}"))
    assert admits(form, grammar, "\n".join([call.format("get", "{}")] * 3))
    assert not admits(form, grammar, call.format("get_weather", '{"city": "x", "unit": "C"}'))
    named = form.grammar(ToolSet((NOW, STRICT), ("get",), "required", is_named=True))
    assert not admits(form, named, "\n".join([call.format("get", "{}")] * 2))


def test_reasoning_is_free_and_comes_before_what_is_enforced() -> None:
    form = format_of("hermes", marks=THINK)
    grammar = form.after_reasoning(schema_rule(ANSWER, "response_format"))
    inside = form.after_reasoning(schema_rule(ANSWER, "response_format"), is_reasoning=True)
    assert admits(form, grammar, '{"z":1}')
    assert admits(form, grammar, '<think>\nOh { <tool_call> "\n</think>\n\n{"z":1}')
    assert admits(form, inside, 'Oh <think>\n</think>{"z":1}')
    for text in ("<think>\n</think>\n\n", "<think>x", "x</think>x", '</think>{"z":1}'):
        assert not admits(form, grammar, text)
    assert not admits(form, inside, '{"z":1}')
    plain = format_of("hermes")
    assert not admits(plain, plain.after_reasoning(schema_rule(ANSWER, "response_format")), '<think></think>{"z":1}')


def test_marks_and_triggers_that_are_control_tokens_can_not_be_spelled() -> None:
    form = format_of("mistral")
    _, library = byte_vocabulary()
    matcher = compile_grammar(library, form.grammar(offered(NOW, mode="required")))
    spelled = list(b"[TOOL_CALLS]get[ARGS]{}")
    assert matcher.validate_tokens(spelled) == 0


@pytest.mark.parametrize(
    ("tool", "param", "code"),
    [
        (
            Tool("f", parameters={"type": "object", "properties": {"a": {"type": "never"}}}, is_strict=True),
            "function.parameters",
            "invalid_json_schema",
        ),
        (Tool("f", parameters={"type": "array"}, is_strict=True), "function.parameters", "invalid_json_schema"),
        (Tool("f", kind="custom", syntax="lark", definition="no rules"), "custom.format.grammar.definition", "invalid_grammar"),
        (Tool("f", kind="custom", syntax="regex", definition="a\\"), "custom.format.grammar.definition", "invalid_grammar"),
    ],
)
def test_what_can_not_be_enforced_is_named(tool: Tool, param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        format_of("hermes").grammar(offered(NOW, tool))
    assert (caught.value.param or "").startswith(f"tools[1].{param}")
    assert caught.value.code == code


def test_loose_schemas_guide_without_refusing() -> None:
    form = format_of("hermes")
    _, library = byte_vocabulary()
    for parameters in (
        None,
        {},
        {"type": "array"},
        {"properties": {"a": {"type": "string"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}},
    ):
        tools = offered(Tool("f", parameters=parameters), mode="required")
        assert not compile_grammar(library, form.grammar(tools)).is_error()
    odd = offered(Tool("f", parameters={"properties": {"a": {"type": "string"}}}), mode="required")
    assert not admits(form, form.grammar(odd), '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')


def test_grammars_fit_the_default_models_vocabulary(smollm2_path: Path) -> None:
    codec = load_codec(smollm2_path)
    library = library_tokenizer(codec.tokenizer)
    tools = offered(*ALL, mode="required")
    matcher = compile_grammar(library, codec.format.grammar(tools))
    rng = random.Random(3)
    heard = 0
    for _ in range(12):
        reply = walk(matcher.deep_copy(), codec.tokenizer, rng, most=300)
        if reply is not None:
            calls = hear(codec.format.parser(tools), [reply]).calls
            assert calls
            for called, arguments in calls:
                check(called, arguments)
            heard += 1
    assert heard
