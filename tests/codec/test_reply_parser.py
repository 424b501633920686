"""Replies taken apart: the same however they arrive, nothing lost, in linear time, and nothing ever evaluated."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.reply import PlainText
from service.codec.reply_calls import MOST_CALLS
from service.codec.reply_reader import MOST_HELD
from service.codec.text import TextStream
from service.codec.tools import Tool
from tests.codec.replies import (
    BY_NAME,
    CONTROL,
    NOW,
    REPLIES,
    RUN,
    THINK,
    TOOLS,
    WEATHER,
    Heard,
    byte_tokenizer,
    cut,
    format_of,
    hear,
    offered,
)

NAMES = list(BY_NAME)
FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from([text for dialect in BY_NAME.values() for text in dialect.texts if text]),
        st.sampled_from(
            ['{"name": "get", "arguments": ', '{"name": "', "get", "get_weather", "run", '{"arguments": ', "{}", '"}', "}", "]", "["]
        ),
        st.sampled_from(
            ['{"input": "', '\\"', "\\u00", "\\ud83d\\ude00", "\\", "call:", "<escape>", "<parameter=city>", "</parameter>", ">"]
        ),
        st.sampled_from(
            [" ", "\n", "é", "text", "<", "```", "<think>", "</think>", "null", ",", ";", "</function>", "<input>", "</input>"]
        ),
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize(("name", "reply", "text", "calls"), REPLIES)
@pytest.mark.parametrize("size", [1, 2, 5, 20, 10_000])
def test_replies_of_every_dialect(name: str, reply: str, text: str, calls: list[tuple[str, str]], size: int) -> None:
    parser = format_of(name).parser(offered(*TOOLS))
    assert hear(parser, cut(reply, size)) == Heard("", text, calls)


@given(st.sampled_from(NAMES), st.booleans(), FRAGMENTS, st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_however_a_reply_is_cut_it_is_the_same(name: str, reasons: bool, reply: str, sizes: list[int]) -> None:
    form = format_of(name, marks=THINK if reasons else None)
    whole = hear(form.parser(offered(*TOOLS)), [reply])
    pieces: list[str] = []
    at = 0
    while at < len(reply):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(reply[at : at + size])
        at += size
    assert hear(form.parser(offered(*TOOLS)), pieces) == whole
    if not whole.calls and not reasons:
        assert whole.text == reply, "what is no call is text, to the last blank"


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20])
def test_tokens_per_delta_do_not_matter(num_tokens: int) -> None:
    """From ids, with characters and marks split over them, and a stop string in the arguments."""
    tokenizer = byte_tokenizer()
    for name, reply, text, calls in REPLIES:
        ids = [
            piece
            for part in tokenizer.special.split(reply + "é STOP hidden")
            for piece in ([part.id] if not isinstance(part, str) else part.encode())
        ]
        form = format_of(name)
        tools = offered(*TOOLS)
        stream, parser, heard = TextStream(tokenizer, ["STOP"], shown=form.shown(tools)), form.parser(tools), Heard()
        for at in range(0, len(ids), num_tokens):
            heard.add(parser.push(stream.push(ids[at : at + num_tokens]).text))
        heard.add(parser.push(stream.finish().text))
        heard.add(parser.finish())
        assert heard == hear(form.parser(tools), [reply + "é "])
        assert [called for called, _ in heard.calls] == [called for called, _ in calls]
        assert heard.text.startswith(text)
        assert "hidden" not in heard.text


@pytest.mark.parametrize("size", [1, 2, 5, 20, 10_000])
def test_reasoning_comes_first_and_its_marks_vanish(size: int) -> None:
    form = format_of("hermes", marks=THINK)
    reply = "<think>\nWhy <tool_call>?\n\nSo. \n</think>\n\nBecause.\n<tool_call>\n" + '{"name": "get", "arguments": {}}\n</tool_call>'
    expected = Heard("Why <tool_call>?\n\nSo.", "Because.", [("get", "{}")])
    assert hear(form.parser(offered(NOW)), cut("\n" + reply, size)) == expected
    assert hear(form.parser(offered(NOW), is_reasoning=True), cut(reply.removeprefix("<think>"), size)) == expected
    assert hear(form.parser(offered(NOW), is_reasoning=True), cut(reply, size)) == expected
    without_tools = hear(form.parser(None), cut(reply, size))
    assert without_tools == Heard(expected.reasoning, 'Because.\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>')
    assert hear(form.parser(None), cut("<think>\n\n</think>\n\nYes", size)) == Heard("", "Yes")
    assert hear(form.parser(None), cut("No <think> here", size)) == Heard("", "No <think> here")
    assert hear(form.parser(None, is_reasoning=True), cut("cut off </thi", size)) == Heard("cut off </thi")
    assert hear(form.parser(None), cut(" \n", size)) == Heard("", " \n")


def test_without_tools_and_reasoning_nothing_is_looked_at() -> None:
    parser = format_of("hermes").parser(None)
    assert isinstance(parser, PlainText)
    assert hear(parser, ["<tool_call>", "</think>"]) == Heard("", "<tool_call></think>")
    assert (parser.is_complete, parser.is_cut) == (False, False)


@pytest.mark.parametrize(("name", "reply", "text", "calls"), [case for case in REPLIES if len(case[3]) > 1])
def test_where_one_call_is_allowed_the_reply_is_over_with_it(name: str, reply: str, text: str, calls: list[tuple[str, str]]) -> None:
    for size in (1, 10_000):
        parser = format_of(name).parser(offered(*TOOLS, is_parallel=False))
        heard = hear(parser, cut(reply, size))
        assert heard.calls == calls[:1]
        assert text.startswith(heard.text)
        assert parser.is_complete
        assert not parser.is_cut
        assert parser.push("more").text == ""


def test_a_call_that_is_cut_says_so() -> None:
    whole = '<tool_call>{"name": "get", "arguments": {"a": "b"}}</tool_call>'
    for end in range(len(whole) + 1):
        parser = format_of("hermes").parser(offered(NOW))
        heard = hear(parser, [whole[:end]])
        if heard.calls:
            ((_, arguments),) = heard.calls
            assert '{"a": "b"}'.startswith(arguments)
            assert parser.is_cut is (arguments != '{"a": "b"}')
        else:
            assert heard.text == whole[:end]


def test_ids_are_fresh_and_of_the_form_a_template_takes() -> None:
    ids = []
    for name, reply in (("hermes", '<tool_call>{"name": "get"}' * 2), ("mistral", "[TOOL_CALLS]get[ARGS]{}" * 2)):
        deltas = format_of(name).parser(offered(NOW)).push(reply).calls
        ids += [delta.id or "" for delta in deltas]
    assert len(set(ids)) == 4
    assert all(text.startswith("call_") and len(text) == 29 for text in ids[:2])
    assert all(len(text) == 9 and text.isalnum() for text in ids[2:])


def test_kinds_of_tools_are_told() -> None:
    (delta,) = format_of("hermes").parser(offered(RUN)).push('{"name": "run", "arguments": {"anything": "ls", "more": {}}}').calls
    assert (delta.kind, delta.name, delta.arguments) == ("custom", "run", "ls")


def test_raw_input_stands_between_marks() -> None:
    tool = Tool("cal", kind="custom", syntax="lark", definition="start: /.*/")
    for name, reply in (
        ("hermes", '<tool_call>\n{"name": "cal", "arguments": <input>1 + "2</in</input>}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS]cal[ARGS]<input>1 + "2</in</input>'),
        ("function-gemma", '<start_function_call>call:cal<input>1 + "2</in</input><end_function_call>'),
    ):
        for size in (1, 3, 1000):
            assert hear(format_of(name).parser(offered(tool)), cut(reply, size)) == Heard("", "", [("cal", '1 + "2</in')])


@given(
    st.sampled_from(NAMES),
    st.sampled_from(["__import__('os').abort()", "[f(x=1)]", "{1: print('x')}", "exec('raise SystemExit')", "`id`", "9**9**9"]),
)
def test_python_is_never_run(name: str, code: str) -> None:
    form = format_of(name)
    for reply in (
        f"```tool_code\n{code}\n```",
        f'<tool_call>{{"name": "get_weather", "arguments": {code}}}</tool_call>',
        f"[TOOL_CALLS]get_weather[ARGS]{code}",
        f"<function=get_weather><parameter=days>{code}</parameter></function>",
        f"<start_function_call>call:get_weather{{days:{code}}}",
    ):
        heard = hear(form.parser(offered(*TOOLS)), [reply])
        if heard.calls and reply.startswith("<function"):
            assert json.loads(heard.calls[0][1])["days"] == code


def test_values_in_tags_are_of_the_kind_that_the_schema_says() -> None:
    kinds = {
        "text": {"type": "string"},
        "flag": {"type": "boolean"},
        "either": {"type": ["integer", "string"]},
        "thing": {"type": "object"},
        "pick": {"enum": ["1", 2]},
    }
    given = {"text": "5", "flag": "True", "either": "7", "thing": '{"a": [1]}', "pick": "1", "unknown": "x", "number": "1.50", "bad": "NaN"}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
    parser = format_of("qwen-xml").parser(offered(Tool("f", parameters={"type": "object", "properties": kinds})))
    ((_, arguments),) = hear(parser, [f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"]).calls
    expected = {"text": "5", "flag": True, "either": 7, "thing": {"a": [1]}, "pick": "1", "unknown": "x", "number": 1.5, "bad": "NaN"}
    assert json.loads(arguments) == expected


def test_there_is_an_end_to_calls_and_to_what_is_held() -> None:
    many = '<tool_call>{"name": "get"}</tool_call>' * (MOST_CALLS + 3)
    heard = hear(format_of("hermes").parser(offered(NOW)), [many])
    assert len(heard.calls) == MOST_CALLS
    assert heard.text == '<tool_call>{"name": "get"}</tool_call>' * 3
    late = '<tool_call>{"arguments": {"a": "' + "x" * MOST_HELD + '"}, "name": "get"}</tool_call>'
    for size in (1000, 10**6):
        assert hear(format_of("hermes").parser(offered(NOW)), cut(late, size)) == Heard("", late)


N = 1 << 20
_CALL = '<tool_call>{"name":"get","arguments":'
HOSTILE = [
    *(text * (N // len(text)) for text in ("<", "{", "[", '"', " ", "\\", "```", "é", "<think>", "\n<")),
    *(text * (N // len(text)) for dialect in BY_NAME.values() for text in dialect.triggers),
    *(
        head + tail * (N // len(tail))
        for head in (_CALL, _CALL + '"{', _CALL + "{", "[TOOL_CALLS]get[ARGS]{")
        for tail in ("[", "[]", '\\"', '"",', "\\q")
    ),
    *(_CALL + '"{' + tail * (N // 6) for tail in ("\\ud800", "\\udc00", "\\u00e9", "\\uzzzz")),
    '<tool_call>{"name":"run","arguments":{"input":"' + "\\n" * (N // 2),
    '<tool_call>{"arguments":{"' * (N // 27),
    '<tool_call>{"id":""' * (N // 19),
    (_CALL + "{}}</tool_call>") * (N // 52),
    _CALL + "{}," + '"a":1,' * (N // 6),
    "<function=get>" + "<parameter=a>x</parameter>" * (N // 26),
    "<function=get><parameter=a>" * (N // 27),
    "<start_function_call>call:get{" + "a:1," * (N // 4),
    ("<start_function_call>call:get{" + "a:1," * 8000) * (N // 32_000),
    "[TOOL_CALLS]get[ARGS]{}" * (N // 23),
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>" * (N // 60),
]


def _yardstick() -> float:
    """What this machine takes for a loop that takes 20 ms where the bound was set (a Zen 5 core)."""
    before = time.process_time()
    total = 0
    for number in range(1_000_000):
        total += number
    return max(1.0, (time.process_time() - before) / 0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_megabyte_takes_a_tenth_of_a_second(name: str) -> None:
    form = format_of(name, marks=THINK)
    limit = 0.1 * _yardstick()
    for reply in HOSTILE:
        if name != "hermes" and not any(trigger in reply for trigger in BY_NAME[name].triggers):
            continue  # nothing but the search for a trigger, which is the same for all
        times: list[float] = []
        while len(times) < 4 and min(times, default=1.0) > 0.1:
            parser = form.parser(offered(*TOOLS))
            before = time.process_time()
            parser.push(reply)
            parser.finish()
            times.append(time.process_time() - before)
        assert min(times) < limit, (name, reply[:60])


@pytest.mark.parametrize(
    "reply", [" " * 40_000, "<tool_call>" + " " * 40_000, '<tool_call>{"arguments": "' + "x" * 40_000, _CALL + "[" * 40_000]
)
def test_many_small_pieces_take_linear_time(reply: str) -> None:
    parser = format_of("hermes").parser(offered(NOW))
    before = time.process_time()
    for char in reply:
        parser.push(char)
    parser.finish()
    assert time.process_time() - before < 1.0 * _yardstick()


def test_the_special_tokens_of_a_dialect_are_shown_only_with_tools() -> None:
    tokenizer = byte_tokenizer()
    ids = {text: 256 + index for index, text in enumerate(CONTROL)}
    mistral = format_of("mistral")
    assert mistral.shown(offered(WEATHER)) == {ids["[TOOL_CALLS]"], ids["[ARGS]"], ids["[CALL_ID]"]}
    assert mistral.shown(None) == frozenset()
    hidden = TextStream(tokenizer).push([65, ids["[TOOL_CALLS]"]]).text
    shown = TextStream(tokenizer, shown=mistral.shown(offered(WEATHER))).push([65, ids["[TOOL_CALLS]"], ids["<|end|>"]]).text
    assert (hidden, shown) == ("A", "A[TOOL_CALLS]")
