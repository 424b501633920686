"""Forms of output: what reaches the engine as a grammar under each of its names, what can't be combined, how the engine's errors return."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.api.fakes import MODEL, Running, Script
from tests.api.test_chat import HI
from tests.api.test_validation import check

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
QUESTION: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, TEXT: {"prompt": "hi"}}
# A request's fields, the field that errors will name, and what has to stand in the grammar.
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format.schema", '"object"'),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema", '"integer"'),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "response_format.schema", '"integer"'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        "response_format.json_schema.schema",
        '"integer"',
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", '"object"'),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", '"integer"'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json", '"integer"'),
    ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", '"object"'),
    ({"structured_outputs": {"regex": "[a-c]{3}"}}, "structured_outputs.regex", "[a-c]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "structured_outputs.choice", '"yes" | "no"'),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, "structured_outputs.grammar", 'start: "x"'),
    ({"guided_json": SCHEMA}, "guided_json", '"integer"'),
    ({"guided_regex": "[a-c]{3}"}, "guided_regex", "[a-c]{3}"),
    ({"guided_choice": ["yes", "no"], "guided_decoding_backend": "outlines"}, "guided_choice", '"yes" | "no"'),
    ({"guided_grammar": 'root ::= "x"'}, "guided_grammar", '"x"'),
    ({"json_schema": SCHEMA}, "json_schema", '"integer"'),
    ({"regex": "[a-c]{3}"}, "regex", "[a-c]{3}"),
    ({"ebnf": 'root ::= "x"'}, "ebnf", '"x"'),
    ({"grammar": 'root ::= "x"'}, "grammar", '"x"'),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "param", "part"), FORMS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_name_becomes_a_grammar(server: Running, path: str, fields: dict[str, Any], param: str, part: str) -> None:
    answer = server.post(path, **QUESTION[path], **fields)
    assert answer.status_code == 200, answer.text
    assert "warnings" not in answer.json()
    sent = server.engine.requests[-1]
    assert part in sent.grammar
    assert "start:" in sent.grammar
    assert sent.grammar_param == param
    assert MODEL in server.engine.taught


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_what_asks_for_no_form(server: Running, path: str, fields: dict[str, Any]) -> None:
    assert server.post(path, **QUESTION[path], **fields).status_code == 200
    assert (server.engine.requests[-1].grammar, server.engine.requests[-1].grammar_param) == ("", None)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("response_format.type", {"response_format": {"type": "yaml"}}),
        ("response_format.type", {"response_format": {}}),
        ("response_format", {"response_format": "json"}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}),
        ("response_format.json_schema.schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        ),
        ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": ""}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
        ("structured_outputs.choice[0]", {"structured_outputs": {"choice": [5]}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: <|end|>"}}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "{}"}}),
        ("structured_outputs.whitespace_pattern", {"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}),
        ("structured_outputs.choice", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        ("guided_json", {"response_format": {"type": "json_object"}, "guided_json": {}}),
        ("structured_outputs.regex", {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
        ("guided_choice", {"guided_regex": "a", "guided_choice": ["a"]}),
        ("guided_whitespace_pattern", {"guided_json": {}, "guided_whitespace_pattern": "x"}),
        ("guided_regex", {"guided_regex": 5}),
    ],
)
def test_what_is_no_form_is_named(server: Running, path: str, param: str, fields: dict[str, Any]) -> None:
    assert check(server.post(path, **QUESTION[path], **fields))["param"] == param
    assert server.engine.requests == []


def test_unknown_fields_of_forms_are_reported(server: Running) -> None:
    body = server.chat(response_format={"type": "json_object", "colour": 1}, structured_outputs={"shape": 2}).json()
    assert body["warnings"] == [
        "unknown field 'response_format.colour' was ignored",
        "unknown field 'structured_outputs.shape' was ignored",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_finds_wrong_names_the_field(server: Running, stream: bool) -> None:
    server.engine.script = Script(error_after=0, error_status=400, error_param="guided_regex", error_code="invalid_grammar")
    error = check(server.chat(guided_regex="a", stream=stream))
    assert (error["param"], error["code"], error["message"]) == ("guided_regex", "invalid_grammar", "it broke")


class City(pydantic.BaseModel):
    name: str
    size: Literal["small", "large"]
    twin: City | None = None


def test_parse_with_pydantic(client: openai.OpenAI, server: Running) -> None:
    server.engine.script = Script(text='{"name":"Bern","size":"small","twin":{"name":"Köln","size":"large","twin":null}}')
    answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Bern", size="small", twin=City(name="Köln", size="large"))
    with client.chat.completions.stream(model=MODEL, messages=HI, response_format=City) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
    grammar = server.engine.requests[-1].grammar
    assert all(part in grammar for part in ("$defs", "small", "large"))
