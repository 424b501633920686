"""The template's sandbox: what templates rely on works, what they must not do fails as the request's fault."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from service.codec.special import MARKERS
from service.codec.template import ChatTemplate
from service.errors import RequestError, StartupError

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "<b>é</b>"}]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s><b>é</b>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b>é</b>"}'),
        ("{{ messages[0].content | tojson(ensure_ascii=True) }}", '"<b>\\u00e9</b>"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=True) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ {'a': 1} | tojson(separators=(',', ':')) }}", '{"a":1}'),
        ("{{ nothing is defined }}{{ nothing }}", "False"),
    ],
)
def test_what_templates_rely_on(source: str, text: str) -> None:
    assert render(source) == text


def test_variables_and_the_date_reach_the_template() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_escaped_json_equals_the_librarys_and_keeps_markers() -> None:
    value = {"é😀\\ \"'": ["\u2028", "\x7f", "a\n"]}
    assert render("{{ value | tojson(ensure_ascii=True) }}", value=value) == json.dumps(value)
    assert render("{{ value | tojson(ensure_ascii=True) }}", value=MARKERS[0] + "\\ufdd0") == f'"{MARKERS[0]}\\\\ufdd0"'


def test_a_refusal_has_the_templates_own_words_without_markers() -> None:
    with pytest.raises(RequestError) as caught:
        render("{{ raise_exception('no system role: ' + x) }}", x=f"<{MARKERS[3]}|a|>")
    assert caught.value.message == "no system role: <|a|>"
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + none }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ nothing.inside }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_must_not_do_ends_the_request_alone(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_output_is_bounded() -> None:
    endless = ChatTemplate("{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}", {}, most_chars=10_000)
    with pytest.raises(RequestError, match="more than 10000 characters"):
        endless.render(MESSAGES, {})


def test_what_is_no_template_stops_the_start() -> None:
    for source in ("{% for %}", "{{ a", "{% unknown %}"):
        with pytest.raises(StartupError, match="no valid template"):
            ChatTemplate(source, {})


def test_work_is_bounded_even_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.codec.template.MOST_SECONDS", 0.05)
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% set x = messages[0] %}{% endfor %}{% endfor %}"
    calls = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for source in (loops, calls):
        before = time.thread_time()
        with pytest.raises(RequestError, match="more than 0") as caught:
            render(source)
        assert time.thread_time() - before < 2
        assert caught.value.param == "messages"
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}") == "<b>é</b>"


def test_variables_are_what_a_template_reads_from_outside() -> None:
    source = (
        "{% if not date is defined %}{% set date = strftime_now('%Y') %}{% endif %}{% set own = 1 %}{{ own }}{{ bos_token }}{{ _hidden }}"
        "{% for m in messages %}{{ m.x }}{{ tools }}{{ loop.index }}{% endfor %}{{ effort | default('x') }}{{ date }}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).variables == {"date", "effort"}
